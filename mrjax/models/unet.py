"""The U-Net of the field, fastMRI's baseline, written for XLA.

Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015; Zbontar et al., "fastMRI", arXiv:1811.08839. Given the same weights,
`UNet(pool="avg")` computes what `fastmri.models.Unet` computes, for odd sizes too.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mrjax.errors import UserError
from mrjax.ops.convolution import convolve, multiply
from mrjax.ops.normalisation import (
    as_it_is,
    convolve_image,
    normalise_activate_and_weigh,
    normalise_activate_then,
    normalise_and_activate,
    one_backwards,
)
from mrjax.ops.pooling import avg_pool, max_pool

# Bounds of 1 / sqrt(fan in), PyTorch's default for convolutions, so that fastMRI's hyper-parameters carry over.
# PyTorch counts the fan-in of a transposed convolution over its output channels. Kernels of one shape share their code.
_shared = functools.partial(jax.jit, static_argnums=(1, 2))
_INIT = _shared(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))
_UP_INIT = _shared(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2))


def _max_pooled(x: Array, fold: int) -> tuple[Array, Array]:
    return x, max_pool(x, fold)


def _avg_pooled(x: Array, fold: int) -> tuple[Array, Array]:
    return x, avg_pool(x, fold)


_POOLED = {"max": _max_pooled, "avg": _avg_pooled}


class UNet(nn.Module):
    """Image to image, (batch, height, width, any channels) to (batch, height, width, out_channels), of any size.

    Parameters, all float32: `down_<i>/conv_<0|1>/kernel` (3, 3, in, out), `bottleneck/conv_<0|1>/kernel`,
    `up_<i>/transpose/kernel` (2, 2, in, out), `up_<i>/conv_<0|1>/kernel`, `head/kernel` (channels, out_channels) and
    `head/bias`.
    Level i works at 1 / 2^i of the resolution on the way down and up alike; the first channels that `up_<i>/conv_0`
    sees are the upsampled ones.

    Attributes:
        channels: how many at full resolution; each level down has twice as many.
        levels: how often the resolution is halved.
        pool: "max", or "avg" as fastMRI has it.
        out_channels: of the result.
        residual: whether the network computes a correction, which is then added to the first channel of the input.
        zero_head: whether the last layer starts at zero, as it does in a residual network.
        dtype: of the activations, float32 or bfloat16; statistics and result are float32 either way.
        remat: whether the backward pass computes each level's activations again from what enters the level, instead
            of keeping them.
        lanes: 128 on a TPU, whose memory is laid out in rows of 128 channels: pixels side by side are then kept and
            convolved as one, until they have that many, instead of being padded. 1 elsewhere.
    """

    channels: int = 32
    levels: int = 4
    pool: str = "max"
    out_channels: int = 1
    residual: bool = False
    zero_head: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    lanes: int = 1

    needs: ClassVar[tuple[str, ...]] = ("image",)

    @staticmethod
    def smallest_side(levels: int) -> int:
        """The least height or width that leaves 2 pixels after `levels` halvings: one pixel alone normalises to 0."""
        return 2 ** (levels + 1)

    @property
    def multiple(self) -> int:
        """Of this are the heights and widths at which every level has twice the pixels of the one below."""
        return 2**self.levels

    @nn.compact
    def __call__(self, image: Array, canvas: Array | None = None) -> Array:
        """(batch, height, width, any channels) float32 to (batch, height, width, out_channels) float32.

        Args:
            image: zero outside its canvas.
            canvas: (batch, 2) int32, height and width of the upper left part of each image that is there to the
                network, which gives in it what it would give for that part alone; all of it by default. These numbers
                and those of the whole are multiples of `multiple`.
        """
        if self.pool not in _POOLED:
            raise UserError(f"config.model.pool is {self.pool!r}, expected one of: {', '.join(_POOLED)}")
        down, up = (nn.remat(_Down), nn.remat(_Up)) if self.remat else (_Down, _Up)
        b, h, w, c = image.shape
        fits = not (
            h % 2**self.levels or w % 2**self.levels or w * self.channels % self.lanes or self.lanes % self.channels
        )
        folds = [max(self.lanes // (self.channels << level), 1) if fits else 1 for level in range(self.levels + 1)]
        inside = [
            None if canvas is None else _inside(canvas >> level, h >> level, w >> level, fold)
            for level, fold in enumerate(folds)
        ]
        x = image.astype(self.dtype).reshape(b, h, w // folds[0], folds[0] * c)
        skips = []
        for level in range(self.levels):
            place = (folds[level], level > 0 and folds[level - 1] > 1)
            block = down(self.channels << level, self.dtype, _POOLED[self.pool], *place, name=f"down_{level}")
            skip, x = block(x, inside[level])
            skips.append(skip)
        place = (folds[-1], folds[self.levels - 1] > 1)
        x = down(self.channels << self.levels, self.dtype, as_it_is, *place, name="bottleneck")(x, inside[-1])
        for level in range(self.levels - 1, 0, -1):
            one = up(self.channels << level, self.dtype, fold=folds[level], name=f"up_{level}")
            x = one(x, skips[level], inside[level])
        # A correction starts at nothing: the first steps improve on the input instead of finding it again.
        initial = nn.initializers.zeros if self.residual or self.zero_head else _INIT
        head = _Head(self.channels, self.out_channels, initial, name="head")()
        output = up(self.channels, self.dtype, fold=folds[0], name="up_0")(x, skips[0], inside[0], *head)
        return image[..., :1] + output if self.residual else output


class _Head(nn.Module):
    """The weights (channels, out) of the channels' sums that are the result, and their offsets (out,)."""

    channels: int
    out: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        kernel = _kernel(self, self.kernel_init, (self.channels, self.out))
        return kernel, self.param("bias", nn.initializers.zeros, (self.out,), jnp.float32)


