"""Instance norm and LeakyReLU with what stands beside them, and gradients that keep and move little.

What a step of a U-Net moves is mostly the activations on either side of a normalisation. How often they are stored and
read is decided here: by gradients written out, and by what XLA is kept from making anew or from storing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mrjax.ops.convolution import convolve
from mrjax.ops.platform import by_platform

_EPSILON = 1e-5
_SLOPE = 0.2
# Python runs them once for all arrays of one shape, which shows in how long a run takes to start.
_once = functools.partial(jax.jit, inline=True)


def as_it_is(x: Array, fold: int) -> Array:
    """Nothing made `then` of it."""
    return x


def _kept(x: Array, inside: Array | None) -> Array:
    """Zero outside."""
    if inside is None:
        return x
    return jnp.where(jnp.repeat(inside, x.shape[-1] // inside.shape[-1], -1), x, 0)


def normalise_and_activate(x: Array, fold: int = 1, inside: Array | None = None) -> Array:
    """Instance norm without affine parameters (eps 1e-5), then LeakyReLU (0.2): (b, h, w, c) to the same dtype.

    Of the pixels `inside` (b, h, w, fold) alone, where given; the others become zero.

    Statistics are float32, in one pass over x: right for convolution outputs, whose mean is of the order of their
    standard deviation; the variance's relative error grows as 1e-7 (mean / deviation)^2.

    The gradient is written out because LeakyReLU can be undone: the backward pass needs only the result, which the
    next convolution keeps anyway, and the convolution's own output is never stored (28 % less memory for the whole
    float32 step, compiled for an H100). Bulo et al., "In-Place Activated BatchNorm", arXiv:1712.02616.
    """
    return normalise_activate_then(as_it_is, fold, x, inside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalise_activate_then(then: Callable[..., Any], fold: int, x: Array, inside: Array | None) -> Any:
    """`then(normalise_and_activate(x), fold)`.

    It takes `then` in because its gradient is needed twice, for the statistics and with them: computing it twice moves
    less memory than storing it.
    """
    return _forwards(then, fold, x, inside)[0]


def _forwards(then: Callable[..., Any], fold: int, x: Array, inside: Array | None) -> tuple[Any, Any]:
    mean, scale = _statistics(fold, x, inside)
    # Kept apart: what is read later is this array, not its float32 form that XLA would rather store.
    result = _apart(_activated(x, mean, scale, inside).astype(x.dtype))
    output, pullback = jax.vjp(lambda result: then(result, fold), result)
    return output, (result, scale, inside, pullback)


def _backwards(
    then: Callable[..., Any], fold: int, kept: tuple[Array, Array, Array | None, Any], later: Any
) -> tuple[Array, None]:
    result, scale, inside, pullback = kept
    means = _means_for_gradient(fold, result.astype(jnp.float32), pullback(later)[0].astype(jnp.float32), inside)
    # Kept apart: the same once more, and not what XLA would store of the above.
    (result, pullback, later), (mean, product) = _apart(((result, pullback, later), means))
    g = pullback(later)[0].astype(jnp.float32)
    return _through(result.astype(jnp.float32), g, mean, product, scale, inside).astype(result.dtype), None


normalise_activate_then.defvjp(_forwards, _backwards)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise_activate_and_weigh(fold: int, x: Array, inside: Array | None, kernel: Array, bias: Array) -> Array:
    """Sums of the channels of `normalise_and_activate(x)`, whose weights are `kernel`: to (b, h, w, out) float32.

    Not in bfloat16: its 8 bits would be the precision of the image. Nothing else needs the activations, which are made
    anew from x for the gradient, and those of the weights are sums that the gradient needs anyway.
    """
    return _weigh_forwards(fold, x, inside, kernel, bias)[0]


def _weigh_forwards(
    fold: int, x: Array, inside: Array | None, kernel: Array, bias: Array
) -> tuple[Array, tuple[Array, Array, Array, Array | None, Array]]:
    mean, scale = _statistics(fold, x, inside)
    y, (b, h, w, _), out = _activated(x, mean, scale, inside), x.shape, len(bias)
    if fold == 1:
        # Not a matrix product, whose operand in float32 would be an array of its own.
        sums = jnp.concatenate([(y * kernel[:, o]).sum(-1, keepdims=True) for o in range(out)], -1)
    else:
        weights = jnp.einsum("co,ij->icjo", kernel, np.eye(fold, dtype=np.float32)).reshape(-1, fold * out)
        sums = jnp.dot(y, weights, precision="highest").reshape(b, h, w * fold, out)
    return sums + bias, (x, mean, scale, inside, kernel)


def _weigh_backwards(
    fold: int, kept: tuple[Array, Array, Array, Array | None, Array], later: Array
) -> tuple[Array, None, Array, Array]:
    x, mean, scale, inside, kernel = kept
    of_bias, (channels, out) = later.sum((0, 1, 2)), kernel.shape

    def parts(x: Array, later: Array) -> tuple[Array, Array, list[Array]]:
        """The activations, their gradient, and the gradient of each sum at every channel."""
        sums = later.reshape(*x.shape[:3], fold, out)
        ones = np.repeat(np.eye(fold, dtype=np.float32), channels, 1)
        each = [sums[..., o] if fold == 1 else jnp.dot(sums[..., o], ones, precision="high") for o in range(out)]
        gradient = sum((one * jnp.tile(kernel[:, o], fold) for o, one in enumerate(each)), jnp.float32(0))
        return _activated(x, mean, scale, inside), gradient, each

    y, g, each = parts(x, later)
    of_mean, *products = _means(fold, inside, _leaky(y, _kept(g, inside)), *(y * one for one in each))
    count = x.shape[1] * x.shape[2] * fold if inside is None else inside.sum((1, 2, 3))[:, None, None, None]
    of_kernel = jnp.stack([(product * count).sum((0, 1, 2))[:channels] for product in products], -1)
    product = sum((one * jnp.tile(kernel[:, o], fold) for o, one in enumerate(products)), jnp.float32(0))
    (x, later), of_mean, product = _apart(((x, later), of_mean, product))
    y, g, _ = parts(x, later)
    return _through(y, g, of_mean, product, scale, inside).astype(x.dtype), None, of_kernel, of_bias


normalise_activate_and_weigh.defvjp(_weigh_forwards, _weigh_backwards)


@functools.partial(_once, static_argnums=0)
def _statistics(fold: int, x: Array, inside: Array | None) -> tuple[Array, Array]:
    """Mean and 1 / deviation of each channel of each image, (b, 1, 1, c) float32."""
    wide = _kept(x.astype(jnp.float32), inside)
    mean, square = _means(fold, inside, wide, wide * wide)
    return mean, lax.rsqrt(jnp.maximum(square - mean * mean, 0) + _EPSILON)


@_once
def _activated(x: Array, mean: Array, scale: Array, inside: Array | None) -> Array:
    """Normalised and activated, float32."""
    normal = (x.astype(jnp.float32) - mean) * scale
    return _kept(jnp.where(normal >= 0, normal, _SLOPE * normal), inside)


def _leaky(y: Array, g: Array) -> Array:
    """The gradient of what LeakyReLU made y from."""
    return jnp.where(y >= 0, g, _SLOPE * g)


@functools.partial(_once, static_argnums=0)
def _means_for_gradient(fold: int, y: Array, g: Array, inside: Array | None) -> tuple[Array, ...]:
    """Of the gradient of the normalised values, and of it times these: the slope cancels from (slope g) (y / slope)."""
    g = _kept(g, inside)
    return _means(fold, inside, _leaky(y, g), g * y)


@_once
def _through(y: Array, g: Array, mean: Array, product: Array, scale: Array, inside: Array | None) -> Array:
    """The gradient g of the activations y, back through activation and normalisation, float32."""
    gradient = jnp.where(y >= 0, g - y * product, _SLOPE * g - y / _SLOPE * product) - mean
    return _kept(scale * gradient, inside)


@jax.custom_vjp
def convolve_image(x: Array, kernel: Array, inside: Array | None) -> Array:
    """`normalise_and_activate(convolve(x, kernel))` of one channel: (b, h, w, 1), (3, 3, 1, c) to (b, h, w, c).

    Nine products of a small image cost less than to store and read their sum: they are made twice, for the statistics
    and for the result, in one pass over arrays of c channels instead of four. CPUs compute the library's convolution.
    """
    return _image_forwards(x, kernel, inside)[0]


def _image_forwards(x: Array, kernel: Array, inside: Array | None) -> tuple[Array, tuple[Any, ...]]:
    def by_convolution(x: Array) -> tuple[Array, Array]:
        sums = convolve(x, kernel)
        mean, scale = _statistics(1, sums, inside)
        return _activated(sums, mean, scale, inside).astype(x.dtype), scale

    def in_one_loop(x: Array) -> tuple[Array, Array]:
        mean, scale = _statistics(1, _sum_of_neighbours(x, kernel), inside)
        x, mean, scale = _apart((x, mean, scale))
        return _activated(_sum_of_neighbours(x, kernel), mean, scale, inside).astype(x.dtype), scale

    x = _apart(x)
    result, scale = by_platform(x, cpu=by_convolution, default=in_one_loop)
    return result, (x, kernel, inside, _apart(result), scale)


def _image_backwards(kept: tuple[Any, ...], later: Array) -> tuple[Array, Array, None]:
    x, kernel, inside, result, scale = kept
    of_sums, _ = _backwards(as_it_is, 1, (result, scale, inside, jax.vjp(lambda y: y, result)[1]), later)
    return *jax.vjp(convolve, x, kernel)[1](of_sums), None


convolve_image.defvjp(_image_forwards, _image_backwards)


def _sum_of_neighbours(x: Array, kernel: Array) -> Array:
    """The 3x3 convolution of one channel, float32."""
    h, w = x.shape[1:3]
    padded, weights = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0))), kernel.astype(jnp.float32)
    terms = (
        padded[:, row : row + h, column : column + w] * weights[row, column] for row in range(3) for column in range(3)
    )
    return sum(terms, jnp.float32(0))


@jax.custom_vjp
def one_backwards(values: Any) -> Any:
    """The same values, whose gradients are all computed before one of them is used.

    Or XLA would put off those of the kernels, which nothing waits for, to where they are exchanged between devices, and
    keep what they are made of until then. Not on TPUs, where it would keep what is made of the others, statistics of a
    normalisation, from being made with them.
    """
    return values


one_backwards.defvjp(
    lambda values: (values, None),
    lambda _, gradients: (by_platform(gradients, tpu=lambda x: x, default=_apart),),
)


def _apart(values: Any) -> Any:
    """The same values, which XLA must not make anew where they are used.

    Not on CPUs, where it gains nothing and XLA (JAX 0.10) computes other gradients inside a `lax.scan` for it.
    """
    return by_platform(values, cpu=lambda x: x, default=lax.optimization_barrier)


def _means(fold: int, inside: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """Over the height and width inside, (b, h, w, c) float32, zero elsewhere, to (b, 1, 1, c): all arrays in one pass.

    Rows first: into a sum as short as that XLA fuses what makes its terms, for all levels of the network. On a TPU
    it adds up what a convolution makes while it makes it, where the sums are plain.
    """

    def rows_first(*arrays: Array) -> tuple[Array, ...]:
        zeros = (jnp.float32(0),) * len(arrays)
        rows = lax.reduce(arrays, zeros, lambda x, y: tuple(map(jnp.add, x, y)), (2,))
        return tuple(row.mean(1) / arrays[0].shape[2] for row in rows)

    def plain(*arrays: Array) -> tuple[Array, ...]:
        return tuple(x.mean((1, 2)) for x in arrays)

    b, _, _, c = arrays[0].shape
    means = by_platform(*arrays, tpu=plain, default=rows_first)
    pixels = (mean.reshape(b, fold, c // fold).mean(1) for mean in means)
    means = tuple(jnp.tile(pixel, fold)[:, None, None] for pixel in pixels)
    return means if inside is None else tuple(mean / inside.mean((1, 2, 3), keepdims=True) for mean in means)
