"""Rigid motion of the head during a scan: rotation and translation of k-space.

Readouts run along the height, one phase-encode column after the other from left to right, and each takes all of the
time until the next: motion goes on between the readouts and within them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_SEGMENTS = 8  # of a scan, each with one rotation angle, which costs a rotation of all coils


class Motion(NamedTuple):
    """Pose of the head from time 0 to 1 of a scan; it turns about pixel n // 2 as `scipy.ndimage.rotate` does."""

    times: jax.Array  # (segments + 1,) float32, where segments begin and end
    angles: jax.Array  # (segments,) float32 in degrees, constant in a segment
    shifts: jax.Array  # (segments + 1, 2) float32 in pixels along (height, width), at `times`, linear in between

    def pose(self, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Find the numbers of the segments (...) and the shifts (2, ...) in pixels at times (...)."""
        segments = jnp.searchsorted(self.times[1:-1], time, side="right", method="compare_all")
        return segments, jnp.stack([jnp.interp(time, self.times, shift) for shift in self.shifts.T])


def draw_walk(key: jax.Array, degrees: float, pixels: tuple[float, float], rest_time: jax.Array) -> Motion:
    """Draw a random walk of the head, in segments of random length.

    `degrees` and `pixels` (height, width) are the largest steps between segments, either way. At `rest_time`, a scalar
    in 0..1, the head lies as in the target: the time of the echo, which carries most of the image.
    """
    times_key, steps_key = jax.random.split(key)
    times = jnp.sort(jnp.concatenate([jnp.asarray([0.0, 1.0]), jax.random.uniform(times_key, (_SEGMENTS - 1,))]))
    steps = jax.random.uniform(steps_key, (_SEGMENTS + 1, 3), minval=-1, maxval=1) * jnp.asarray([degrees, *pixels])
    path = jnp.cumsum(steps, 0)
    walk = Motion(times, angles=path[1:, 0], shifts=path[:, 1:])
    segment, shift = walk.pose(rest_time)
    return Motion(times, walk.angles - walk.angles[segment], walk.shifts - shift)


def move(kspace: jax.Array, motion: Motion) -> jax.Array:
    """Move the head at rest of centred k-space (coils, height, width) complex64; sensitivities move with it."""
    height, width = kspace.shape[-2:]
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    segments, (down, right) = motion.pose((column + row / height) / width)

    def rotate_segment(rotated: jax.Array, segment: jax.Array) -> tuple[jax.Array, None]:
        return jnp.where(segments == segment, rotate(kspace, motion.angles[segment]), rotated), None

    rotated, _ = jax.lax.scan(rotate_segment, kspace, jnp.arange(len(motion.angles)))
    cycles = (row - height // 2) / height * down + (column - width // 2) / width * right
    return rotated * jnp.exp(-2j * jnp.pi * cycles)


def rotate(kspace: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotate the image of k-space (..., height, width) by `angle` degrees: three shears, each a phase in cycles.

    Unser et al., IEEE TIP 4(10), 1995. Exact for band-limited images whose object stays inside; pixels are square.
    """
    height, width = kspace.shape[-2:]
    radians = jnp.deg2rad(angle)
    y, x = (jnp.fft.ifftshift(jnp.arange(n) - n // 2) for n in (height, width))  # in the order of an FFT
    row_shear = jnp.tan(radians / 2) * y[:, None] * jnp.fft.fftfreq(width)
    column_shear = -jnp.sin(radians) * x * jnp.fft.fftfreq(height)[:, None]
    rotated = jnp.fft.ifftshift(kspace, (-2, -1))
    for axis, cycles in ((-2, row_shear), (-1, column_shear), (-2, row_shear)):
        rotated = jnp.fft.fft(jnp.fft.ifft(rotated, axis=axis) * jnp.exp(-2j * jnp.pi * cycles), axis=axis)
    return jnp.fft.fftshift(rotated, (-2, -1))
