"""Combining the images of several receive coils."""

import jax
import jax.numpy as jnp


def root_sum_of_squares(coil_images: jax.Array) -> jax.Array:
    """(..., coils, height, width) complex -> (..., height, width) float32 magnitude (Roemer et al., 1990)."""
    return jnp.sqrt(jnp.sum(coil_images.real**2 + coil_images.imag**2, axis=-3))
