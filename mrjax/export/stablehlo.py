"""A network as a StableHLO program, from what was measured to the magnitude image, that needs only JAX to run.

Normalisation and parameters are inside; any number of slices is taken, and one program runs on CPUs, GPUs and TPUs. It
is what `jax.export.Exported.serialize` makes: `jax.export.deserialize(the_bytes).call(kspace, mask)`.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ml_collections import ConfigDict

from mrjax import train_step
from mrjax.errors import expect
from mrjax.mri.tasks import as_measured
from mrjax.parallel.sharding import AXES
from mrjax.train_step import Recipe

PLATFORMS = ("cpu", "cuda", "tpu")
UNIT = "that of the input"  # of images: an orthonormal Fourier transform keeps it
# One device of no known kind: operations take their plain form, not what is tuned for this machine.
_ANY_DEVICE = AbstractMesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, abstract_device=AbstractDevice("any", 1, "any"))


def write(
    path: Path, recipe: Recipe, params: Any, config: ConfigDict, size: tuple[int, int], coils: int
) -> dict[str, Any]:
    """Write the program for k-space of so many coils, or images, of one size; return what model.json says of it.

    Raises a `UserError` if `flatbuffers` is not installed.
    """
    found = "flatbuffers, by which JAX writes programs, is not installed"
    expect(importlib.util.find_spec("flatbuffers"), found, "pip install 'mrjax[export]'")
    inputs = describe_inputs(config, size, coils)
    recipe = dataclasses.replace(recipe, mesh=_ANY_DEVICE, task=as_measured)  # type: ignore[arg-type]

    def reconstruct(*arrays: jax.Array) -> jax.Array:
        batch = {given["name"]: array for given, array in zip(inputs, arrays, strict=True)}
        slices = arrays[0].shape[:1]
        if "kspace" in batch:
            mask, kspace = batch.pop("mask"), batch["kspace"]
            batch["kspace"] = jnp.where(jnp.expand_dims(mask, tuple(range(1, kspace.ndim - 2))), kspace, 0)
        blank = {"name": jnp.zeros(slices, jnp.uint32), "slice": jnp.zeros(slices, jnp.int32)}
        batch = blank | {"maximum": jnp.zeros(slices, jnp.float32)} | batch
        return train_step.predict(recipe, params, batch)[0]["reconstruction"]

    (batch,) = export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *given["shape"][1:]), given["dtype"]) for given in inputs]
    program = export.export(jax.jit(reconstruct), platforms=PLATFORMS)(*shapes)
    path.write_bytes(program.serialize())
    output = {"name": "image", "shape": ["batch", *size], "dtype": "float32", "unit": UNIT, "meaning": "magnitude"}
    return {"file": path.name, "platforms": PLATFORMS, "inputs": inputs, "outputs": [output]}


def describe_inputs(config: ConfigDict, size: tuple[int, int], coils: int) -> list[dict[str, Any]]:
    """Describe the program's inputs, in order: name, shape (of 'batch' and numbers), dtype, unit and meaning."""
    adjacent, paired = config.data.adjacent_slices, config.task == "paired"
    stack = ["batch", 1 + 2 * adjacent] if adjacent else ["batch"]
    meaning = "magnitude image" if paired else "zero frequency at index n // 2, zeros for coils that are not there"
    meaning += "; along the second axis the slice, those before it, those after it" if adjacent else ""
    measured = "where k-space was measured; what is zero in all coils was not, in any case"
    inputs = [
        ("input", [*stack, *size], "float32", "any", meaning)
        if paired
        else ("kspace", [*stack, coils, *size], "complex64", "any", meaning),
        *([] if paired else [("mask", ["batch", *size], "bool", "none", measured)]),
        *([("maximum", ["batch"], "float32", UNIT, "of the volume")] if config.normalise == "volume" else []),
    ]
    return [dict(zip(("name", "shape", "dtype", "unit", "meaning"), values, strict=True)) for values in inputs]
