"""A head that moves while it is scanned: rigid rotation and translation, applied to k-space by phases.

Readouts run along the height, one phase-encode column after the other from left to right, each taking the whole time
to the next: motion goes on between the readouts and within them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Stretches of a scan; each costs a rotation of all coils.
_STRETCHES = 8


class Motion(NamedTuple):
    """Where the head lies during a scan that lasts from time 0 to 1.

    Attributes:
      times: (stretches + 1,) float32, where stretches end, from 0 to 1.
      angles: (stretches,) float32 in degrees, held for a stretch; from rows towards columns, as
        `scipy.ndimage.rotate` turns, about pixel n // 2.
      shifts: (stretches + 1, 2) float32 in pixels along (height, width), at `times`, linear in between.
    """

    times: jax.Array
    angles: jax.Array
    shifts: jax.Array

    def shift_at(self, time: jax.Array) -> jax.Array:
        """(2, ...) shifts in pixels at times (...)."""
        return jnp.stack([jnp.interp(time, self.times, shift) for shift in self.shifts.T])

    def stretch_at(self, time: jax.Array) -> jax.Array:
        """Numbers of the stretches at times (...)."""
        return jnp.searchsorted(self.times[1:-1], time, side="right", method="compare_all")


def draw(key: jax.Array, degrees: float, pixels: tuple[float, float], truth_at: jax.Array) -> Motion:
    """A random walk of the head, its turns at random moments.

    Args:
      key: PRNG key.
      degrees: the largest rotation from one stretch to the next, either way.
      pixels: likewise of the shift along (height, width).
      truth_at: scalar in 0..1, when the head lies as the truth shows it: as k-space passes its middle, which says
        where in the image the head is.
    """
    when, how = jax.random.split(key)
    times = jnp.sort(jnp.concatenate([jnp.asarray([0.0, 1.0]), jax.random.uniform(when, (_STRETCHES - 1,))]))
    steps = jax.random.uniform(how, (_STRETCHES + 1, 3), minval=-1, maxval=1) * jnp.asarray([degrees, *pixels])
    path = jnp.cumsum(steps, 0)
    motion = Motion(times, path[1:, 0], path[:, 1:])
    angle = motion.angles[motion.stretch_at(truth_at)]
    return motion._replace(angles=motion.angles - angle, shifts=motion.shifts - motion.shift_at(truth_at))


def move(kspace: jax.Array, motion: Motion) -> jax.Array:
    """K-space of a head that moved during the scan; what the coils see of it moves along, sensitivities included.

    Args:
      kspace: (coils, height, width) complex64, centred, of the head at rest.
      motion: of the head.

    Returns:
      (coils, height, width) complex64.
    """
    height, width = kspace.shape[-2:]
    time = (jnp.arange(width) + jnp.arange(height)[:, None] / height) / width
    stretch = motion.stretch_at(time)

    def turn(turned: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        return jnp.where(stretch == number, rotate(kspace, motion.angles[number]), turned), None

    turned, _ = jax.lax.scan(turn, kspace, jnp.arange(len(motion.angles)))
    down, right = motion.shift_at(time)
    return turned * _phase(_frequencies(height)[:, None] * down + _frequencies(width) * right)


def rotate(kspace: jax.Array, angle: jax.Array) -> jax.Array:
    """K-space (..., height, width) of an image turned by `angle` degrees: three shears, each a phase.

    Unser et al., IEEE TIP 4(10), 1995. Exact for what is band-limited and stays inside the image; pixels are square.
    """
    height, width = kspace.shape[-2:]
    radians = jnp.deg2rad(angle)
    y, x = (jnp.arange(n) - n // 2 for n in (height, width))
    along = _phase(jnp.tan(radians / 2) * y[:, None] * _frequencies(width))
    across = _phase(-jnp.sin(radians) * x * _frequencies(height)[:, None])
    once = _to_image(kspace, -2) * along
    twice = _to_image(_to_kspace(once, -2), -1) * across
    return _to_kspace(_to_image(_to_kspace(twice, -1), -2) * along, -2)


def _frequencies(size: int) -> jax.Array:
    """Of centred k-space samples, in cycles per pixel."""
    return (jnp.arange(size) - size // 2) / size


def _phase(cycles: jax.Array) -> jax.Array:
    return jnp.exp(-2j * jnp.pi * cycles)


def _to_kspace(x: jax.Array, axis: int) -> jax.Array:
    return jnp.fft.fftshift(jnp.fft.fft(jnp.fft.ifftshift(x, axis), axis=axis), axis)


def _to_image(x: jax.Array, axis: int) -> jax.Array:
    return jnp.fft.fftshift(jnp.fft.ifft(jnp.fft.ifftshift(x, axis), axis=axis), axis)
