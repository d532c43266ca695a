"""Simulate an accelerated acquisition: draw its protocol once for a slice, then measure k-space by it."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mrjax.mri import masks, noise
from mrjax.mri.motion import Motion, draw_walk, move


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """The distribution that protocols are drawn from; `noise` and `snr` are (low, high), drawn uniformly."""

    accelerations: tuple[float, ...]  # one of these is drawn
    centre_fractions: tuple[float, ...]  # of the sampled columns, one for each acceleration
    noise: tuple[float, ...]  # sigma in every coil (see `mri.noise`), as a fraction of the target's maximum
    mask: str = "random"  # a name in `masks.MASKS`
    snr: tuple[float, ...] = ()  # mean signal of the target over sigma, used instead of `noise` if any
    noise_covariance: str = "white"  # between coils; or 'measured' in the corners of the example's own k-space
    motion_p: float = 0.0  # probability that the head moves
    motion_rotation: float = 0.0  # largest from one pose to the next, in degrees
    motion_translation: float = 0.0  # likewise, as a fraction of height and width


class Protocol(NamedTuple):
    """What a slice and its adjacent slices are measured with."""

    mask: jax.Array  # (1 or height, width) bool, the samples kept
    sigma: jax.Array | None  # scalar, of the noise (see `mri.noise`); None: no noise is added
    motion: Motion | None = None  # None: the head never moves
    moves: jax.Array | bool = False  # scalar, whether it moves this time


def draw_protocol(
    key: jax.Array, kspace: jax.Array, sampled: jax.Array, target: jax.Array, acquisition: Acquisition
) -> Protocol:
    """Draw the mask, the noise level and the motion for fully sampled `kspace` (coils, height, width) complex64.

    `sampled` (width,) bool are the columns the scanner measured; the noise is relative to `target` (height, width).
    """
    acceleration_key, mask_key, noise_key = jax.random.split(key, 3)
    choice = jax.random.randint(acceleration_key, (), 0, len(acquisition.accelerations))
    acceleration, centre_fraction = jnp.asarray((acquisition.accelerations, acquisition.centre_fractions))[:, choice]
    height, width = kspace.shape[-2:]
    echo = find_echo(kspace)
    mask = masks.MASKS[acquisition.mask](mask_key, masks.Scan(sampled, height, acceleration, centre_fraction, echo))
    low, high = acquisition.snr or acquisition.noise
    sigma = None
    if high > 0:
        level = jax.random.uniform(noise_key, (), minval=low, maxval=high)
        # The mean weights each pixel by itself, so that the air around the head counts little.
        signal = jnp.sum(target**2) / jnp.maximum(target.sum(), jnp.finfo(jnp.float32).tiny)
        sigma = signal / level if acquisition.snr else target.max() * level
    if acquisition.motion_p <= 0:
        return Protocol(mask, sigma)
    # `split` made the three keys above as fold_in of 0, 1 and 2 would.
    moves_key, walk_key = jax.random.split(jax.random.fold_in(key, 3))
    pixels = (acquisition.motion_translation * height, acquisition.motion_translation * width)
    walk = draw_walk(walk_key, acquisition.motion_rotation, pixels, (echo[1] + 0.5) / width)
    return Protocol(mask, sigma, walk, jax.random.uniform(moves_key) < acquisition.motion_p)


def measure(
    key: jax.Array, kspace: jax.Array, present: jax.Array, protocol: Protocol, acquisition: Acquisition
) -> jax.Array:
    """Measure a slice: move the head, add complex Gaussian noise by `key`, apply the mask.

    `kspace` (coils, height, width) complex64 is fully sampled, and `present` (coils,) bool are the coils that are not
    empty. The result is zero where nothing was measured.
    """
    measured = kspace
    if protocol.motion is not None:
        measured = jnp.where(protocol.moves, move(kspace, protocol.motion), kspace)
    if protocol.sigma is not None:
        added = noise.white_noise(key, kspace.shape)
        if acquisition.noise_covariance == "measured":
            added = noise.correlate(added, noise.covariance(kspace))
        measured = measured + jnp.where(present[:, None, None], math.sqrt(2) * protocol.sigma * added, 0)
    return jnp.where(protocol.mask, measured, 0)


def find_echo(kspace: jax.Array) -> jax.Array:
    """Find the echo: the (row, column), int32, where the smoothed energy of (coils, height, width) is greatest.

    The search covers an eighth of the size around the centre. The peak counts only if it is twice as strong as the
    centre: slices of noise, and echoes one sample away, give the centre, (height // 2, width // 2).
    """
    centre, reach = np.array(kspace.shape[-2:]) // 2, np.array(kspace.shape[-2:]) // 8
    rows, columns = map(slice, centre - reach - 2, centre + reach + 3)
    searched = kspace[:, rows, columns]
    binomial = jnp.asarray([1.0, 4.0, 6.0, 4.0, 1.0])
    energy = jax.scipy.signal.convolve2d(
        jnp.sum(searched.real**2 + searched.imag**2, 0), jnp.outer(binomial, binomial), "valid", precision="highest"
    )
    peak = jnp.stack(jnp.unravel_index(jnp.argmax(energy), energy.shape))
    return jnp.where(energy.max() > 2 * energy[*reach], peak - reach, 0) + centre
