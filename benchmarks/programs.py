"""Build what the benchmarks time: configs, compiled training and inference steps, synthetic batches."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped
from ml_collections import ConfigDict

from mrjax import experiment, train_step
from mrjax.config import check, defaults
from mrjax.data import splits
from mrjax.mri.augment import Augment
from mrjax.mri.tasks import as_measured
from mrjax.parallel import sharding

Batch = dict[str, Any]


def unet_config(*, size: int, channels: int, levels: int, batch: int, precision: str = "float32") -> ConfigDict:
    """Return the default config with a U-Net of this size on square images."""
    config = defaults()
    config.batch_size, config.precision = batch, precision
    config.model.channels, config.model.levels = channels, levels
    config.data.image_size = (size, size)
    check(config)
    experiment.mesh_shape(config, jax.device_count())
    return config


def disable_augmentation(config: ConfigDict) -> None:
    """Set the probability of every augmentation to zero."""
    config.augment.update({name: 0.0 for name in vars(Augment()) if name.endswith("_p")})


def jit_train_step(config: ConfigDict, mesh: Mesh) -> Wrapped:
    """Return the jitted `(state, batch) -> (state, metrics)` of a config."""
    return train_step.jit_train_step(experiment.make_recipe(config, mesh))


def compile_train_step(
    config: ConfigDict, mesh: Mesh, batch: Batch, options: dict[str, Any] | None = None
) -> tuple[Compiled, int]:
    """Compile the training step for a batch of arrays or their shapes.

    Returns:
      The compiled step, and the FLOPs of its convolutions and matrix products over all devices.
    """
    traced = jit_train_step(config, mesh).trace(abstract_state(config, mesh), batch)
    return traced.lower().compile(compiler_options=options), count_flops(traced.jaxpr.jaxpr)


def abstract_state(config: ConfigDict, mesh: Mesh) -> train_step.TrainState:
    """Return shapes and shardings of the initial state."""
    return experiment.abstract_state(config, experiment.make_recipe(config, mesh))


def initial_state(config: ConfigDict, mesh: Mesh) -> train_step.TrainState:
    """Initialise parameters and optimizer, replicated on every device."""
    initialise = functools.partial(experiment.initial_state, config, experiment.make_recipe(config, mesh))
    return jax.jit(initialise, out_shardings=sharding.replicated(mesh))()


def jit_reconstruct(config: ConfigDict, mesh: Mesh) -> Wrapped:
    """Return the jitted `(params, batch) -> (images, peaks)` that reconstructs a batch as it was measured."""
    return train_step.jit_predict(dataclasses.replace(experiment.make_recipe(config, mesh), task=as_measured))


def abstract_batch(config: ConfigDict, mesh: Mesh, coils: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes of a global training batch of config.task, sharded by example."""
    size, split = tuple(config.data.image_size), sharding.by_example(mesh)
    slices = (1 + 2 * config.data.adjacent_slices,) if config.data.adjacent_slices else ()
    images: dict[str, Any] = {"kspace": ((*slices, coils, *size), jnp.complex64)}
    if config.task == "paired":
        images = {"input": ((*slices, *size), jnp.float32), "target": (size, jnp.float32)}
    elif config.task in splits.REPETITION_TASKS:
        images["repetitions"] = ((2, coils, *size), jnp.complex64)  # the others of the three of M4Raw's T1 and T2
    shapes = images | {"index": ((), jnp.uint32), "maximum": ((), jnp.float32)}
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=split)
        for name, (shape, dtype) in shapes.items()
    }


def training_batch(images: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Put arrays of (batch, ...) on the devices as a training batch."""
    index = np.arange(len(next(iter(images.values()))), dtype=np.uint32)
    return jax.device_put(images | {"index": index, "maximum": _ones(index)}, sharding.by_example(mesh))


def evaluation_batch(images: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Put arrays of (batch, ...) on the devices as the slices of one volume."""
    number = np.arange(len(next(iter(images.values()))), dtype=np.uint32)
    volume = {"name": np.zeros_like(number), "slice": number, "maximum": _ones(number)}
    return jax.device_put(images | volume, sharding.by_example(mesh))


def random_kspace(*shape: int) -> np.ndarray:
    """Draw complex64 noise; the time of a step does not depend on what its k-space shows."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def count_flops(jaxpr: Any) -> int:
    """Count floating-point operations of convolutions and matrix products, over all devices and loop iterations."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * inner
        elif name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[out]
        elif name == "ffi_call" and params["target_name"].startswith("mrjax_"):
            kernel = (equation.outvars if params["target_name"] == "mrjax_filter_gradient" else equation.invars[1:])[0]
            total += 2 * math.prod(equation.invars[0].aval.shape[:3]) * kernel.aval.size
        nested = [count_flops(getattr(inner, "jaxpr", inner)) for inner in jaxprs_in_params(params)]
        times = params["mesh"].size if name == "shard_map" else params.get("length", 1)
        total += max(nested, default=0) if name == "cond" else sum(nested) * times
    return total


def _ones(index: np.ndarray) -> np.ndarray:
    return np.ones(len(index), np.float32)
