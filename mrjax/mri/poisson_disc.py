"""Poisson discs: random points that keep a distance from one another."""

import math

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_SPACING = 12  # in samples


def draw_points(key: jax.Array, spacing: jax.Array, allowed: jax.Array, wanted: jax.Array) -> jax.Array:
    """Draw at least `wanted` points, if so many are `allowed`: (height, width) float32 ranks from 1 on, 0 elsewhere.

    Two are at least s times the mean of their `spacing` (height, width), at least 1, apart, with the largest s found at
    which enough fit. Dart throwing at a radius that shrinks as space fills up (McCool and Fiume, 1992), in parallel:
    each free position of higher random rank than all others within its radius takes a dart (Luby, 1986).
    """
    # Integer ranks: float ones could be equal, and of two equal ranks neither would ever win.
    rank = 1 + jax.random.permutation(key, spacing.size).reshape(spacing.shape).astype(jnp.float32)
    allowed = jnp.broadcast_to(allowed, spacing.shape)
    wanted = jnp.minimum(wanted, allowed.sum())

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
    return jnp.where(jnp.isinf(state), rank, 0)


def _highest_within(values: jax.Array, spacing: jax.Array, scale: jax.Array) -> jax.Array:
    """Find the highest value closer than `scale` times the mean of both spacings: (height, width), 0 if none."""
    window = np.arange(-_LARGEST_SPACING, _LARGEST_SPACING + 1)
    rows, columns = (offsets.ravel() for offsets in np.meshgrid(window, window, indexing="ij"))
    nearest = np.argsort(rows**2 + columns**2, kind="stable")[1:]
    corners = jnp.asarray(np.stack([rows, columns], 1)[nearest] + _LARGEST_SPACING)
    distances = jnp.asarray(np.hypot(rows, columns)[nearest].astype(np.float32))
    padded_values, padded_spacing = jnp.pad(values, _LARGEST_SPACING), jnp.pad(spacing, _LARGEST_SPACING)

    def compare(i: jax.Array, highest: jax.Array) -> jax.Array:
        shifted = jax.lax.dynamic_slice(padded_values, corners[i], values.shape)
        radius = scale * (spacing + jax.lax.dynamic_slice(padded_spacing, corners[i], values.shape)) / 2
        return jnp.where(distances[i] < radius, jnp.maximum(highest, shifted), highest)

    # Offsets come by distance: those beyond the largest radius are never looked at.
    return jax.lax.fori_loop(0, (distances < scale * spacing.max()).sum(), compare, jnp.zeros_like(values))
