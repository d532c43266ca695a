"""The networks by name: a new one is a file here and an entry in `MODELS`.

A network is a Flax module whose `input_names` are the fields of `NetworkInputs` that it is called with, in that order;
its static method `smallest_side(levels)` gives the least height or width it works on. It returns the normalised image,
(batch, height, width, 1) float32.
"""

import dataclasses
from typing import Any, NamedTuple

from jax import Array

from mrjax.errors import UserError
from mrjax.models.unet import UNet
from mrjax.models.unet_dc import ConsistentUNet
from mrjax.models.varnet import VarNet

MODELS: dict[str, Any] = {"unet": UNet, "unet_dc": ConsistentUNet, "varnet": VarNet}


class NetworkInputs(NamedTuple):
    """What a network may ask for."""

    image: Array  # (batch, height, width, channels) float32, normalised: the corrupted slice, then its neighbours
    kspace: Array | None  # (batch, coils, height, width) complex64, 0 where not measured, in units of the image's scale
    mask: Array | None  # (batch, 1 or height, width) bool, where k-space was measured
    offset: Array  # (batch, 1, 1) float32: normalised image = magnitude in the k-space's units - offset


def attribute_names(name: str) -> list[str]:
    """List the attributes of a network of `MODELS`."""
    return [field.name for field in dataclasses.fields(MODELS[name]) if field.name not in ("parent", "name")]


def select_inputs(model: Any, inputs: NetworkInputs) -> list[Array]:
    """Select the inputs that the network is called with. UserError if it needs one that the task does not have."""
    for name in model.input_names:
        if getattr(inputs, name) is None:
            found = f"config.model.name is a network that needs {name}"
            raise UserError(f"{found}, expected config.task = 'kspace' with it")
    return [getattr(inputs, name) for name in model.input_names]
