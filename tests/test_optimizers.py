"""The optimizer, its schedule and the average of the parameters, as a config asks for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import coil_images, to_kspace

from mrjax import experiment, train_step
from mrjax.config import check, defaults
from mrjax.errors import UserError
from mrjax.parallel import sharding


def config(**fields):
    base = defaults()
    base.model.channels, base.model.levels, base.data.image_size, base.warmup = 2, 1, (16, 16), 0.0
    base.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    check(base)
    return base


def steps(cfg, count: int) -> list[train_step.TrainState]:
    """The states after each of `count` steps."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    fixed = {"model": experiment.model(cfg), "task": experiment.task(cfg), "normalise_by": "slice", "seed": 0}
    jitted = train_step.compile_train(mesh, optimizer=experiment.optimizer(cfg), ema=cfg.ema, **fixed)
    batch = {
        "kspace": to_kspace(coil_images(2, 1, 16, 16)),
        "index": np.arange(2, dtype=np.uint32),
        "maximum": np.ones(2, np.float32),
    }
    states = [jax.jit(experiment.initial_state(cfg))()]
    for _ in range(count):
        states.append(jitted(jax.tree.map(jnp.copy, states[-1]), batch)[0])
    return states


def test_the_average_follows_the_parameters_and_is_what_is_evaluated() -> None:
    first, *later = steps(config(ema=0.5, optimizer="nadamw", clip_norm=1.0), 3)
    average = first.params
    for number, state in enumerate(later, start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), later[-1].ema, average)
    assert later[-1].best_params is later[-1].ema
    assert train_step.TrainState(params=average, opt_state=None).best_params is average


def test_clipping_bounds_the_gradient_and_decay_shrinks_parameters() -> None:
    params, gradient = jnp.ones(4), jnp.full(4, 100.0)
    clipped = experiment.optimizer(config(clip_norm=1.0))
    state = clipped.init(params)
    _, state = clipped.update(gradient, state, params)
    moment = optax.tree.get_all_with_path(state, "mu")[0][1]
    # Adam's first moment: a tenth of the gradient.
    assert float(jnp.linalg.norm(moment)) == pytest.approx(0.1, rel=1e-5)
    for name in ("adamw", "nadamw"):
        decayed = experiment.optimizer(config(optimizer=name, weight_decay=0.1, learning_rate=0.5, schedule="constant"))
        update, _ = decayed.update(jnp.zeros(4), decayed.init(params), params)
        assert np.allclose(update, -0.05), name


def test_the_step_schedule_falls_by_a_factor_after_each_share_of_the_steps() -> None:
    rate = experiment.schedule(config(schedule="step", steps=10, warmup=0.2, decay_every=0.4, learning_rate=1.0))
    assert np.allclose([rate(i) for i in range(10)], [0, 0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss__mse": 0.0}, "config.loss.mse is 0.0"),
        ({"ema": 1.0}, "config.ema is 1.0"),
        ({"model__name": "varnet", "data__neighbours": 1}, "config.data.neighbours is 1, expected 0: varnet"),
        ({"model__cascades": 3}, "config.model.cascades is 3, expected no other than 12: unet has no such field"),
    ],
)
def test_a_field_that_cannot_work_is_named(fields, message) -> None:
    with pytest.raises(UserError, match=message):
        config(**fields)
