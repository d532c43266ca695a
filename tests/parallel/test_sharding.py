"""Every mesh computes the same step; `test_fit.py` counts what it sends."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import coil_images, to_kspace

from mrjax import experiment, train_step
from mrjax.config import defaults
from mrjax.errors import UserError
from mrjax.parallel import sharding

SIZE = (32, 32)


def config(**fields):
    base = defaults()
    base.model.channels, base.model.levels, base.data.image_size = 4, 2, SIZE
    base.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return base


def examples(count: int = 8) -> dict[str, np.ndarray]:
    return {
        "kspace": to_kspace(coil_images(count, 2, *SIZE)),
        "maximum": np.ones(count, np.float32),
        "slice": np.arange(count, dtype=np.int32),
    }


def two_steps(cfg, mesh, initial=None):
    """Losses of two steps of gradient descent, and the states before them (drawn on the mesh by default) and after."""
    recipe = dataclasses.replace(experiment.make_recipe(cfg, mesh), optimizer=optax.sgd(1e-3, momentum=0.9))
    step = train_step.jit_train_step(recipe)
    layout = jax.tree.map(lambda leaf: leaf.sharding, experiment.abstract_state(cfg, recipe))
    if initial is None:
        initial = jax.device_get(jax.jit(lambda: experiment.initial_state(cfg, recipe), out_shardings=layout)())
    state = jax.device_put(initial, layout)
    losses = []
    for number in range(2):
        batch = {name: np.roll(x, -3 * number, 0) for name, x in examples().items()}
        batch["index"] = np.arange(8 * number, 8 * (number + 1), dtype=np.uint32)
        state, values = step(state, jax.device_put(batch, sharding.by_example(mesh)))
        losses.append(float(values["loss"]))
    return losses, initial, state


@pytest.fixture(scope="module")
def one_device():
    return two_steps(config(), sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        pytest.param(*((8, 1, 1), {}), marks=pytest.mark.slow),
        pytest.param(*((1, 8, 1), {}), marks=pytest.mark.slow),
        pytest.param(*((1, 1, 8), {}), marks=pytest.mark.slow),
        ((2, 2, 2), {}),
        pytest.param(*((1, 2, 4), {"remat": True}), marks=pytest.mark.slow),
        pytest.param(*((4, 1, 2), {"grad_accumulation_steps": 2}), marks=pytest.mark.slow),
        pytest.param(*((2, 1, 1), {"grad_accumulation_steps": 4}), marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_loss_and_the_parameters_of_one_device(shape, fields, one_device) -> None:
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])
    expected_losses, initial, expected = one_device
    # Only the mesh that splits every axis draws its own initial state, which is another program to compile.
    losses, _, state = two_steps(config(**fields), mesh, None if shape == (2, 2, 2) else initial)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, expected.params)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_equivalent_to(sharding.by_parameter(mesh, leaf.shape), leaf.ndim)


def test_fully_sharded_parameters_and_moments_take_their_share_of_memory() -> None:
    cfg = config(model__channels=64)
    recipe = experiment.make_recipe(cfg, sharding.make_mesh((1, 8, 1)))
    leaves = jax.tree.leaves(experiment.abstract_state(cfg, recipe))
    whole = sum(np.prod(x.shape) for x in leaves)
    kept = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    assert whole / 8 <= kept < whole / 7.9


def test_a_mesh_that_does_not_fit_is_one_sentence() -> None:
    assert sharding.rows_of_process(sharding.make_mesh((2, 2, 2)), 8) == list(range(8))
    assert experiment.mesh_shape(config(mesh=(0, 2, 2)), 8) == (2, 2, 2)
    with pytest.raises(UserError, match=r"config.mesh is \(3, 1, 1\), expected numbers that multiply to the 8 devices"):
        experiment.mesh_shape(config(mesh=(3, 1, 1)), 8)
    with pytest.raises(UserError, match=r"config.batch_size is 8, expected a multiple of the 8 devices .* times"):
        experiment.mesh_shape(config(grad_accumulation_steps=2), 8)
