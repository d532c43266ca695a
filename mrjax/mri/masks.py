"""Sampling masks of k-space: whole phase-encode columns, or single samples of both directions.

A mask is a function `(key, scan) -> bool (1 or height, width)` with an entry in `MASKS`. Only columns that hold data
count: one in `acceleration` of their samples is kept, and `centre_fraction` of them form the fully sampled centre,
which lies about the echo.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_LARGEST_SPACING = 12  # of Poisson discs, in samples


class Scan(NamedTuple):
    """The scan that a mask is drawn for."""

    sampled: jax.Array  # (width,) bool, the columns that hold data
    height: int  # of k-space, in samples
    acceleration: jax.Array  # scalar, at least 1; 'equispaced' and 'magic' round it to an integer
    centre_fraction: jax.Array  # scalar from 0 to 1 / acceleration, the share of columns, or of samples, in the centre
    echo: jax.Array  # (row, column) of the centre of k-space, integers


def random_columns(key: jax.Array, scan: Scan) -> jax.Array:
    """Draw a random Cartesian mask, as fastMRI's `RandomMaskFunc`: every column outside the centre is equally likely.

    On average one column in `acceleration` is kept, centre included (Zbontar et al., arXiv:1811.08839, section 4.9).
    """
    columns = scan.sampled.sum()
    centre = jnp.round(columns * scan.centre_fraction)
    probability = (columns / scan.acceleration - centre) / jnp.maximum(columns - centre, 1)
    return _with_centre(jax.random.uniform(key, scan.sampled.shape) < probability, scan)


def equispaced(key: jax.Array, scan: Scan) -> jax.Array:
    """Draw equispaced lines, as fastMRI's `EquiSpacedMaskFunc`: one column in `acceleration`, and the centre on top."""
    spacing = jnp.round(scan.acceleration).astype(jnp.int32)
    position = jnp.arange(len(scan.sampled)) - jnp.argmax(scan.sampled) - jax.random.randint(key, (), 0, spacing)
    return _with_centre((position >= 0) & (position % spacing == 0), scan)


def equispaced_fraction(key: jax.Array, scan: Scan) -> jax.Array:
    """Draw equispaced lines, as fastMRI's `EquispacedMaskFractionFunc`: one in `acceleration`, centre included.

    As in fastMRI, the last column is left out. A line exactly half-way between two columns goes to the even one, where
    NumPy's float64 may round to the other.
    """
    width, columns = len(scan.sampled), scan.sampled.sum()
    centre = jnp.round(columns * scan.centre_fraction).astype(jnp.int32)
    # The spacing is a fraction of integers, exact for accelerations in multiples of 1/20: float32 would round some
    # lines to the neighbouring column. Its denominator is 0 where the centre is enough.
    acceleration = jnp.round(20 * scan.acceleration).astype(jnp.int32)
    numerator, denominator = acceleration * (columns - centre), jnp.maximum(20 * columns - centre * acceleration, 0)
    offsets = jnp.maximum(jnp.round(numerator / jnp.maximum(denominator, 1)).astype(jnp.int32), 1)
    line = jnp.arange(width)
    position = jax.random.randint(key, (), 0, offsets) * denominator + line * numerator
    inside = (line < columns) & (position < (columns - 1) * denominator)
    column, remainder = jnp.divmod(position, jnp.maximum(denominator, 1))
    column += (2 * remainder > denominator) | ((2 * remainder == denominator) & (column % 2 == 1))
    column = jnp.where(inside, column + jnp.argmax(scan.sampled), width)
    return _with_centre(jnp.zeros(width, bool).at[column].set(True, mode="drop"), scan)


def magic(key: jax.Array, scan: Scan) -> jax.Array:
    """Draw equispaced lines, each half's between the mirrored ones of the other, as fastMRI's `MagicMaskFunc`.

    Conjugate symmetry then tells most about the columns left out (Defazio, arXiv:1912.01101).
    """
    spacing = jnp.round(scan.acceleration).astype(jnp.int32)
    offset = jax.random.randint(key, (), 0, spacing)
    even = offset % 2 == 0
    right = jnp.arange(len(scan.sampled)) - scan.echo[1]
    from_right = right - jnp.where(even, offset + 1, offset + 2)
    from_left = -1 - right - jnp.where(even, offset + 2, offset - 1)
    position = jnp.where(right >= 0, from_right, from_left)
    return _with_centre((position >= 0) & (position % spacing == 0), scan)


