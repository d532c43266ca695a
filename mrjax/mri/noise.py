"""Thermal noise: complex Gaussian, white or with the correlation between coils that was measured.

Transforms are orthonormal, so noise has the same level in k-space and in fully sampled coil images. `sigma` is the
standard deviation of its real and of its imaginary part, and a coil's variance is 2 * sigma**2.
"""

import math

import jax
import jax.numpy as jnp


def covariance(kspace: jax.Array) -> jax.Array:
    """Estimate the noise covariance (coils, coils) complex64 in the four corners of k-space (coils, height, width).

    It is the mean of n_i conj(n_j), zero if nothing was measured. A corner is an eighth of the measured rows and
    columns; zeros, as scanners pad them, are left out. Signal that reaches so far out counts as noise.
    """
    measured = jnp.any(kspace != 0, axis=0)
    rows, columns = (_outermost(jnp.any(measured, axis)) for axis in (1, 0))
    corner = rows[:, None] & columns & measured
    noise = jnp.where(corner, kspace, 0).reshape(len(kspace), -1)
    return jnp.matmul(noise, noise.conj().T, precision="highest") / jnp.maximum(corner.sum(), 1)


def _outermost(measured: jax.Array) -> jax.Array:
    """Select the outermost eighth of the measured rows or columns on both sides: (size,) bool."""
    count, position = measured.sum(), jnp.cumsum(measured) - 1
    depth = jnp.ceil(count / 8)
    return measured & ((position < depth) | (position >= count - depth))


def estimate_sigma(kspace: jax.Array, mask: jax.Array) -> jax.Array:
    """Estimate sigma, a scalar, from the tenth of the measured samples that is farthest from the centre of k-space.

    Noise there has magnitudes of the Rayleigh distribution, whose median is sigma * sqrt(2 ln 2); a median passes over
    the few samples that hold signal, as that of wavelet coefficients does (Donoho and Johnstone, Biometrika 81 (1994)
    425). `kspace` is (coils, height, width) complex64, `mask` (1 or height, width) bool.
    """
    y, x = (jnp.linspace(-0.5, 0.5, size) for size in kspace.shape[1:])
    radius = jnp.where(mask & jnp.any(kspace != 0, axis=0), jnp.hypot(y[:, None], x), jnp.nan)
    outer = radius >= jnp.nanquantile(radius, 0.9)
    median = jnp.nanmedian(jnp.where(outer & (kspace != 0), abs(kspace), jnp.nan))
    return jnp.nan_to_num(median) / math.sqrt(2 * math.log(2))


def white_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw white noise (coils, height, width) complex64 of variance 1; padding with empty coils leaves the others."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:], jnp.complex64))(keys)


def correlate(noise: jax.Array, covariance: jax.Array) -> jax.Array:
    """Give white noise the correlations and, up to a mean of 1, the variances of a covariance (coils, coils).

    Noise (coils, height, width) complex64 stays white if the covariance is zero throughout.
    """
    variance = jnp.diagonal(covariance).real
    scale = variance.sum() / jnp.maximum((variance > 0).sum(), 1)
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    # A little white noise keeps the Cholesky factor finite for coils that are empty or copies of one another.
    relative = jnp.where(scale > 0, covariance / jnp.where(scale > 0, scale, 1), identity) + 1e-6 * identity
    return jnp.einsum("ij,jhw->ihw", jnp.linalg.cholesky(relative), noise, precision="highest")
