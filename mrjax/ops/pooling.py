"""2x2 pooling with gradients that are fast on every platform, of packed pixels too.

Pixels packed into lanes stay where they are: the result stands where the first of each two pixels was, and what stands
in place of the second means nothing (`FeatureMap.spaced`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mrjax.ops.features import FeatureMap


def max_pool(x: FeatureMap) -> FeatureMap:
    """Take the maximum of each 2x2 block; of equal values the first gets the gradient, as in PyTorch.

    Not `reduce_window`, whose gradient takes 5 to 12 times as long on a CPU and moves more memory on a GPU. Stored for
    the gradient are the places of the maxima, a byte each.
    """
    return _pooled(x, _maximum(*_corners(x)))


def avg_pool(x: FeatureMap) -> FeatureMap:
    """Take the mean of each 2x2 block."""
    a, b, c, d = (corner.astype(jnp.float32) for corner in _corners(x))
    return _pooled(x, (a + b + c + d) / 4)


def _pooled(x: FeatureMap, data: Array) -> FeatureMap:
    data = data.astype(x.data.dtype)
    return x.replace(data) if x.lane_pack == 1 else FeatureMap(data, x.lane_pack // 2, spaced=True)


def _corners(x: FeatureMap) -> tuple[Array, ...]:
    """Find the four pixels of each 2x2 block, (b, h // 2, w // 2, c); of packed pixels, at the first column's lanes."""
    b, h, w, lanes = x.data.shape
    if x.lane_pack > 1:
        above, below = (x.data.reshape(b, h // 2, 2, w, lanes)[:, :, row] for row in range(2))
        # A product with ones and zeros, exact: a TPU moves lanes much faster by that.
        shift = np.eye(lanes, k=-lanes // x.lane_pack, dtype=x.data.dtype)
        right_above, right_below = (jnp.dot(row, shift, precision="highest") for row in (above, below))
        return above, right_above, below, right_below
    # Float32 for bfloat16 too: a CPU rounds at each step of the gradient, which joins the four, and takes 10 times as
    # long.
    even = x.data.astype(jnp.float32)[:, : h // 2 * 2, : w // 2 * 2]
    blocks = even.reshape(b, h // 2, 2, w // 2, 2, lanes)
    return tuple(blocks[:, :, row, :, column] for row in range(2) for column in range(2))


@jax.custom_vjp
def _maximum(*corners: Array) -> Array:
    return _maximum_and_place(*corners)[0]


def _maximum_and_place(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    above, below = jnp.maximum(a, b), jnp.maximum(c, d)
    place = jnp.where(above >= below, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.maximum(above, below), place.astype(jnp.uint8)


def _maximum_bwd(place: Array, gradient: Array) -> tuple[Array, ...]:
    return tuple(jnp.where(place == corner, gradient, 0) for corner in range(4))


_maximum.defvjp(_maximum_and_place, _maximum_bwd)
