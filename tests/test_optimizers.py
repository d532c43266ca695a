"""Optimizers and schedules against their formulas."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mrjax import optimizers
from mrjax.config import defaults


def config(**fields):
    base = defaults()
    base.update(fields)
    return base


def test_adam_follows_a_warm_up_and_a_cosine() -> None:
    optimizer = optimizers.make_optimizer(config(steps=10, warmup=0.2, learning_rate=0.1))
    params, gradient = jnp.zeros(1), jnp.full(1, 3.0)
    state, steps = optimizer.init(params), []
    for _ in range(10):
        update, state = optimizer.update(gradient, state, params)
        steps.append(-float(update[0]))
    # With a constant gradient each of Adam's steps is as long as the learning rate.
    cosine = 0.05 * (1 + np.cos(np.pi * np.arange(8) / 8))
    assert np.allclose(steps, [0, 0.05, *cosine], atol=1e-5)


def test_clipping_bounds_the_gradient_and_weight_decay_shrinks_parameters() -> None:
    params, gradient = jnp.ones(4), jnp.full(4, 100.0)
    clipped = optimizers.make_optimizer(config(clip_norm=1.0))
    _, state = clipped.update(gradient, clipped.init(params), params)
    moment = optax.tree.get_all_with_path(state, "mu")[0][1]
    # Adam's first moment: a tenth of the gradient.
    assert float(jnp.linalg.norm(moment)) == pytest.approx(0.1, rel=1e-5)
    for name in ("adamw", "nadamw"):
        fields = {"weight_decay": 0.1, "learning_rate": 0.5, "schedule": "constant", "warmup": 0.0}
        decayed = optimizers.make_optimizer(config(optimizer=name, **fields))
        update, _ = decayed.update(jnp.zeros(4), decayed.init(params), params)
        assert np.allclose(update, -0.05), name


def test_the_schedules_constant_and_step_fall_as_configured() -> None:
    fields = {"steps": 100, "warmup": 0.1, "learning_rate": 1.0, "decay_every": 0.4, "decay_factor": 0.1}
    step = optimizers.make_schedule(config(schedule="step", **fields))
    assert [float(step(i)) for i in (0, 5, 10, 49, 50, 90)] == pytest.approx([0, 0.5, 1, 1, 0.1, 0.01])
    constant = optimizers.make_schedule(config(schedule="constant", **fields))
    assert [float(constant(i)) for i in (5, 10, 99)] == pytest.approx([0.5, 1, 1])
