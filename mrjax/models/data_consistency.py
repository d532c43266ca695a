"""Data consistency and coil combination, with gradients that are finite where everything is zero.

K-space and coil images are (batch, coils, height, width) complex64.
"""

import jax.numpy as jnp
from jax import Array


def data_consistency(kspace: Array, measured: Array, mask: Array, weight: Array) -> Array:
    """Move k-space towards the measured samples: soft data consistency (Sriram et al., arXiv:2004.06688).

    The mask, (batch, 1 or height, width) bool, says where there are measurements; the weight (1,) is the share of the
    difference that is taken away: 1 replaces the samples.
    """
    return kspace - jnp.where(mask[:, None], kspace - measured, 0) * weight


def root_sum_of_squares(coil_images: Array) -> Array:
    """Combine coil images to (batch, height, width) float32."""
    power = jnp.sum(coil_images.real**2 + coil_images.imag**2, 1)
    positive = power > 0
    # The square root's gradient is infinite at 0; here it is 0.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, power, 1)), 0)


def normalise_by_rss(coil_images: Array) -> Array:
    """Divide coil images by their root-sum-of-squares; 0 where all are 0."""
    rss = root_sum_of_squares(coil_images)[:, None]
    return coil_images / jnp.where(rss > 0, rss, 1)
