"""Thermal noise: complex Gaussian, its level by a signal-to-noise ratio, its correlation between coils measured.

Transforms are orthonormal, so noise has the same level in k-space and in fully sampled coil images. `sigma` is the
standard deviation of its real and of its imaginary part, and a coil's variance is 2 * sigma**2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# Of the measured rows and columns on each side: where k-space holds least signal.
_CORNER = 1 / 8


def covariance(kspace: jax.Array) -> jax.Array:
    """The covariance between coils of a measurement's own noise, from the four corners of its k-space.

    Corners of what was measured: rows and columns of zeros, as scanners pad them, are left out, and an eighth of the
    others on each side is taken. Signal that reaches so far out counts as noise.

    Args:
      kspace: (coils, height, width) complex64; coils of nothing but zeros do not disturb the others.

    Returns:
      (coils, coils) complex64, the mean of n_i conj(n_j); zero if nothing was measured.
    """
    measured = jnp.any(kspace != 0, axis=0)
    rows, columns = (_outermost(jnp.any(measured, axis)) for axis in (1, 0))
    corner = rows[:, None] & columns & measured
    noise = jnp.where(corner, kspace, 0).reshape(len(kspace), -1)
    products = jnp.matmul(noise, noise.conj().T, precision=jax.lax.Precision.HIGHEST)
    return products / jnp.maximum(corner.sum(), 1)


def _outermost(measured: jax.Array) -> jax.Array:
    """(size,) bool: the outermost of the measured places on either side."""
    count = measured.sum()
    place = jnp.cumsum(measured) - 1
    depth = jnp.ceil(count * _CORNER)
    return measured & ((place < depth) | (place >= count - depth))


def level(covariance: jax.Array) -> jax.Array:
    """Sigma of noise of a covariance (coils, coils), over the coils that have any."""
    variance = jnp.diagonal(covariance).real
    return jnp.sqrt(variance.sum() / jnp.maximum((variance > 0).sum(), 1) / 2)


def sigma_for(snr: jax.Array, truth: jax.Array) -> jax.Array:
    """Sigma at which the mean signal of a fully sampled root-sum-of-squares image is `snr` times its noise.

    The mean signal weighs each pixel by itself, sum(x**2) / sum(x), so that the air around the head counts little.

    Args:
      snr: scalar, more than 0.
      truth: (height, width) float32.
    """
    return jnp.sum(truth**2) / jnp.maximum(truth.sum(), jnp.finfo(jnp.float32).tiny) / snr


def white(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(coils, height, width) complex64 of variance 1, sigma sqrt(1/2); a coil's is the same beside any others."""
    # A key for each coil: batches hold empty coils where files differ in their number, which must change nothing.
    of_coil = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    places = jnp.arange(math.prod(shape[1:]), dtype=jnp.uint32)

    def one(key: jax.Array) -> jax.Array:
        # Uniform: the middles of 2**23 equal parts of what lies between -1 and 1.
        spread = (((word >> 9).astype(jnp.float32) * 2 + 1) * 2**-23 - 1 for word in threefry(key, places))
        return jax.lax.complex(*map(jax.lax.erf_inv, spread)).reshape(shape[1:])

    return jax.vmap(one)(of_coil)


def threefry(key: jax.Array, counter: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two random words, uint32, for each number of a `counter` (n,) uint32: Threefry-2x32 with 20 rounds.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). It is what jax.random draws from as well;
    written out, its rounds are one pass over memory, where XLA's CPU backend is given loops: a fifth of the time.
    """
    first, second = jax.random.key_data(key)[:2]
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    left, right = jnp.full_like(counter, keys[0]), counter + keys[1]
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            left = left + right
            right = (right << turn | right >> 32 - turn) ^ left
        left, right = left + keys[(block + 1) % 3], right + keys[(block + 2) % 3] + np.uint32(block + 1)
    return left, right


def correlate(noise: jax.Array, covariance: jax.Array) -> jax.Array:
    """Gives white noise the shape of a covariance: its correlations and, with a mean of 1, its variances.

    Args:
      noise: (coils, height, width) complex64, white.
      covariance: (coils, coils) complex64; where it is zero throughout, the noise stays as it is.
    """
    scale = 2 * level(covariance) ** 2
    known = scale > 0
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    # A little of white noise keeps the factor finite for coils that are empty or copies of one another.
    relative = jnp.where(known, covariance / jnp.where(known, scale, 1), identity) + 1e-6 * identity
    return jnp.einsum("ij,jhw->ihw", jnp.linalg.cholesky(relative), noise, precision=jax.lax.Precision.HIGHEST)
