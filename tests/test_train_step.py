"""The jitted functions: gradient, optimizer, units, and the metrics of whole volumes from batches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import coil_images, read_example, rss, to_kspace

from mrjax import experiment, train_step
from mrjax.config import defaults
from mrjax.data import loader, splits
from mrjax.data.dataset import SliceDataset
from mrjax.io import readers
from mrjax.measures import metrics
from mrjax.measures.evaluator import evaluate
from mrjax.mri import tasks
from mrjax.ops import convolution
from mrjax.parallel import sharding


def config(**fields):
    base = defaults()
    base.model.channels, base.model.levels, base.data.image_size = 4, 2, (32, 32)
    base.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return base


def batch(count: int = 8) -> dict[str, np.ndarray]:
    return {
        "kspace": to_kspace(coil_images(count, 2, 32, 32)),
        # Not from 0 or 100 on: there one pixel lies where LeakyReLU bends, and rounding decides its slope.
        "index": np.arange(300, 300 + count, dtype=np.uint32),
        "maximum": np.ones(count, np.float32),
    }


def run(recipe: train_step.Recipe, steps: int) -> tuple[train_step.TrainState, list[float]]:
    step = train_step.jit_train_step(recipe)
    draw = jax.jit(lambda: experiment.initial_state(config(), recipe), out_shardings=sharding.replicated(recipe.mesh))
    state = draw()
    losses = []
    for _ in range(steps):
        state, values = step(state, jax.device_put(batch(), sharding.by_example(recipe.mesh)))
        losses.append(float(values["loss"]))
    return state, losses


@pytest.mark.parametrize("precision", ["float32", "float32_exact"])
def test_exact_float32_is_multiplied_as_such_forwards_and_backwards(precision: str, monkeypatch) -> None:
    monkeypatch.setattr(convolution, "_in_cpp", lambda x, kernel: False)  # as on an accelerator
    fields = config(precision=precision)
    recipe = experiment.make_recipe(fields, sharding.make_mesh())
    step = train_step.jit_train_step(recipe).trace(experiment.abstract_state(fields, recipe), batch())
    exact = ["HIGHEST" in one for one in re.findall(r"(?<!_)precision=(\S+)", str(step.jaxpr))]
    assert len(exact) > 20
    assert all(exact) == (precision == "float32_exact")


def test_a_step_follows_the_gradient_of_the_mean_squared_error_of_normalised_images_and_the_average_it() -> None:
    recipe = experiment.make_recipe(config(ema=0.5), sharding.make_mesh())
    recipe = dataclasses.replace(recipe, optimizer=optax.sgd(1.0))
    data = batch()
    state, losses = run(recipe, steps=1)
    params = jax.jit(recipe.model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))["params"]
    corrupted, target, *_ = jax.jit(recipe.task)(data, tasks.training_keys(0, data["index"]))
    low, high = (np.asarray(f(corrupted, axis=(1, 2), keepdims=True)) for f in (np.min, np.max))

    def loss_of(params):
        prediction = recipe.model.apply({"params": params}, ((corrupted - low) / (high - low))[..., None])[..., 0]
        return jnp.mean((prediction - (target - low) / (high - low)) ** 2)

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    assert losses[0] == pytest.approx(float(loss), rel=1e-5)
    assert int(state.step) == 1
    # In NumPy: JAX would compile a subtraction for each shape.
    params, gradient, state = jax.device_get((params, gradient, state))
    moved = jax.tree.map(lambda before, after: before - after, params, state.params)
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * size), moved, gradient)
    decay = min(0.5, 2 / 11)
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, params, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.ema, average)
    assert state.eval_params is state.ema


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_training_reduces_the_loss(precision: str) -> None:
    recipe = experiment.make_recipe(config(precision=precision, warmup=0.0, model__residual=True), sharding.make_mesh())
    state, losses = run(recipe, steps=12)
    assert losses[-1] < 0.8 * losses[0]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


class Identity:
    """A network that returns its input."""

    input_names = ("image",)

    def apply(self, variables, x):
        return x


def test_the_reconstruction_is_in_the_files_units() -> None:
    recipe = dataclasses.replace(experiment.make_recipe(config(), sharding.make_mesh()), model=Identity())
    data = batch() | {"name": np.arange(8, dtype=np.uint32), "slice": np.zeros(8, np.int32)}
    images, peak = train_step.jit_predict(recipe)({}, data | {"kspace": 1e-4 * data["kspace"]})
    assert np.allclose(images["reconstruction"], images["corrupted"], rtol=1e-5, atol=1e-9)
    assert np.allclose(images["target"], 1e-4 * rss(coil_images(8, 2, 32, 32)), atol=1e-9)
    assert np.allclose(peak, np.asarray(images["target"]).max((1, 2)))


@pytest.mark.slow
def test_evaluation_in_batches_gives_the_metrics_of_whole_volumes(scans) -> None:
    recipe = experiment.make_recipe(config(), sharding.make_mesh())
    volumes = splits.describe_split(config(), readers.find(str(scans)))
    params = jax.jit(lambda: experiment.initial_state(config(), recipe).params)()
    predict = train_step.jit_predict(recipe)
    dataset = SliceDataset(volumes, (32, 32))
    with loader.evaluation_batches([dataset], loader.LoaderOptions(8)) as batches:
        rows, previews = evaluate(lambda batch: predict(params, batch), batches, volumes, recipe.mesh)
    assert [row["slices"] for row in rows] == [volume.slices for volume in volumes]
    assert len(previews) == 3
    # The same again, volume by volume, with all slices of one in a batch of its own.
    slice_values = jax.jit(metrics.slice_values)
    for number, row in enumerate(rows):
        examples = [read_example(dataset, i) for i, (volume, _) in enumerate(dataset.positions) if volume == number]
        padded = (examples * 8)[:8]
        images, _ = predict(params, {name: np.stack([x[name] for x in padded]) for name in examples[0]})
        images = {name: np.asarray(image)[: len(examples)] for name, image in images.items()}
        for method in ("reconstruction", "corrupted"):
            for name in ("nmse", "psnr", "ssim"):
                values = slice_values(images["target"], images[method], images["target"].max())
                expected = metrics.volume_values(values, images["target"].max())[name]
                assert row[method][name] == pytest.approx(expected, rel=1e-4), (method, name)
