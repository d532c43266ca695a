"""The networks by name: a new one is a file here and a line in `MODELS`.

A network is a Flax module whose `input_names` are the fields of `NetworkInputs` that it is called with, in that order;
its static method `smallest_side(levels)` gives the least height or width it works on. It returns the normalised image,
(batch, height, width, 1) float32.
"""

import dataclasses
from difflib import get_close_matches
from typing import Any, NamedTuple

from flax import linen as nn
from jax import Array

from mrjax.errors import UserError
from mrjax.models.unet import UNet
from mrjax.models.unet_dc import ConsistentUNet
from mrjax.models.varnet import VarNet

MODELS: dict[str, Any] = {
    "unet": UNet,
    "unet_dc": ConsistentUNet,
    "varnet": VarNet,
}


class NetworkInputs(NamedTuple):
    """What a network may ask for.

    Attributes:
      image: (batch, height, width, channels) float32, normalised: the corrupted slice, then its neighbours if any.
      kspace: (batch, coils, height, width) complex64, measured, zero elsewhere, in units of the image's scale.
      mask: (batch, 1 or height, width) bool, where k-space was measured.
      offset: (batch, 1, 1) float32: normalised image = magnitude in the k-space's units - offset.
    """

    image: Array
    kspace: Array | None
    mask: Array | None
    offset: Array


def build(name: str, **attributes: Any) -> nn.Module:
    """Build the network registered as `name`, with its attributes set: `build("unet", channels=16)`.

    Raises:
      UserError: there is no such network, or it has no such attribute.
    """
    known = attribute_names(name)
    for attribute in attributes:
        if attribute not in known:
            raise UserError(f"config.model.{attribute} is no field of {name!r}, expected {_one_of(known, attribute)}")
    return MODELS[name](**attributes)


def attribute_names(name: str) -> list[str]:
    """List the attributes of the network registered as `name`.

    Raises:
      UserError: there is no such network.
    """
    if name not in MODELS:
        raise UserError(f"config.model.name is {name!r}, expected {_one_of(list(MODELS), name)}")
    return [field.name for field in dataclasses.fields(MODELS[name]) if field.name not in ("parent", "name")]


def select_inputs(model: Any, inputs: NetworkInputs) -> list[Array]:
    """Select the inputs that the network is called with.

    Raises:
      UserError: it needs k-space, and the task has images only.
    """
    for name in model.input_names:
        if getattr(inputs, name) is None:
            raise UserError(
                f"config.model.name is a network that needs {name}, expected config.task = 'kspace' with it"
            )
    return [getattr(inputs, name) for name in model.input_names]


def _one_of(known: list[str], found: str) -> str:
    nearest = get_close_matches(found, known, n=1)
    return f"one of: {', '.join(known)}" + (f" (nearest: {nearest[0]})" if nearest else "")
