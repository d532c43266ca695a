"""What each operation computes on images (batch, height, width, channels): the tuned ones are held to this by tests."""

import jax
import jax.numpy as jnp
from jax import Array, lax

EPSILON = 1e-5
SLOPE = 0.2
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolve(x: Array, kernel: Array) -> Array:
    """Convolve, zero-padded: kernel (side, side, in, out); a kernel of side 1 is a matrix product."""
    if kernel.shape[:2] == (1, 1):
        return x @ kernel[0, 0]
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def norm_act(x: Array) -> Array:
    """Apply instance norm without affine parameters (eps 1e-5), then LeakyReLU (slope 0.2)."""
    mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
    return jax.nn.leaky_relu((x - mean) * lax.rsqrt(variance + EPSILON), SLOPE)


def norm_act_conv1x1(x: Array, kernel: Array, bias: Array) -> Array:
    """Apply `norm_act`, then a 1x1 convolution: kernel (in, out), bias (out,)."""
    return jnp.dot(norm_act(x), kernel, precision="highest") + bias


def max_pool(x: Array) -> Array:
    """Take the maximum of each 2x2 block; an odd last row or column is dropped."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def avg_pool(x: Array) -> Array:
    """Take the mean of each 2x2 block; an odd last row or column is dropped."""
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def upsample(x: Array, kernel: Array) -> Array:
    """Apply a transposed convolution of stride 2: kernel (2, 2, in, out), twice the height and width."""
    return lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "VALID", dimension_numbers=DIMENSIONS)
