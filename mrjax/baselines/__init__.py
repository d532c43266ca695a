"""The methods that need no training by name: a new one is a file here and an entry in `METHODS`.

A method is a module without parameters, called as a network is (see `mrjax.models`).
"""

from typing import ClassVar

from flax import linen as nn
from jax import Array

from mrjax.baselines.compressed_sensing import CompressedSensing
from mrjax.baselines.sense import Sense


class ZeroFilling(nn.Module):
    """Take the samples that were not measured for zero."""

    input_names: ClassVar[tuple[str, ...]] = ("image",)

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """Return the corrupted image, (batch, height, width, 1), unchanged."""
        return image


METHODS: dict[str, type[nn.Module]] = {"zero_filled": ZeroFilling, "sense": Sense, "cs": CompressedSensing}
