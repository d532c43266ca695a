"""Two-dimensional sampling patterns as scores: of the samples of k-space, those of the highest score are measured.

`row` and `column` are distances in samples from the middle of k-space, (height, 1) and (width,).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# Full width at half maximum of the Gaussian density, as a fraction of the size of k-space.
_WIDTH = 0.7
# By how much the spacing of variable-density Poisson discs grows over a distance of the size of k-space.
SPREAD = 4.0
# The largest spacing of Poisson discs, and the factor by which it shrinks when nothing more fits.
_REACH = 12
_SHRINK = 0.9


def gaussian(key: jax.Array, distance: jax.Array) -> jax.Array:
    """Random scores: the k highest are a draw of k without replacement, by a Gaussian density of the distance.

    Args:
      key: PRNG key.
      distance: from the middle, as a fraction of the size, of any shape.
    """
    exponent = -4 * math.log(2) * (distance / _WIDTH) ** 2
    # Kool et al., arXiv:1903.06059: log density + Gumbel noise, sorted, is such a draw.
    return exponent + jax.random.gumbel(key, distance.shape)


def radial(key: jax.Array, row: jax.Array, column: jax.Array, wanted: jax.Array, length: jax.Array) -> jax.Array:
    """Minus the distance from the nearest of equally spaced spokes through the middle, the first at a random angle.

    Args:
      key: PRNG key.
      row, column: distances from the middle.
      wanted: number of samples to be measured outside the centre; spokes of one sample's width reach it.
      length: difference of the sides of squares as large as k-space and as its centre.
    """
    # A line through a square is on average 4 / pi * asinh(1) sides long.
    spokes = jnp.maximum(jnp.round(wanted / (4 / math.pi * math.asinh(1) * length)), 1)
    between = math.pi / spokes
    angle = jnp.arctan2(row, column) + jax.random.uniform(key) * between
    from_spoke = jnp.mod(angle, between) - between / 2
    return -jnp.hypot(row, column) * abs(jnp.sin(from_spoke))


def spiral(key: jax.Array, row: jax.Array, column: jax.Array, pitch: jax.Array) -> jax.Array:
    """Minus the distance from an Archimedean spiral that starts at a random angle, its turns `pitch` samples apart."""
    turns = jnp.hypot(row, column) / pitch - jnp.arctan2(row, column) / (2 * math.pi)
    return -abs(jnp.mod(turns + jax.random.uniform(key), 1) - 0.5) * pitch


def poisson_disc(key: jax.Array, spacing: jax.Array, allowed: jax.Array, wanted: jax.Array) -> jax.Array:
    """Random scores, positive on points that keep a distance from one another proportional to their spacing.

    Dart throwing at a radius that shrinks as space fills up (McCool and Fiume, 1992), in parallel: of the places still
    free, each of higher random rank than all others within its radius takes a dart (Luby, 1986).

    Args:
      key: PRNG key.
      spacing: (height, width), at least 1: two points are at least s times the mean of their spacings apart, with the
        largest s found at which enough of them fit.
      allowed: (height, width) bool, where points may lie.
      wanted: the least number of points.

    Returns:
      (height, width) float32, 0 where there is no point.
    """
    height, width = spacing.shape
    # Whole numbers: of two equal ranks neither would ever win.
    rank = 1 + jax.random.permutation(key, height * width).reshape(height, width).astype(jnp.float32)
    dy, dx = (d.ravel() for d in np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1])
    nearest = np.argsort(dy**2 + dx**2, kind="stable")[1:]
    distances = np.hypot(dy, dx)[nearest].astype(np.float32)
    steps, distance = jnp.asarray(np.stack([dy, dx], 1)[nearest]), jnp.asarray(distances)
    border = jnp.pad(spacing, _REACH)
    allowed = jnp.broadcast_to(allowed, spacing.shape)
    wanted = jnp.minimum(wanted, allowed.sum())

    def strongest(value: jax.Array, scale: jax.Array) -> jax.Array:
        """The highest value within each place's radius, 0 if all are blocked."""
        padded = jnp.pad(value, _REACH)

        def look(i: jax.Array, best: jax.Array) -> jax.Array:
            corner = steps[i] + _REACH
            there = jax.lax.dynamic_slice(padded, corner, spacing.shape)
            radius = scale * (spacing + jax.lax.dynamic_slice(border, corner, spacing.shape)) / 2
            return jnp.where(distance[i] < radius, jnp.maximum(best, there), best)

        return jax.lax.fori_loop(0, (distance < scale * spacing.max()).sum(), look, jnp.zeros_like(value))

    def enough(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.isinf(state[0]).sum() < wanted

    def throw(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, scale = state  # value: infinite where a dart lies, 0 where it is blocked, a rank where it is free
        full = ~jnp.any((value > 0) & jnp.isfinite(value))
        scale = jnp.where(full, _SHRINK * scale, scale)
        value = jnp.where(full & allowed & (value == 0), rank, value)
        near = strongest(value, scale)
        taken = jnp.isinf(value) | (value > near)
        return jnp.where(taken, jnp.inf, jnp.where(jnp.isinf(near), 0, value)), scale

    # Even the densest packing, of hexagons, holds no more than wanted at this scale.
    densest = 2 / math.sqrt(3) * jnp.sum(allowed / spacing**2)
    scale = jnp.minimum(jnp.sqrt(densest / wanted), _REACH / spacing.max())
    value, _ = jax.lax.while_loop(enough, throw, (jnp.where(allowed, rank, 0), scale))
    return jnp.where(jnp.isinf(value), rank, 0)
