import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import coil_images, rss, to_kspace

from mrjax import experiment
from mrjax import train_step as step
from mrjax.config import defaults
from mrjax.evaluate import evaluate
from mrjax.measures import metrics
from mrjax.mri import tasks
from mrjax.parallel import sharding


def config(**fields):
    base = defaults()
    base.model.channels, base.model.levels, base.data.image_size = 4, 2, (32, 32)
    base.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return base


def batch(count: int = 8) -> dict[str, np.ndarray]:
    return {
        "kspace": to_kspace(coil_images(count, 2, 32, 32)),
        # Not from 0 on: there one pixel lies where LeakyReLU bends, and rounding decides its slope.
        "index": np.arange(100, 100 + count, dtype=np.uint32),
        "maximum": np.ones(count, np.float32),
    }


def run(cfg, mesh, steps: int = 2, optimizer: optax.GradientTransformation | None = None):
    optimizer = optimizer or experiment.optimizer(cfg)
    fixed = {
        "model": experiment.model(cfg),
        "task": experiment.task(cfg),
        "normalise_by": cfg.normalise,
        "seed": cfg.seed,
    }
    train_step = step.compile_train(mesh, optimizer=optimizer, **fixed)
    state = jax.device_put(step.init_state(fixed["model"], optimizer, (32, 32), 0), sharding.replicated(mesh))
    losses = []
    for _ in range(steps):
        state, values = train_step(state, jax.device_put(batch(), sharding.by_example(mesh)))
        losses.append(float(values["loss"]))
    return state, losses


def test_a_step_follows_the_gradient_of_the_mean_squared_error_of_normalised_images() -> None:
    cfg = config()
    mesh, data = sharding.make_mesh(), batch()
    state, losses = run(cfg, mesh, steps=1, optimizer=optax.sgd(1.0))
    model = experiment.model(cfg)
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))["params"]
    corrupted, target, *_ = jax.jit(experiment.task(cfg))(data, tasks.training_keys(0, data["index"]))
    low, high = (np.asarray(f(corrupted, axis=(1, 2), keepdims=True)) for f in (np.min, np.max))

    def loss_of(params):
        prediction = model.apply({"params": params}, ((corrupted - low) / (high - low))[..., None])[..., 0]
        return jnp.mean((prediction - (target - low) / (high - low)) ** 2)

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    assert losses[0] == pytest.approx(float(loss), rel=1e-5)
    moved = jax.tree.map(lambda before, after: before - after, params, state.params)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * size), moved, gradient)


def test_the_optimizer_is_adam_with_a_warm_up_and_a_cosine() -> None:
    cfg = config(steps=10, warmup=0.2, learning_rate=0.1)
    optimizer = experiment.optimizer(cfg)
    params, gradient = jnp.zeros(1), jnp.full(1, 3.0)
    state, steps = optimizer.init(params), []
    for _ in range(10):
        update, state = optimizer.update(gradient, state, params)
        steps.append(-float(update[0]))
    # With a constant gradient each of Adam's steps is as long as the learning rate.
    cosine = 0.05 * (1 + np.cos(np.pi * np.arange(8) / 8))
    assert np.allclose(steps, [0, 0.05, *cosine], atol=1e-5)


def test_training_reduces_the_loss_in_both_precisions() -> None:
    for precision in ("float32", "bfloat16"):
        cfg = config(precision=precision, warmup=0.0, model__residual=True)
        state, losses = run(cfg, sharding.make_mesh(), steps=12)
        assert losses[-1] < 0.8 * losses[0], precision
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_the_reconstruction_is_in_the_files_units() -> None:
    cfg = config()
    data = batch() | {"name": np.arange(8, dtype=np.uint32), "slice": np.zeros(8, np.int32)}
    predict = jax.jit(
        functools.partial(
            step.predict,
            mesh=sharding.make_mesh(),
            model=Identity(),
            task=experiment.task(cfg),
            normalise_by="slice",
        )
    )
    images, peak = predict({}, data | {"kspace": 1e-4 * data["kspace"]})
    assert np.allclose(images["reconstruction"], images["corrupted"], rtol=1e-5, atol=1e-9)
    assert np.allclose(images["target"], 1e-4 * rss(coil_images(8, 2, 32, 32)), atol=1e-9)
    assert np.allclose(peak, np.asarray(images["target"]).max((1, 2)))


class Identity:
    needs = ("image",)

    def apply(self, variables, x):
        return x


def test_evaluation_in_batches_gives_the_metrics_of_whole_volumes(scans) -> None:
    from mrjax.data import hdf5, loader, splits

    cfg, mesh = config(), sharding.make_mesh()
    paths = hdf5.find(str(scans))
    volumes = splits.volumes(paths, "kspace", on_bad_file="error", read_all=True)
    fixed = {"model": experiment.model(cfg), "task": experiment.task(cfg), "normalise_by": "slice"}
    params = step.init_state(fixed["model"], experiment.optimizer(cfg), (32, 32), 0).params
    predict, score = step.compile_predict(mesh, **fixed), step.compile_score(mesh)
    source = loader.Slices(volumes, (32, 32), "kspace")
    with loader.evaluation_batches(source, batch_size=8, workers=0, prefetch=2) as batches:
        rows, previews = evaluate(predict, score, params, batches, volumes, mesh)
    assert [row["slices"] for row in rows] == [volume.slices for volume in volumes]
    assert len(previews) == 3
    # The same once more, volume by volume, with all slices of one in a batch of its own.
    for number, row in enumerate(rows):
        examples = [source[i] for i, (volume, _) in enumerate(source.where) if volume == number]
        padded = (examples * 8)[:8]
        images, _ = predict(params, {name: np.stack([x[name] for x in padded]) for name in examples[0]})
        target, image, corrupted = (
            np.asarray(images[name])[: len(examples)] for name in ("target", "reconstruction", "corrupted")
        )
        for method, prediction in (("reconstruction", image), ("corrupted", corrupted)):
            values = metrics.slice_values(target, prediction, target.max())
            expected = metrics.volume_values(values, target.max())
            assert row[method] == pytest.approx(expected, rel=1e-4), method