class _Down(nn.Module):
    """Two convolutions, and what is made `then` of their result: (b, h, w, in) to `then` of (b, h, w, channels).

    `spaced` says that beside the channels of each pixel are as many that mean nothing, as `max_pool` leaves them.
    """

    channels: int
    dtype: DTypeLike
    then: Callable[..., Any] = as_it_is
    fold: int = 1
    spaced: bool = False

    @nn.compact
    def __call__(self, x: Array, inside: Array | None = None) -> Any:
        x = _convolve_twice((x,), self.channels, self.dtype, self.fold, inside, self.spaced)
        return normalise_activate_then(self.then, self.fold, x, inside)


class _Up(nn.Module):
    """Upsamples, joins the skip and convolves: (b, h // 2, w // 2, 2c) and (b, h, w, c) to (b, h, w, c).

    With weights of the channels' sums and their offsets, to these sums, (b, h, w, out) float32.
    """

    channels: int
    dtype: DTypeLike
    fold: int = 1

    @nn.compact
    def __call__(self, x: Array, skip: Array, inside: Array | None = None, *weights: Array) -> Array:
        x = _Transpose(self.channels, self.dtype, self.fold, name="transpose")(x)
        x = normalise_and_activate(x, self.fold, inside)
        if x.shape != skip.shape:
            x = jnp.pad(x, [(0, s - u) for s, u in zip(skip.shape, x.shape, strict=True)], mode="reflect")
        x = _convolve_twice((x, skip), self.channels, self.dtype, self.fold, inside)
        if weights:
            return normalise_activate_and_weigh(self.fold, x, inside, *weights)
        return normalise_and_activate(x, self.fold, inside)


