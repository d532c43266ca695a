"""What networks that know of k-space share: the measured samples, and magnitudes whose gradient has no NaN."""

import jax.numpy as jnp
from jax import Array


def towards_measured(kspace: Array, measured: Array, mask: Array, weight: Array) -> Array:
    """Soft data consistency: `kspace`, moved towards what was measured by the share `weight` of their difference.

    Args:
      kspace, measured: (batch, coils, height, width) complex64.
      mask: (batch, 1 or height, width) bool, where there are measurements.
      weight: (1,) float32.
    """
    return kspace - jnp.where(mask[:, None], kspace - measured, 0) * weight


def root_sum_of_squares(coil_images: Array) -> Array:
    """(batch, coils, height, width) complex64 to (batch, height, width) float32; its gradient is 0 at 0."""
    power = jnp.sum(coil_images.real**2 + coil_images.imag**2, 1)
    some = power > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, power, 1)), 0)


def per_root_sum_of_squares(coil_images: Array) -> Array:
    """Coil images, (batch, coils, height, width) complex64, over their root-sum-of-squares; 0 where all are 0."""
    rss = root_sum_of_squares(coil_images)[:, None]
    return coil_images / jnp.where(rss > 0, rss, 1)
