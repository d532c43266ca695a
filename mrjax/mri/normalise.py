"""Normalise images by statistics of the corrupted input.

`corrupted` is (batch, height, width) float32; `maximum` is (batch,) float32, that of each slice's volume.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scaling(NamedTuple):
    """normalised = (image - offset) / scale; both (batch, 1, 1) float32 in the image's units."""

    offset: jax.Array
    scale: jax.Array

    def apply(self, image: jax.Array) -> jax.Array:
        """Normalise images (batch, height, width)."""
        return (image - self.offset) / self.scale

    def invert(self, image: jax.Array) -> jax.Array:
        """Bring normalised images (batch, height, width) back to the file's units."""
        return image * self.scale + self.offset


def scale_by_slice(corrupted: jax.Array, maximum: jax.Array) -> Scaling:
    """Map the minimum and maximum of each corrupted slice to 0 and 1."""
    low = corrupted.min((-2, -1), keepdims=True)
    return _scaling(low, corrupted.max((-2, -1), keepdims=True) - low)


def scale_by_volume(corrupted: jax.Array, maximum: jax.Array) -> Scaling:
    """Map 0 and the maximum of the volume to 0 and 1."""
    maximum = maximum[:, None, None]
    return _scaling(jnp.zeros_like(maximum), maximum)


def standardise(corrupted: jax.Array, maximum: jax.Array) -> Scaling:
    """Map the mean and standard deviation of each corrupted slice to 0 and 1, as fastMRI's `normalize_instance`."""
    return _scaling(corrupted.mean((-2, -1), keepdims=True), corrupted.std((-2, -1), keepdims=True, ddof=1))


def _scaling(offset: jax.Array, scale: jax.Array) -> Scaling:
    return Scaling(offset, jnp.where(scale > 0, scale, 1.0))


NORMALISATIONS = {"slice": scale_by_slice, "volume": scale_by_volume, "standard": standardise}
