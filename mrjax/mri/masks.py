"""Which samples of k-space an accelerated scan measures: phase-encode columns, or single samples of both directions.

Everything is counted over the columns that the scanner really measured: one in `acceleration` of their samples is
kept, and `centre_fraction` of them form the fully sampled centre.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mrjax.mri import patterns

LINES = ("random", "equispaced", "equispaced_fraction", "magic", "gaussian1d")
STORED = "stored"
SAMPLES = ("gaussian2d", "poisson", "poisson_uniform", "radial", "spiral")

# In integers of this unit the spacing of lines is exact; in float32, rounding would move some to the next column.
_UNIT = 20


class Scan(NamedTuple):
    """What a mask is drawn for.

    Attributes:
      sampled: (width,) bool, the columns that hold data.
      acceleration: scalar, at least 1.
      centre_fraction: scalar in 0..1, the share of the sampled columns (or samples) that forms the centre.
      echo: row and column of the middle of k-space.
    """

    sampled: jax.Array
    acceleration: jax.Array
    centre_fraction: jax.Array
    echo: tuple[jax.Array, jax.Array]


def draw(
    key: jax.Array,
    kind: str,
    sampled: jax.Array,
    height: int,
    acceleration: jax.Array | float,
    centre_fraction: jax.Array | float,
    echo: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Draws a mask.

    Args:
      key: PRNG key.
      kind: one of `LINES`, which keep whole columns: 'random', 'equispaced', 'equispaced_fraction' and 'magic' as
        fastMRI's functions of these names do (the second and the last keep more than one column in `acceleration`:
        their centre comes on top), 'gaussian1d' denser towards the middle; or one of `SAMPLES`: 'gaussian2d',
        'poisson' and 'poisson_uniform' discs, 'radial' spokes and a 'spiral'.
        `STORED` keeps all of `sampled`, which then is what the file's own mask keeps.
      sampled: (width,) bool, the columns that hold data.
      height: of k-space.
      acceleration: scalar, at least 1; an integer for 'equispaced' and 'magic', else it is rounded to one.
      centre_fraction: scalar from 0 to 1 / acceleration. Of `SAMPLES`, the centre is a rectangle of this area.
      echo: row and column of the middle of k-space, (height // 2, width // 2) by default.

    Returns:
      (1, width) bool for `LINES` and `STORED`, (height, width) bool for `SAMPLES`.
    """
    if kind == STORED:
        return sampled[None]
    width = sampled.shape[0]
    middle = (jnp.asarray(height // 2), jnp.asarray(width // 2)) if echo is None else echo
    scan = Scan(sampled, jnp.asarray(acceleration), jnp.asarray(centre_fraction), middle)
    if kind == "random":
        return random_columns(key, sampled, scan.acceleration, scan.centre_fraction, middle[1])[None]
    if kind in SAMPLES:
        return _samples(key, kind, scan, height)
    centre = _block(width, jnp.round(sampled.sum() * scan.centre_fraction), middle[1])
    if kind == "gaussian1d":
        score = patterns.gaussian(key, (jnp.arange(width) - middle[1]) / sampled.sum())
        return _highest(score, centre, sampled, scan.acceleration)[None]
    lines = {"equispaced": equispaced, "equispaced_fraction": equispaced_fraction, "magic": magic}[kind]
    offset = jax.random.randint(key, (), 0, _offsets(kind, scan))
    return (sampled & (centre | lines(offset, scan)))[None]


def random_columns(
    key: jax.Array,
    sampled: jax.Array,
    acceleration: jax.Array,
    centre_fraction: jax.Array,
    echo: jax.Array | None = None,
) -> jax.Array:
    """A random Cartesian mask: a fully sampled centre, every other column kept with one probability.

    The probability is such that, on average, the number of columns kept is that of the sampled ones divided by the
    acceleration (Zbontar et al., arXiv:1811.08839, section 4.9; fastMRI's `RandomMaskFunc`). Columns the scanner
    never measured count neither way.

    Args:
      key: PRNG key.
      sampled: (width,) bool, the columns that hold data.
      acceleration: scalar, at least 1.
      centre_fraction: scalar in 0..1, the share of the sampled columns that forms the centre.
      echo: the column of the middle of k-space, width // 2 by default.

    Returns:
      (width,) bool.
    """
    width = sampled.shape[0]
    columns = sampled.sum()
    centre = jnp.round(columns * centre_fraction)
    others = jnp.maximum(columns - centre, 1)
    probability = (columns / acceleration - centre) / others
    return sampled & (_block(width, centre, echo) | (jax.random.uniform(key, (width,)) < probability))


def equispaced(offset: jax.Array, scan: Scan) -> jax.Array:
    """Every acceleration-th column from the `offset`-th sampled one on, (width,) bool, without the centre.

    As fastMRI's `EquiSpacedMaskFunc`.
    """
    place = jnp.arange(scan.sampled.shape[0]) - jnp.argmax(scan.sampled) - offset
    return (place >= 0) & (place % _spacing(scan) == 0)


def equispaced_fraction(offset: jax.Array, scan: Scan) -> jax.Array:
    """Lines so far apart that with the centre one column in `acceleration` is kept, (width,) bool without the centre.

    As fastMRI's `EquispacedMaskFractionFunc`, which leaves the last column out. The acceleration counts to 0.05. A line
    exactly half-way between two columns goes to the even one; there, NumPy's float64 may round to the other.
    """
    width, columns = scan.sampled.shape[0], scan.sampled.sum()
    over, under = _adjusted_spacing(scan)
    line = jnp.arange(width)
    place = offset * under + line * over
    inside = (line < columns) & (place < (columns - 1) * under)
    column, rest = jnp.divmod(place, jnp.maximum(under, 1))
    column += (2 * rest > under) | ((2 * rest == under) & (column % 2 == 1))
    column = jnp.where(inside, column + jnp.argmax(scan.sampled), width)
    return jnp.zeros(width, bool).at[column].set(True, mode="drop")


def magic(offset: jax.Array, scan: Scan) -> jax.Array:
    """Equispaced lines of which each half's fall between the mirrored ones of the other, (width,) bool without centre.

    Defazio, arXiv:1912.01101; as fastMRI's `MagicMaskFunc`.
    """
    even = offset % 2 == 0
    right = jnp.arange(scan.sampled.shape[0]) - scan.echo[1]
    from_right = right - jnp.where(even, offset + 1, offset + 2)
    from_left = -1 - right - jnp.where(even, offset + 2, offset - 1)
    place = jnp.where(right >= 0, from_right, from_left)
    return (place >= 0) & (place % _spacing(scan) == 0)


def _spacing(scan: Scan) -> jax.Array:
    return jnp.round(scan.acceleration).astype(jnp.int32)


def _adjusted_spacing(scan: Scan) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator, int32, of the spacing of `equispaced_fraction`; 0 below where the centre is enough."""
    columns = scan.sampled.sum()
    centre = jnp.round(columns * scan.centre_fraction).astype(jnp.int32)
    rate = jnp.round(scan.acceleration * _UNIT).astype(jnp.int32)
    return rate * (columns - centre), jnp.maximum(columns * _UNIT - centre * rate, 0)


def _offsets(kind: str, scan: Scan) -> jax.Array:
    """How many offsets a kind of equispaced lines is drawn from."""
    if kind != "equispaced_fraction":
        return _spacing(scan)
    over, under = _adjusted_spacing(scan)
    return jnp.maximum(jnp.round(over / jnp.maximum(under, 1)).astype(jnp.int32), 1)


def _block(size: int, length: jax.Array, middle: jax.Array | None) -> jax.Array:
    """(size,) bool: `length` neighbours about `middle`, placed as fastMRI does: from (size - length + 1) // 2 on."""
    start = (size - length + 1) // 2 + (0 if middle is None else middle - size // 2)
    position = jnp.arange(size)
    return (position >= start) & (position < start + length)


def _samples(key: jax.Array, kind: str, scan: Scan, height: int) -> jax.Array:
    """(height, width) bool: the samples that a pattern scores highest, beside a rectangular centre."""
    width, columns = scan.sampled.shape[0], scan.sampled.sum()
    row, column = jnp.arange(height)[:, None] - scan.echo[0], jnp.arange(width) - scan.echo[1]
    side = jnp.sqrt(scan.centre_fraction)
    rows = _block(height, jnp.round(height * side), scan.echo[0])[:, None]
    centre = rows & _block(width, jnp.round(columns * side), scan.echo[1]) & scan.sampled
    every, inner = height * columns, centre.sum()
    wanted = jnp.maximum(every / scan.acceleration - inner, 1)
    if kind == "gaussian2d":
        score = patterns.gaussian(key, jnp.hypot(row / height, column / columns))
    elif kind == "radial":
        score = patterns.radial(key, row, column, wanted, jnp.sqrt(every) - jnp.sqrt(inner))
    elif kind == "spiral":
        score = patterns.spiral(key, row, column, (every - inner) / wanted)
    else:
        distance = jnp.hypot(row / height, column / columns)
        spacing = jnp.ones_like(distance) if kind == "poisson_uniform" else 1 + patterns.SPREAD * distance
        score = patterns.poisson_disc(key, spacing, scan.sampled & ~centre, wanted)
    return _highest(score, centre, scan.sampled, scan.acceleration)


def _highest(score: jax.Array, centre: jax.Array, sampled: jax.Array, acceleration: jax.Array) -> jax.Array:
    """The centre, and of all other sampled places the ones of highest score, up to 1 / acceleration of all sampled."""
    allowed = jnp.broadcast_to(sampled, score.shape)
    score = jnp.where(allowed, jnp.where(centre, jnp.inf, score), -jnp.inf)
    count = jnp.round(allowed.sum() / acceleration).astype(jnp.int32)
    threshold = jnp.sort(score, axis=None)[score.size - jnp.maximum(count, 1)]
    return allowed & (score >= threshold)
