"""The U-Net of the field, fastMRI's baseline, written for XLA.

Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015; Zbontar et al., "fastMRI", arXiv:1811.08839. Given the same weights,
`UNet(pool="avg")` computes what `fastmri.models.Unet` computes, for odd sizes too.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mrjax.errors import UserError

_EPSILON = 1e-5
_SLOPE = 0.2
# Bounds of 1 / sqrt(fan in), PyTorch's default for convolutions, so that fastMRI's hyper-parameters carry over.
# PyTorch counts the fan-in of a transposed convolution over its output channels.
_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_UP_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2)


class UNet(nn.Module):
    """Image to image, (batch, height, width, 1) float32 to the same, for any height and width.

    Parameters, all float32: `down_<i>/conv_<0|1>/kernel` (3, 3, in, out), `bottleneck/conv_<0|1>/kernel`,
    `up_<i>/transpose/kernel` (2, 2, in, out), `up_<i>/conv_<0|1>/kernel`, `head/kernel` (channels, 1) and `head/bias`.
    Level i works at 1 / 2^i of the resolution on the way down and up alike; the first channels that `up_<i>/conv_0`
    sees are the upsampled ones.

    Attributes:
        channels: how many at full resolution; each level down has twice as many.
        levels: how often the resolution is halved.
        pool: "max", or "avg" as fastMRI has it.
        residual: whether the network computes a correction, which is then added to the input.
        dtype: of the activations, float32 or bfloat16; statistics and result are float32 either way.
    """

    channels: int = 32
    levels: int = 4
    pool: str = "max"
    residual: bool = False
    dtype: DTypeLike = jnp.float32

    @staticmethod
    def smallest_side(levels: int) -> int:
        """The least height or width that leaves 2 pixels after `levels` halvings: one pixel alone normalises to 0."""
        return 2 ** (levels + 1)

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """(batch, height, width, 1) float32 to the same."""
        if self.pool not in _POOLS:
            raise UserError(f"config.model.pool is {self.pool!r}, expected one of: {', '.join(_POOLS)}")
        x = image.astype(self.dtype)
        skips = []
        for level in range(self.levels):
            x = _Down(self.channels << level, self.dtype, name=f"down_{level}")(x)
            skips.append(x)
            x = _POOLS[self.pool](x)
        x = _Down(self.channels << self.levels, self.dtype, name="bottleneck")(x)
        for level in reversed(range(self.levels)):
            x = _Up(self.channels << level, self.dtype, name=f"up_{level}")(x, skips[level])
        # Not in bfloat16: its 8 bits would be the precision of the image.
        # A correction starts at nothing: the first steps improve on the input instead of finding it again.
        head_init = nn.initializers.zeros if self.residual else _INIT
        output = _Head(head_init, name="head")(x)
        return image + output if self.residual else output


class _Head(nn.Module):
    """A weighted sum of the channels: (batch, height, width, channels) to (batch, height, width, 1) float32.

    Not a matrix product, whose operand in float32 would be an array of its own.
    """

    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], 1), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (1,), jnp.float32)
        return (x.astype(jnp.float32) * kernel[:, 0]).sum(-1, keepdims=True) + bias


class _Down(nn.Module):
    """Two convolutions: (batch, height, width, in) to (batch, height, width, channels)."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _convolve_twice((x,), self.channels, self.dtype)


class _Up(nn.Module):
    """Upsamples, joins the skip and convolves: (b, h // 2, w // 2, 2c) and (b, h, w, c) to (b, h, w, c)."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, skip: Array) -> Array:
        x = _Transpose(self.channels, self.dtype, name="transpose")(x)
        x = normalise_and_activate(x)
        if x.shape != skip.shape:
            x = jnp.pad(x, [(0, s - u) for s, u in zip(skip.shape, x.shape, strict=True)], mode="reflect")
        return _convolve_twice((x, skip), self.channels, self.dtype)


class _Transpose(nn.Module):
    """The 2x2 transposed convolution of stride 2, (b, h, w, in) to (b, 2h, 2w, channels).

    No two of its windows overlap, so it is a dense layer and a depth-to-space: the same function without the
    convolution over a zero-filled image that XLA's CPU backend would run, a fifth to a half of the whole step.
    """

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        kernel = self.param("kernel", _UP_INIT, (2, 2, c, self.channels), jnp.float32).astype(self.dtype)
        dense = x @ kernel.transpose(2, 0, 1, 3).reshape(c, 4 * self.channels)
        blocks = dense.reshape(b, h, w, 2, 2, self.channels).transpose(0, 1, 3, 2, 4, 5)
        return blocks.reshape(b, 2 * h, 2 * w, self.channels)


def _convolve_twice(parts: tuple[Array, ...], channels: int, dtype: DTypeLike) -> Array:
    """Two 3x3 convolutions of the calling module, each normalised and activated; the first sees all channels."""
    for i in range(2):
        parts = (normalise_and_activate(_Convolution(channels, dtype, name=f"conv_{i}")(*parts)),)
    return parts[0]


class _Convolution(nn.Module):
    """A 3x3 convolution over the channels of all parts, (b, h, w, ...) to (b, h, w, channels)."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, *parts: Array) -> Array:
        counts = [part.shape[-1] for part in parts]
        kernel = self.param("kernel", _INIT, (3, 3, sum(counts), self.channels), jnp.float32).astype(self.dtype)
        kernels = jnp.split(kernel, np.cumsum(counts)[:-1], axis=2)
        return sum(map(_convolve, parts[1:], kernels[1:]), _convolve(parts[0], kernels[0]))


