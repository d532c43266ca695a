"""The networks by name: a new one is a file here and a line in `MODELS`."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from flax import linen as nn

from mrjax.errors import UserError
from mrjax.models.unet import UNet

MODELS = {"unet": UNet}


def build(name: str, **attributes: Any) -> nn.Module:
    """The network registered as `name`, with its attributes set: `build("unet", channels=16)`."""
    if name not in MODELS:
        raise UserError(f"config.model.name is {name!r}, expected {_one_of(list(MODELS), name)}")
    model = MODELS[name]
    known = [field.name for field in fields(model) if field.name not in ("parent", "name")]
    for attribute in attributes:
        if attribute not in known:
            raise UserError(f"config.model.{attribute} is no field of {name!r}, expected {_one_of(known, attribute)}")
    return model(**attributes)


def _one_of(known: list[str], found: str) -> str:
    nearest = get_close_matches(found, known, n=1)
    return f"one of: {', '.join(known)}" + (f" (nearest: {nearest[0]})" if nearest else "")
