"""From a ground truth to what a scanner with less time would have measured."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mrjax.mri import masks, motion, noise


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """How an accelerated scan is simulated.

    Attributes:
      accelerations: one of these is drawn.
      centre_fractions: of the sampled columns, for each acceleration.
      noise: (low, high), drawn uniformly: standard deviation of the real and of the imaginary part of the noise added
        to every coil, as a fraction of the ground truth's maximum.
      mask: one of `masks.LINES` and `masks.SAMPLES`, or `masks.STORED`.
      snr: (low, high), drawn uniformly: the noise instead as a signal-to-noise ratio (`noise.sigma_for`) of the fully
        sampled image; empty: by `noise`.
      noise_covariance: between coils: 'white', or 'measured' in the corners of the example's own k-space.
      motion_p: probability that the head moves.
      motion_rotation: degrees that it turns at most from one pose to the next.
      motion_translation: likewise, fraction of height and width that it shifts.
    """

    accelerations: tuple[float, ...]
    centre_fractions: tuple[float, ...]
    noise: tuple[float, ...]
    mask: str = "random"
    snr: tuple[float, ...] = ()
    noise_covariance: str = "white"
    motion_p: float = 0.0
    motion_rotation: float = 0.0
    motion_translation: float = 0.0


def undersample(
    kspace: jax.Array,
    sampled: jax.Array,
    truth: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    how: Acquisition,
    echo: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Moves the head of one slice, adds complex Gaussian noise to its k-space, and keeps the samples of a mask.

    Args:
      kspace: (coils, height, width) complex64.
      sampled: (width,) bool, the columns the scanner measured.
      truth: (height, width) float32, the ground truth, which says how strong the noise is.
      keys: two PRNG keys: one for the mask, the motion and the noise level, one for the noise itself.
      how: what to draw from.
      echo: row and column that masks are centred on, by default what `find_echo` finds.

    Returns:
      (coils, height, width) complex64, zero where nothing was measured; and the mask (1 or height, width) bool.
    """
    protocol, samples = keys
    choose, places, level = jax.random.split(protocol, 3)
    choice = jax.random.randint(choose, (), 0, len(how.accelerations))
    accelerations, fractions = jnp.asarray(how.accelerations), jnp.asarray(how.centre_fractions)
    height, width = kspace.shape[-2:]
    echo = echo or find_echo(kspace)
    mask = masks.draw(places, how.mask, sampled, height, accelerations[choice], fractions[choice], echo)
    measured = kspace
    if how.motion_p > 0:
        # Not one of the three keys above, which `split` makes as `fold_in` of 0, 1 and 2 would.
        chance, walk = jax.random.split(jax.random.fold_in(protocol, 3))
        pixels = (how.motion_translation * height, how.motion_translation * width)
        moved = motion.move(kspace, motion.draw(walk, how.motion_rotation, pixels, (echo[1] + 0.5) / width))
        measured = jnp.where(jax.random.uniform(chance) < how.motion_p, moved, kspace)
    if how.snr or how.noise[1] > 0:
        low, high = how.snr or how.noise
        drawn = jax.random.uniform(level, (), minval=low, maxval=high)
        sigma = noise.sigma_for(drawn, truth) if how.snr else truth.max() * drawn
        added = noise.white(samples, kspace.shape)
        if how.noise_covariance == "measured":
            added = noise.correlate(added, noise.covariance(kspace))
        present = jnp.any(kspace != 0, axis=(-2, -1), keepdims=True)
        measured = measured + jnp.where(present, math.sqrt(2) * sigma * added, 0)
    return jnp.where(mask, measured, 0), mask


def find_echo(kspace: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of the echo: where the energy of k-space, smoothed, is greatest.

    It is looked for within an eighth of the size around the centre, and must be twice as strong there as in the centre
    itself: for slices of noise, and for echoes one sample away, the answer is the centre, (height // 2, width // 2).

    Args:
      kspace: (coils, height, width) complex64 of at least five rows and columns.

    Returns:
      Two int32 scalars.
    """
    centre, reach = [n // 2 for n in kspace.shape[-2:]], [n // 8 for n in kspace.shape[-2:]]
    rows, columns = (slice(c - r - 2, c + r + 3) for c, r in zip(centre, reach, strict=True))
    near = kspace[:, rows, columns]
    binomial = jnp.asarray([1.0, 4.0, 6.0, 4.0, 1.0])
    energy = jax.scipy.signal.convolve2d(
        jnp.sum(near.real**2 + near.imag**2, 0), jnp.outer(binomial, binomial), "valid", precision="highest"
    )
    row, column = jnp.unravel_index(jnp.argmax(energy), energy.shape)
    away = energy.max() > 2 * energy[reach[0], reach[1]]
    return centre[0] + jnp.where(away, row - reach[0], 0), centre[1] + jnp.where(away, column - reach[1], 0)
