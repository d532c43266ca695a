"""Instance norm and LeakyReLU fused with the operations around them, with gradients that store and move little.

Most of what a training step of a U-Net moves are the activations on either side of a normalisation. How often they are
stored and read is decided here: by gradients written out, and by barriers to what XLA stores or computes again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mrjax.ops.convolution import convolve, convolve_array
from mrjax.ops.features import FeatureMap
from mrjax.ops.platform import by_platform, optimization_barrier
from mrjax.ops.reference import EPSILON, SLOPE

Epilogue = Callable[[FeatureMap], Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def norm_act(x: FeatureMap, epilogue: Epilogue | None = None) -> Any:
    """Apply instance norm without affine parameters (eps 1e-5), then LeakyReLU (slope 0.2), in the dtype of x.

    Statistics are float32, in one pass over x: right for convolution outputs, whose mean is of the order of their
    standard deviation; the variance's relative error grows as 1e-7 (mean / deviation)^2.

    The gradient inverts LeakyReLU: it needs only the result, which the next convolution stores anyway, and the output
    of the convolution before is never stored (28 % less memory for the whole float32 step, compiled for an H100). Bulo
    et al., "In-Place Activated BatchNorm", arXiv:1712.02616.

    With an epilogue, as `max_pool`, return (result, epilogue(result)).
    """
    return _norm_act_fwd(x, epilogue)[0]


def _norm_act_fwd(x: FeatureMap, epilogue: Epilogue | None) -> tuple[Any, Any]:
    mean, scale = _statistics(x.lane_pack, x.data)
    # Without the barrier XLA stores the float32 form of this array for later.
    y = x.replace(data=optimization_barrier(_activate(x.data, mean, scale).astype(x.data.dtype)))
    output, pullback = jax.vjp(lambda y: (y, epilogue(y)) if epilogue else y, y)
    return output, (y, scale, pullback)


def _norm_act_bwd(epilogue: Epilogue | None, residuals: Any, cotangent: Any) -> tuple[FeatureMap]:
    y, scale, pullback = residuals

    def values_and_gradients(y: FeatureMap, pullback: Any, cotangent: Any) -> tuple[Array, Array]:
        (gradient,) = pullback(cotangent)
        return y.data.astype(jnp.float32), gradient.data.astype(jnp.float32)

    inputs = y, pullback, cotangent
    values, gradients = values_and_gradients(*inputs)
    # The slope of LeakyReLU cancels from the product, (slope * gradient) (value / slope).
    mean, product = _channel_means(y.lane_pack, _leaky_gradient(values, gradients), gradients * values)
    gradient = _input_gradient(values_and_gradients, inputs, mean, product, scale)
    return (y.replace(data=gradient.astype(y.data.dtype)),)


norm_act.defvjp(_norm_act_fwd, _norm_act_bwd)


@jax.custom_vjp
def norm_act_conv1x1(x: FeatureMap, kernel: Array, bias: Array) -> Array:
    """Apply `norm_act`, then a 1x1 convolution: kernel (in, out), bias (out,) to (batch, height, width, out) float32.

    Not in bfloat16, whose 8 bits would be the precision of the image. For the gradient the activations, which nothing
    else needs, are computed again from x; the kernel's is made of sums that the normalisation's needs anyway.
    """
    return _norm_act_conv1x1_fwd(x, kernel, bias)[0]


def _norm_act_conv1x1_fwd(x: FeatureMap, kernel: Array, bias: Array) -> tuple[Array, Any]:
    mean, scale = _statistics(x.lane_pack, x.data)
    y, pack, out = _activate(x.data, mean, scale), x.lane_pack, len(bias)
    if pack == 1:
        # Not a matrix product, whose float32 operand would be stored.
        result = jnp.concatenate([(y * kernel[:, o]).sum(-1, keepdims=True) for o in range(out)], -1)
    else:
        b, h, w, _ = y.shape
        weights = jnp.einsum("co,ij->icjo", kernel, np.eye(pack, dtype=np.float32)).reshape(-1, pack * out)
        result = jnp.dot(y, weights, precision="highest").reshape(b, h, w * pack, out)
    return result + bias, (x, mean, scale, kernel)


def _norm_act_conv1x1_bwd(residuals: Any, cotangent: Array) -> tuple[FeatureMap, Array, Array]:
    x, mean, scale, kernel = residuals
    pack, (channels, out) = x.lane_pack, kernel.shape

    def weighted_sum(terms: list[Array]) -> Array:
        return sum((term * jnp.tile(kernel[:, o], pack) for o, term in enumerate(terms)), jnp.float32(0))

    def values_and_gradients(data: Array, cotangent: Array) -> tuple[Array, Array, list[Array]]:
        """The activations, their gradients, and the gradient of each output at every channel."""
        pixels = cotangent.reshape(*data.shape[:3], pack, out)
        ones = np.repeat(np.eye(pack, dtype=np.float32), channels, 1)
        each = [pixels[..., o] if pack == 1 else jnp.dot(pixels[..., o], ones, precision="high") for o in range(out)]
        return _activate(data, mean, scale), weighted_sum(each), each

    inputs = x.data, cotangent
    values, gradients, each = values_and_gradients(*inputs)
    products = (values * gradient for gradient in each)
    gradient_mean, *means = _channel_means(pack, _leaky_gradient(values, gradients), *products)
    count = cotangent.shape[1] * cotangent.shape[2]
    kernel_gradient = jnp.stack([(mean * count).sum((0, 1, 2))[:channels] for mean in means], -1)
    gradient = _input_gradient(values_and_gradients, inputs, gradient_mean, weighted_sum(means), scale)
    return x.replace(data=gradient.astype(x.data.dtype)), kernel_gradient, cotangent.sum((0, 1, 2))


norm_act_conv1x1.defvjp(_norm_act_conv1x1_fwd, _norm_act_conv1x1_bwd)


def conv_norm_act(parts: Sequence[FeatureMap], kernel: Array) -> FeatureMap:
    """Apply a 3x3 convolution, instance norm and LeakyReLU: `norm_act(convolve(parts, kernel))`."""
    if len(parts) == 1 and parts[0].data.shape[-1] == 1:
        kernel = kernel.astype(parts[0].data.dtype)
        return by_platform(*parts, kernel, cpu=lambda x, k: norm_act(convolve([x], k)), default=_conv_norm_act_image)
    return norm_act(convolve(parts, kernel))


@jax.custom_vjp
def _conv_norm_act_image(x: FeatureMap, kernel: Array) -> FeatureMap:
    """Convolve an image (b, h, w, 1), normalise and activate: kernel (3, 3, 1, c).

    Nine products of a small image cost less than to store and read their sum: they are computed twice, for the
    statistics and for the result, in one pass over arrays of c channels instead of four.
    """
    return _conv_norm_act_image_fwd(x, kernel)[0]


def _conv_norm_act_image_fwd(x: FeatureMap, kernel: Array) -> tuple[FeatureMap, Any]:
    image = optimization_barrier(x.data)
    mean, scale = _statistics(1, _sum_of_products(image, kernel))
    again, mean, scale = optimization_barrier((image, mean, scale))
    y = x.replace(data=_activate(_sum_of_products(again, kernel), mean, scale).astype(image.dtype))
    return y, (image, kernel, optimization_barrier(y), scale)


def _conv_norm_act_image_bwd(residuals: Any, cotangent: FeatureMap) -> tuple[FeatureMap, Array]:
    image, kernel, y, scale = residuals
    (gradient,) = _norm_act_bwd(None, (y, scale, jax.vjp(lambda y: y, y)[1]), cotangent)
    image_gradient, kernel_gradient = jax.vjp(convolve_array, image, kernel)[1](gradient.data)
    return y.replace(data=image_gradient), kernel_gradient


_conv_norm_act_image.defvjp(_conv_norm_act_image_fwd, _conv_norm_act_image_bwd)


def _sum_of_products(image: Array, kernel: Array) -> Array:
    """Convolve an image of one channel, 3x3 and zero-padded, in float32."""
    h, w = image.shape[1:3]
    padded = jnp.pad(image.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    weights = kernel.astype(jnp.float32)
    return sum((padded[:, i : i + h, j : j + w] * weights[i, j] for i in range(3) for j in range(3)), jnp.float32(0))


def _statistics(lane_pack: int, x: Array) -> tuple[Array, Array]:
    """Compute mean and 1 / deviation of each channel of each image, (b, 1, 1, c) float32."""
    x = x.astype(jnp.float32)
    mean, square = _channel_means(lane_pack, x, x * x)
    return mean, lax.rsqrt(jnp.maximum(square - mean * mean, 0) + EPSILON)


def _activate(x: Array, mean: Array, scale: Array) -> Array:
    normal = (x.astype(jnp.float32) - mean) * scale
    return jnp.where(normal >= 0, normal, SLOPE * normal)


def _leaky_gradient(y: Array, gradient: Array) -> Array:
    return jnp.where(y >= 0, gradient, SLOPE * gradient)


def _input_gradient(recompute: Callable[..., Any], inputs: Any, mean: Array, product: Array, scale: Array) -> Array:
    """Take the gradient of the activations y back through activation and normalisation, in float32.

    `mean` is that of the normalised values' gradient, `product` of this times the normalised values. With the barrier
    XLA computes y and its gradient from the inputs a second time instead of storing them, which moves less memory.
    """
    inputs, mean, product = optimization_barrier((inputs, mean, product))
    y, gradient, *_ = recompute(*inputs)
    return scale * (jnp.where(y >= 0, gradient - y * product, SLOPE * gradient - y / SLOPE * product) - mean)


def _channel_means(lane_pack: int, *arrays: Array) -> tuple[Array, ...]:
    """Average over height, width and packed pixels, (b, h, w, c) float32 to (b, 1, 1, c), all arrays in one pass.

    Sums along rows come first: into so short a reduction XLA fuses what computes its terms, at all levels of the
    network. On a TPU it adds up a convolution's result while computing it, if the reduction is a plain one.
    """
    b, _, w, c = arrays[0].shape

    def rows_first(*arrays: Array) -> tuple[Array, ...]:
        zeros = (jnp.float32(0),) * len(arrays)
        rows = lax.reduce(arrays, zeros, lambda x, y: tuple(map(jnp.add, x, y)), (2,))
        return tuple(row.mean(1) / w for row in rows)

    means = by_platform(*arrays, tpu=lambda *arrays: tuple(x.mean((1, 2)) for x in arrays), default=rows_first)
    pixels = (mean.reshape(b, lane_pack, c // lane_pack).mean(1) for mean in means)
    return tuple(jnp.tile(pixel, lane_pack)[:, None, None] for pixel in pixels)