class _Transpose(nn.Module):
    """The 2x2 transposed convolution of stride 2, (b, h, w, in) to (b, 2h, 2w, channels).

    No two of its windows overlap, so it is a dense layer and a depth-to-space: the same function without the
    convolution over a zero-filled image that XLA's CPU backend would run, a fifth to a half of the whole step.
    """

    channels: int
    dtype: DTypeLike
    fold: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        before = max(self.fold // 2, 1)
        kernel = _kernel(self, _UP_INIT, (2, 2, c // before, self.channels)).astype(self.dtype)
        x, kernel = one_backwards((x, kernel))
        if self.fold == 1:
            dense = multiply(x, kernel.transpose(2, 0, 1, 3).reshape(c, 4 * self.channels))
            blocks = dense.reshape(b, h, w, 2, 2, self.channels).transpose(0, 1, 3, 2, 4, 5)
            return blocks.reshape(b, 2 * h, 2 * w, self.channels)
        weights = jnp.einsum("rkco,ij->ricjko", kernel, np.eye(before, dtype=self.dtype)).reshape(2, 1, c, -1)
        # Between the rows a convolution sees zeros, which a TPU skips, and no row is moved to its place.
        return lax.conv_transpose(x, weights[::-1], (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_twice(
    parts: tuple[Array, ...],
    channels: int,
    dtype: DTypeLike,
    fold: int,
    inside: Array | None,
    spaced: bool = False,
) -> Array:
    """Two 3x3 convolutions of the calling module, the first normalised and activated; it sees all channels."""
    first = _Convolution(channels, dtype, fold, spaced, name="conv_0")
    if parts[0].shape[-1] == 1:
        x = convolve_image(parts[0], first.kernel_of(1), inside)
    else:
        x = normalise_and_activate(first(*parts), fold, inside)
    return _Convolution(channels, dtype, fold, name="conv_1")(x)


class _Convolution(nn.Module):
    """A 3x3 convolution over the channels of all parts, (b, h, w, ...) to (b, h, w, channels)."""

    channels: int
    dtype: DTypeLike
    fold: int = 1
    spaced: bool = False

    @nn.compact
    def kernel_of(self, channels: int) -> Array:
        """The kernel (3, 3, channels, self.channels)."""
        return _kernel(self, _INIT, (3, 3, channels, self.channels)).astype(self.dtype)

    def __call__(self, *parts: Array) -> Array:
        counts = [part.shape[-1] // self.fold // (1 + self.spaced) for part in parts]
        parts, kernel = one_backwards((parts, self.kernel_of(sum(counts))))
        kernels = [_folded(part, self.fold, self.spaced) for part in jnp.split(kernel, np.cumsum(counts)[:-1], axis=2)]
        return sum(map(convolve, parts[1:], kernels[1:]), convolve(parts[0], kernels[0]))


def _kernel(module: nn.Module, initial: Initializer, shape: tuple[int, ...]) -> Array:
    """The parameter `kernel` of the calling module, float32.

    Not by `param` where there is one, which traces once more how it was drawn, to compare shapes: a run starts later.
    """
    if module.has_variable("params", "kernel"):
        return module.get_variable("params", "kernel")
    return module.param("kernel", initial, shape, jnp.float32)


def _folded(kernel: Array, fold: int, spaced: bool) -> Array:
    """(3, 3, in, out) to (3, 3, fold in, fold out): the same, of images with `fold` pixels as one.

    Of `spaced` pixels (3, 3, fold 2 in, fold out), whose weights for what means nothing are zero.
    """
    if spaced:
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, kernel.shape[2]), (0, 0)))
    if fold == 1:
        return kernel
    block, source, target = np.ogrid[-1:2, :fold, :fold]
    shift = block * fold + source - target
    where = np.stack([shift == d for d in (-1, 0, 1)])
    wide = jnp.einsum("ydco,dkij->ykicjo", kernel, where.astype(kernel.dtype))
    return wide.reshape(3, 3, fold * kernel.shape[2], fold * kernel.shape[3])


def _inside(canvas: Array, height: int, width: int, fold: int) -> Array:
    """The pixels of each canvas (b, 2), (b, height, width // fold, fold) bool."""
    rows, columns = (jnp.arange(count) < canvas[:, axis, None] for axis, count in enumerate((height, width)))
    return (rows[:, :, None] & columns[:, None]).reshape(-1, height, width // fold, fold)
