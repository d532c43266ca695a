"""Thermal noise: complex Gaussian, its level set by a signal-to-noise ratio, its correlation between coils measured.

Transforms are orthonormal, so noise has the same level in k-space and in fully sampled coil images. `sigma` is the
standard deviation of its real and of its imaginary part, and a coil's variance is 2 * sigma**2.
"""

import jax
import jax.numpy as jnp

_CORNER = 1 / 8  # of the measured rows and columns on each side, where k-space holds least signal


def covariance(kspace: jax.Array) -> jax.Array:
    """Estimate the noise covariance between coils from the four corners of k-space.

    A corner is an eighth of the measured rows and columns; zeros, as scanners pad them, are left out. Signal that
    reaches so far out counts as noise.

    Args:
      kspace: (coils, height, width) complex64; coils of zeros do not change the others.

    Returns:
      (coils, coils) complex64, the mean of n_i conj(n_j); zero if nothing was measured.
    """
    measured = jnp.any(kspace != 0, axis=0)
    rows, columns = (_outermost(jnp.any(measured, axis)) for axis in (1, 0))
    corner = rows[:, None] & columns & measured
    noise = jnp.where(corner, kspace, 0).reshape(len(kspace), -1)
    return jnp.matmul(noise, noise.conj().T, precision="highest") / jnp.maximum(corner.sum(), 1)


def _outermost(measured: jax.Array) -> jax.Array:
    """Select the outermost of the measured rows or columns on both sides: (size,) bool."""
    count = measured.sum()
    position = jnp.cumsum(measured) - 1
    depth = jnp.ceil(count * _CORNER)
    return measured & ((position < depth) | (position >= count - depth))


def sigma_from_covariance(covariance: jax.Array) -> jax.Array:
    """Compute the root-mean-square sigma of the coils that have noise, from a covariance (coils, coils)."""
    variance = jnp.diagonal(covariance).real
    return jnp.sqrt(variance.sum() / jnp.maximum((variance > 0).sum(), 1) / 2)


def sigma_from_snr(snr: jax.Array, target: jax.Array) -> jax.Array:
    """Compute the sigma at which the mean signal of a fully sampled root-sum-of-squares image is `snr` sigma.

    The mean weights each pixel by itself, sum(x**2) / sum(x), so that the air around the head counts little.

    Args:
      snr: scalar, more than 0.
      target: (height, width) float32.
    """
    return jnp.sum(target**2) / jnp.maximum(target.sum(), jnp.finfo(jnp.float32).tiny) / snr


def white_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw white noise (coils, height, width) complex64 of variance 1.

    Each coil has a key of its own, so that the empty coils which pad a batch change nothing.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:], jnp.complex64))(keys)


def correlate(noise: jax.Array, covariance: jax.Array) -> jax.Array:
    """Give white noise the correlations and, up to a mean of 1, the variances of a covariance.

    Args:
      noise: (coils, height, width) complex64, white.
      covariance: (coils, coils) complex64; where it is zero throughout, the noise stays white.
    """
    scale = 2 * sigma_from_covariance(covariance) ** 2
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    # A little white noise keeps the Cholesky factor finite for coils that are empty or copies of one another.
    relative = jnp.where(scale > 0, covariance / jnp.where(scale > 0, scale, 1), identity) + 1e-6 * identity
    return jnp.einsum("ij,jhw->ihw", jnp.linalg.cholesky(relative), noise, precision="highest")