def gaussian1d(key: jax.Array, scan: Scan) -> jax.Array:
    """Draw columns by a Gaussian density about the echo."""
    distance = (jnp.arange(len(scan.sampled)) - scan.echo[1]) / scan.sampled.sum()
    return _keep_highest(_gaussian_scores(key, distance), _centre_columns(scan), scan)[None]


def gaussian2d(key: jax.Array, scan: Scan) -> jax.Array:
    """Draw samples by a Gaussian density about the echo."""
    plane = _sample_plane(scan)
    return _keep_highest(_gaussian_scores(key, plane.distance), plane.centre, scan)


def poisson(key: jax.Array, scan: Scan, growth: float = 4.0) -> jax.Array:
    """Draw a Poisson-disc mask whose spacing grows by `growth` over a distance of the size of k-space.

    Two samples are at least s times the mean of their spacings apart, with the largest s found at which enough fit.
    Dart throwing at a radius that shrinks as space fills up (McCool and Fiume, 1992), in parallel: each free position
    of higher random rank than all others within its radius takes a dart (Luby, 1986).
    """
    plane = _sample_plane(scan)
    spacing = 1 + growth * plane.distance
    allowed = scan.sampled & ~plane.centre
    wanted = jnp.minimum(plane.outside_centre, allowed.sum())
    # Integer ranks: float ones could be equal, and of two equal ranks neither would ever win.
    rank = 1 + jax.random.permutation(key, spacing.size).reshape(spacing.shape).astype(jnp.float32)

    # state: infinite where a dart lies, 0 where one would be too close, the rank where the position is free
    def throw(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state, scale = carry
        full = ~jnp.any((state > 0) & jnp.isfinite(state))
        scale = jnp.where(full, 0.9 * scale, scale)
        state = jnp.where(full & allowed & (state == 0), rank, state)
        highest = _highest_within(state, spacing, scale)
        dart = jnp.isinf(state) | (state > highest)
        return jnp.where(dart, jnp.inf, jnp.where(jnp.isinf(highest), 0, state)), scale

    # At this scale even the densest packing, the hexagonal one, holds no more than `wanted` points.
    densest = 2 / math.sqrt(3) * jnp.sum(allowed / spacing**2)
    scale = jnp.minimum(jnp.sqrt(densest / wanted), _LARGEST_SPACING / spacing.max())
    start = jnp.where(allowed, rank, 0), scale
    state, _ = jax.lax.while_loop(lambda carry: jnp.isinf(carry[0]).sum() < wanted, throw, start)
    return _keep_highest(jnp.where(jnp.isinf(state), rank, 0), plane.centre, scan)


def radial(key: jax.Array, scan: Scan) -> jax.Array:
    """Draw equally spaced spokes of one sample's width through the echo, the first at a random angle."""
    plane = _sample_plane(scan)
    # A line through a square is on average 4 / pi * asinh(1) sides long; the centre is a square without spokes.
    length = 4 / math.pi * math.asinh(1) * (jnp.sqrt(plane.samples) - jnp.sqrt(plane.centre.sum()))
    spacing = math.pi / jnp.maximum(jnp.round(plane.outside_centre / length), 1)
    from_spoke = jnp.mod(plane.angle + jax.random.uniform(key) * spacing, spacing) - spacing / 2
    return _keep_highest(-plane.radius * abs(jnp.sin(from_spoke)), plane.centre, scan)


def spiral(key: jax.Array, scan: Scan) -> jax.Array:
    """Draw an Archimedean spiral about the echo, at a random angle."""
    plane = _sample_plane(scan)
    pitch = (plane.samples - plane.centre.sum()) / plane.outside_centre
    turns = plane.radius / pitch - plane.angle / (2 * math.pi)
    from_spiral = abs(jnp.mod(turns + jax.random.uniform(key), 1) - 0.5) * pitch
    return _keep_highest(-from_spiral, plane.centre, scan)


MASKS: dict[str, Callable[[jax.Array, Scan], jax.Array]] = {
    "random": random_columns,
    "equispaced": equispaced,
    "equispaced_fraction": equispaced_fraction,
    "magic": magic,
    "gaussian1d": gaussian1d,
    "gaussian2d": gaussian2d,
    "poisson": poisson,
    "poisson_uniform": functools.partial(poisson, growth=0.0),
    "radial": radial,
    "spiral": spiral,
    "stored": lambda key, scan: scan.sampled[None],  # the mask stored in the file is in `sampled` already
}


def _central_block(size: int, length: jax.Array, centre: jax.Array) -> jax.Array:
    """Select `length` neighbours about `centre`: (size,) bool, from (size - length + 1) // 2 on as in fastMRI."""
    start = (size - length + 1) // 2 + centre - size // 2
    position = jnp.arange(size)
    return (position >= start) & (position < start + length)


def _centre_columns(scan: Scan) -> jax.Array:
    return _central_block(len(scan.sampled), jnp.round(scan.sampled.sum() * scan.centre_fraction), scan.echo[1])


def _with_centre(lines: jax.Array, scan: Scan) -> jax.Array:
    return (scan.sampled & (lines | _centre_columns(scan)))[None]


class _SamplePlane(NamedTuple):
    """K-space as the masks of single samples need it."""

    radius: jax.Array  # (height, width), distance from the echo in samples
    angle: jax.Array  # (height, width), about the echo
    distance: jax.Array  # (height, width), from the echo as a fraction of the size
    centre: jax.Array  # (height, width) bool, the fully sampled rectangle
    samples: jax.Array  # how many hold data
    outside_centre: jax.Array  # how many to keep outside the centre, at least 1


def _sample_plane(scan: Scan) -> _SamplePlane:
    height, width, columns = scan.height, len(scan.sampled), scan.sampled.sum()
    row, column = jnp.arange(height)[:, None] - scan.echo[0], jnp.arange(width) - scan.echo[1]
    side = jnp.sqrt(scan.centre_fraction)
    centre_rows = _central_block(height, jnp.round(height * side), scan.echo[0])[:, None]
    centre = centre_rows & _central_block(width, jnp.round(columns * side), scan.echo[1]) & scan.sampled
    samples = height * columns
    outside_centre = jnp.maximum(samples / scan.acceleration - centre.sum(), 1)
    radius, distance = jnp.hypot(row, column), jnp.hypot(row / height, column / columns)
    return _SamplePlane(radius, jnp.arctan2(row, column), distance, centre, samples, outside_centre)


def _gaussian_scores(key: jax.Array, distance: jax.Array) -> jax.Array:
    """Draw scores whose k highest are k draws without replacement by a density 0.7 of the size wide at half maximum."""
    log_density = -4 * math.log(2) * (distance / 0.7) ** 2
    return log_density + jax.random.gumbel(key, distance.shape)  # Gumbel top-k: Kool et al., arXiv:1903.06059


def _keep_highest(score: jax.Array, centre: jax.Array, scan: Scan) -> jax.Array:
    """Keep the centre and the sampled positions of highest score, 1 / acceleration of all sampled ones together."""
    sampled = jnp.broadcast_to(scan.sampled, score.shape)
    score = jnp.where(sampled, jnp.where(centre, jnp.inf, score), -jnp.inf)
    count = jnp.round(sampled.sum() / scan.acceleration).astype(jnp.int32)
    threshold = jnp.sort(score, axis=None)[score.size - jnp.maximum(count, 1)]
    return sampled & (score >= threshold)


def _highest_within(values: jax.Array, spacing: jax.Array, scale: jax.Array) -> jax.Array:
    """Find the highest value closer than `scale` times the mean of both spacings: (height, width), 0 if none."""
    padded = jnp.pad(jnp.stack([values, spacing]), [(0, 0), (_LARGEST_SPACING,) * 2, (_LARGEST_SPACING,) * 2])
    reach = jnp.floor(scale * spacing.max()).astype(jnp.int32)
    side = 2 * reach + 1

    def compare(i: jax.Array, highest: jax.Array) -> jax.Array:
        offset = jnp.stack(jnp.divmod(i, side)) - reach
        distance = jnp.sqrt(jnp.sum(offset**2).astype(jnp.float32))
        other, its_spacing = jax.lax.dynamic_slice(padded, (0, *(offset + _LARGEST_SPACING)), (2, *values.shape))
        close = (distance > 0) & (distance < scale * (spacing + its_spacing) / 2)
        return jnp.where(close, jnp.maximum(highest, other), highest)

    return jax.lax.fori_loop(0, side**2, compare, jnp.zeros_like(values))
