"""Combining the images of several receive coils."""

import jax
import jax.numpy as jnp


def root_sum_of_squares(coil_images: jax.Array) -> jax.Array:
    """(..., coils, height, width) complex -> (..., height, width) float32 magnitude (Roemer et al., 1990)."""
    return jnp.sqrt(jnp.sum(coil_images.real**2 + coil_images.imag**2, axis=-3))


def magnitude(kspace: jax.Array) -> jax.Array:
    """(..., coils, height, width) k-space -> root-sum-of-squares of its coils' images, (..., height, width) float32.

    Where k-space has its centre changes nothing but the images' phase, so only their magnitude is shifted into place.
    """
    return jnp.fft.fftshift(root_sum_of_squares(jnp.fft.ifft2(kspace, norm="ortho")), (-2, -1))