def _convolve(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def normalise_and_activate(x: Array) -> Array:
    """Instance norm without affine parameters (eps 1e-5), then LeakyReLU (0.2): (b, h, w, c) to the same dtype.

    Statistics are float32, in one pass over x: right for convolution outputs, whose mean is of the order of their
    standard deviation; the variance's relative error grows as 1e-7 (mean / deviation)^2.

    The gradient is written out because LeakyReLU can be undone: the backward pass needs only the result, which the
    next convolution keeps anyway, and the convolution's own output is never stored (28 % less memory for the whole
    float32 step, compiled for an H100). Bulo et al., "In-Place Activated BatchNorm", arXiv:1712.02616.
    """
    return _normalise_and_activate(x)[0]


def _normalise_and_activate(x: Array) -> tuple[Array, tuple[Array, Array]]:
    wide = x.astype(jnp.float32)
    mean, square = _mean(wide), _mean(wide * wide)
    scale = lax.rsqrt(jnp.maximum(square - mean * mean, 0) + _EPSILON)
    normal = (wide - mean) * scale
    result = jnp.where(normal >= 0, normal, _SLOPE * normal).astype(x.dtype)
    result = lax.optimization_barrier(result)
    return result, (result, scale)


def _normalise_and_activate_gradient(kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    result, scale = kept
    y, g = result.astype(jnp.float32), gradient.astype(jnp.float32)
    normal = jnp.where(y >= 0, y, y / _SLOPE)
    g = jnp.where(y >= 0, g, _SLOPE * g)
    return ((scale * (g - _mean(g) - normal * _mean(g * normal))).astype(gradient.dtype),)


normalise_and_activate.defvjp(_normalise_and_activate, _normalise_and_activate_gradient)


def _mean(x: Array) -> Array:
    return x.mean((1, 2), keepdims=True)


@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """2x2 maxima, (b, h, w, c) to (b, h // 2, w // 2, c); among equals the gradient is shared.

    Not `reduce_window`, whose gradient takes 5 to 12 times as long on a CPU and moves more memory on a GPU; and the
    places of the maxima are found again in the backward pass from two arrays that are kept anyway, not stored.
    """
    blocks = _blocks(x)
    rows = jnp.maximum(blocks[:, :, 0], blocks[:, :, 1])
    return jnp.maximum(rows[:, :, :, 0], rows[:, :, :, 1])


def _max_pool(x: Array) -> tuple[Array, tuple[Array, Array]]:
    pooled = max_pool(x)
    return pooled, (x, pooled)


def _max_pool_gradient(kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    x, pooled = kept
    greatest = _blocks(x) == pooled[:, :, None, :, None]
    share = gradient / greatest.sum((2, 4), dtype=gradient.dtype)
    blocks = jnp.where(greatest, share[:, :, None, :, None], 0)
    (b, h, w, c), (_, rows, columns, _) = x.shape, pooled.shape
    even = blocks.reshape(b, 2 * rows, 2 * columns, c)
    return (jnp.pad(even, [(0, 0), (0, h % 2), (0, w % 2), (0, 0)]),)


max_pool.defvjp(_max_pool, _max_pool_gradient)


def avg_pool(x: Array) -> Array:
    """2x2 means, (b, h, w, c) to (b, h // 2, w // 2, c)."""
    return _blocks(x).mean((2, 4))


_POOLS = {"max": max_pool, "avg": avg_pool}


def _blocks(x: Array) -> Array:
    """(b, h, w, c) to (b, h // 2, 2, w // 2, 2, c), an odd last row or column dropped."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
