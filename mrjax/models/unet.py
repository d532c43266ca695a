"""The U-Net of the field: fastMRI's baseline network, written for XLA.

Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015; Zbontar et al., "fastMRI", arXiv:1811.08839. Given the same weights,
`pool='avg'` computes what `fastmri.models.Unet` computes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jax.typing import DTypeLike

from mrjax.errors import UserError

_EPSILON = 1e-5
_SLOPE = 0.2
# The uniform distribution of PyTorch's convolutions, so that fastMRI's hyper-parameters carry over.
_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class UNet(nn.Module):
    """Image to image, (batch, height, width, 1) float32 to the same, for any height and width.

    Parameters, all float32: `down_<i>/conv_<0|1>/kernel` (3, 3, in, out), `bottleneck/conv_<0|1>/kernel`,
    `up_<i>/up/kernel` (2, 2, in, out), `up_<i>/conv_<0|1>/kernel` and `head/{kernel,bias}` (channels, 1). Level i
    works at 1 / 2^i of the resolution, down and up alike; `up_<i>/conv_0` sees the upsampled channels first.

    Attributes:
        channels: of the full resolution; each level down has twice as many.
        levels: how often the resolution is halved.
        pool: 'max', or 'avg' as fastMRI has it.
        residual: whether the network's output is a correction, added to the input.
        dtype: of the activations, float32 or bfloat16; statistics and the result are float32 either way.
    """

    channels: int = 32
    levels: int = 4
    pool: str = "max"
    residual: bool = False
    dtype: DTypeLike = jnp.float32

    @staticmethod
    def smallest_side(levels: int) -> int:
        """The least height or width that `levels` halvings leave with something to normalise: 2 pixels."""
        return 2 ** (levels + 1)

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """(batch, height, width, 1) float32 to the same shape and dtype."""
        if self.pool not in _POOLS:
            raise UserError(f"config.model.pool is {self.pool!r}, expected one of: {', '.join(_POOLS)}")
        pool = _POOLS[self.pool]
        x = image.astype(self.dtype)
        skips = []
        for level in range(self.levels):
            x = _ConvBlock(self.channels << level, self.dtype, name=f"down_{level}")(x)
            skips.append(x)
            x = pool(x)
        x = _ConvBlock(self.channels << self.levels, self.dtype, name="bottleneck")(x)
        for level in reversed(range(self.levels)):
            x = _UpBlock(self.channels << level, self.dtype, name=f"up_{level}")(x, skips[level])
        output = nn.Dense(1, dtype=self.dtype, kernel_init=_INIT, name="head")(x).astype(jnp.float32)
        return image + output if self.residual else output


class _ConvBlock(nn.Module):
    """Two 3x3 convolutions, each normalised and activated: (batch, height, width, in) to (..., channels)."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(2):
            conv = nn.Conv(
                self.channels, (3, 3), padding=1, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name=f"conv_{i}"
            )
            x = normalise_and_activate(conv(x))
        return x


class _UpBlock(_ConvBlock):
    """Doubles the resolution of `x`, meets the skip at it: (b, h/2, w/2, 2c), (b, h, w, c) to (b, h, w, c)."""

    @nn.compact
    def __call__(self, x: Array, skip: Array) -> Array:
        x = _Upsample(self.channels, self.dtype, name="up")(x)
        missing = [(0, s - u) for s, u in zip(skip.shape[1:3], x.shape[1:3], strict=True)]
        if any(after for _, after in missing):
            x = jnp.pad(x, [(0, 0), *missing, (0, 0)], mode="reflect")
        return super().__call__(jnp.concatenate([x, skip], axis=-1))
