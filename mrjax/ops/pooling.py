"""2x2 pooling with gradients that are fast on every platform, of packed pixels too.

Pixels packed into lanes stay where they are: the result stands where the first of each two pixels was, and what stands
in place of the second means nothing (`FeatureMap.spaced`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mrjax.ops.features import FeatureMap


def max_pool(x: FeatureMap) -> FeatureMap:
    """Take the maximum of each 2x2 block; of equal values the first gets the gradient, as in PyTorch.

    Not `reduce_window`, whose gradient takes 5 to 12 times as long on a CPU and moves more memory on a GPU: ours stores
    the places of the maxima, a byte each.
    """
    if x.lane_pack == 1:
        return x.replace(data=_maximum(*_corners(x.data)).astype(x.data.dtype))
    return FeatureMap(_packed_max_pool(x.lane_pack, x.data), x.lane_pack // 2, spaced=True)


def avg_pool(x: FeatureMap) -> FeatureMap:
    """Take the mean of each 2x2 block."""
    corners = _corners(x.data) if x.lane_pack == 1 else _packed_corners(x.lane_pack, x.data)
    a, b, c, d = (corner.astype(jnp.float32) for corner in corners)
    mean = ((a + b + c + d) / 4).astype(x.data.dtype)
    return FeatureMap(mean, max(x.lane_pack // 2, 1), spaced=x.lane_pack > 1)


def _corners(x: Array) -> tuple[Array, ...]:
    """Split (b, h, w, c) into the four pixels of each 2x2 block, (b, h // 2, w // 2, c) float32.

    In bfloat16 a CPU rounds at each step of the gradient, which joins the four, and takes 10 times as long.
    """
    b, h, w, c = x.shape
    blocks = x.astype(jnp.float32)[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return tuple(blocks[:, :, row, :, column] for row in range(2) for column in range(2))


@jax.custom_vjp
def _maximum(*corners: Array) -> Array:
    return _maximum_and_place(*corners)[0]


def _maximum_and_place(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    above, below = jnp.maximum(a, b), jnp.maximum(c, d)
    place = jnp.where(above >= below, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.maximum(above, below), place.astype(jnp.uint8)


_maximum.defvjp(_maximum_and_place, lambda place, grad: tuple(jnp.where(place == i, grad, 0) for i in range(4)))


def _packed_corners(lane_pack: int, x: Array) -> tuple[Array, ...]:
    """Find the four pixels of each block where its first column is; elsewhere the result means nothing."""
    b, h, w, lanes = x.shape
    rows = x.reshape(b, h // 2, 2, w, lanes)
    next_pixel = np.roll(np.arange(lanes), -lanes // lane_pack)
    return tuple(pixel for row in range(2) for pixel in (rows[:, :, row], _take_lanes(rows[:, :, row], next_pixel)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_max_pool(lane_pack: int, x: Array) -> Array:
    return _maximum_and_place(*_packed_corners(lane_pack, x))[0]


def _packed_max_pool_bwd(lane_pack: int, place: Array, gradient: Array) -> tuple[Array]:
    b, h, w, lanes = gradient.shape
    column = np.arange(lanes) // (lanes // lane_pack) % 2
    first_column = np.arange(lanes) - lanes // lane_pack * column
    place, gradient = (_take_lanes(x, first_column)[:, :, None] for x in (place.astype(gradient.dtype), gradient))
    here = place == 2 * np.arange(2)[:, None, None] + column
    return (jnp.where(here, gradient, 0).reshape(b, 2 * h, w, lanes),)


_packed_max_pool.defvjp(lambda pack, x: _maximum_and_place(*_packed_corners(pack, x)), _packed_max_pool_bwd)


def _take_lanes(x: Array, order: np.ndarray) -> Array:
    """Compute `x[..., order]` as a product with ones and zeros, exact: a TPU moves lanes much faster by that."""
    matrix = np.arange(x.shape[-1])[:, None] == order
    return jnp.dot(x, matrix.astype(x.dtype), precision="highest")
