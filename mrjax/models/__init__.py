"""The networks, by name: a new one is a file in this folder and a line here."""

from typing import Any

from flax import linen as nn

from mrjax.errors import UserError
from mrjax.models.unet import UNet

MODELS: dict[str, type[nn.Module]] = {"unet": UNet}


def build(name: str, **fields: Any) -> nn.Module:
    """The network that config.model names.

    Raises:
        UserError: no such network.
    """
    if name not in MODELS:
        raise UserError(f"config.model.name is {name!r}, expected one of: {', '.join(MODELS)}")
    return MODELS[name](**fields)
