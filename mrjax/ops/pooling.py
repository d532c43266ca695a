"""2x2 pooling with gradients that are fast everywhere, also of pixels side by side as one on a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def max_pool(x: Array, fold: int = 1) -> Array:
    """2x2 maxima, (b, h, w, c) to (b, h // 2, w // 2, c); of equals the first has the gradient, as in PyTorch.

    Not `reduce_window`, whose gradient takes 5 to 12 times as long on a CPU and moves more memory on a GPU. What is
    kept for it are the places of the maxima, a byte each.

    With `fold` pixels as one, (b, h, w, fold c) to (b, h // 2, w, fold c): the maxima are where the first of each two
    pixels was, and beside them is what means nothing. So no pixel leaves its lanes.
    """
    return _greatest(*_corners(x)).astype(x.dtype) if fold == 1 else _greatest_folded(fold, x)


@jax.custom_vjp
def _greatest(*corners: Array) -> Array:
    return _greatest_and_place(*corners)[0]


def _greatest_and_place(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    above, below = jnp.maximum(a, b), jnp.maximum(c, d)
    place = jnp.where(above >= below, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.maximum(above, below), place.astype(jnp.uint8)


def _to_the_place(place: Array, gradient: Array) -> tuple[Array, ...]:
    return tuple(jnp.where(place == corner, gradient, 0) for corner in range(4))


_greatest.defvjp(_greatest_and_place, _to_the_place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _greatest_folded(fold: int, x: Array) -> Array:
    return _greatest_and_place(*_corners(x, fold))[0]


def _to_the_place_folded(fold: int, place: Array, gradient: Array) -> tuple[Array]:
    b, h, w, lanes = gradient.shape
    second = np.arange(lanes) // (lanes // fold) % 2
    from_first = np.arange(lanes) - lanes // fold * second
    place, gradient = (_lanes(x, from_first)[:, :, None] for x in (place.astype(gradient.dtype), gradient))
    here = place == 2 * np.arange(2)[:, None, None] + second
    return (jnp.where(here, gradient, 0).reshape(b, 2 * h, w, lanes),)


def _lanes(x: Array, order: np.ndarray) -> Array:
    """`x[..., order]` as a product with ones and zeros, exact: a TPU moves lanes much faster by that."""
    matrix = np.arange(x.shape[-1])[:, None] == order
    return jnp.dot(x, matrix.astype(x.dtype), precision="highest")


_greatest_folded.defvjp(lambda fold, x: _greatest_and_place(*_corners(x, fold)), _to_the_place_folded)


def avg_pool(x: Array, fold: int = 1) -> Array:
    """2x2 means, (b, h, w, c) to (b, h // 2, w // 2, c); of pixels as one as `max_pool` has it."""
    a, b, c, d = (corner.astype(jnp.float32) for corner in _corners(x, fold))
    return ((a + b + c + d) / 4).astype(x.dtype)


def _corners(x: Array, fold: int = 1) -> tuple[Array, ...]:
    """The four pixels of each 2x2 block; with `fold` of them as one, at the first of each two and nowhere else.

    Float32 where they are not folded, for bfloat16 too: a CPU rounds at each step of the gradient, which joins the
    four, and takes 10 times as long.
    """
    b, h, w, c = x.shape
    if fold == 1:
        blocks = x.astype(jnp.float32)[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
        return tuple(blocks[:, :, row, :, column] for row in range(2) for column in range(2))
    rows = x.reshape(b, h // 2, 2, w, c)
    next_one = np.roll(np.arange(c), -c // fold)
    return tuple(pixel for row in range(2) for pixel in (rows[:, :, row], _lanes(rows[:, :, row], next_one)))
