"""Scaling images by what is known of the corrupted input, to 0..1 or to unit deviation, and its exact inverse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scaling(NamedTuple):
    """normalised = (image - offset) / scale; both (batch, 1, 1) float32 in the image's units."""

    offset: jax.Array
    scale: jax.Array

    def apply(self, image: jax.Array) -> jax.Array:
        """(batch, height, width) in the file's units -> normalised."""
        return (image - self.offset) / self.scale

    def invert(self, image: jax.Array) -> jax.Array:
        """(batch, height, width) normalised -> in the file's units."""
        return image * self.scale + self.offset


def by_slice(corrupted: jax.Array) -> Scaling:
    """Least and greatest value of each corrupted slice (batch, height, width) become 0 and 1."""
    low = corrupted.min((-2, -1), keepdims=True)
    return Scaling(low, _positive(corrupted.max((-2, -1), keepdims=True) - low))


def by_deviation(corrupted: jax.Array) -> Scaling:
    """Mean and standard deviation of each corrupted slice (batch, height, width) become 0 and 1.

    As fastMRI normalises what its U-Net sees (`normalize_instance`, with the sample deviation).
    """
    mean = corrupted.mean((-2, -1), keepdims=True)
    return Scaling(mean, _positive(corrupted.std((-2, -1), keepdims=True, ddof=1)))


def by_volume(maximum: jax.Array) -> Scaling:
    """Zero stays zero and the volume's known maximum (batch,), in the file's units, becomes 1."""
    maximum = maximum[:, None, None]
    return Scaling(jnp.zeros_like(maximum), _positive(maximum))


def _positive(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1.0)
