"""The networks by name: a new one is a file here and a line in `MODELS`.

A network is a Flax module whose `needs` names the `Inputs` that it is called with, in that order. It gives the
normalised image, (batch, height, width, 1) float32.
"""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from mrjax.errors import UserError
from mrjax.models.unet import UNet
from mrjax.models.unet_dc import ConsistentUNet
from mrjax.models.varnet import VarNet

MODELS: dict[str, Any] = {
    "unet": UNet,
    "unet_dc": ConsistentUNet,
    "varnet": VarNet,
}


class Inputs(NamedTuple):
    """What networks may ask for.

    Attributes:
      image: (batch, height, width, channels) float32, normalised: the corrupted slice, then its neighbours if any.
      kspace: (batch, coils, height, width) complex64, what was measured, in units of the normalised image's scale.
      mask: (batch, 1 or height, width) bool, where k-space was measured.
      offset: (batch, 1, 1) float32: normalised image = magnitude in the k-space's units - offset.
      canvas: (batch, 2) int32, how much of each image is there, if not all (`sizes.OwnSize`): only for networks that
        need the image alone.
    """

    image: jax.Array
    kspace: jax.Array | None
    mask: jax.Array | None
    offset: jax.Array
    canvas: jax.Array | None = None


def build(name: str, **given: Any) -> nn.Module:
    """The network registered as `name`, with its attributes set: `build("unet", channels=16)`."""
    known = attributes(name)
    for attribute in given:
        if attribute not in known:
            raise UserError(f"config.model.{attribute} is no field of {name!r}, expected {_one_of(known, attribute)}")
    return MODELS[name](**given)


def attributes(name: str) -> list[str]:
    """The names of the attributes that the network registered as `name` has."""
    if name not in MODELS:
        raise UserError(f"config.model.name is {name!r}, expected {_one_of(list(MODELS), name)}")
    return [field.name for field in fields(MODELS[name]) if field.name not in ("parent", "name")]


def _one_of(known: list[str], found: str) -> str:
    nearest = get_close_matches(found, known, n=1)
    return f"one of: {', '.join(known)}" + (f" (nearest: {nearest[0]})" if nearest else "")
