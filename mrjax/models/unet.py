"""The U-Net of Ronneberger et al. (MICCAI 2015) as fastMRI's baseline has it (Zbontar et al., arXiv:1811.08839).

Given the same weights, `UNet(pool="avg")` computes what `fastmri.models.Unet` computes, for odd sizes too.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mrjax import ops

# Bounds of 1 / sqrt(fan in), PyTorch's default for convolutions, so that fastMRI's hyper-parameters carry over.
# PyTorch counts the fan-in of a transposed convolution over its output channels.
CONV_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
TRANSPOSE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2)
POOLS = {"max": ops.max_pool, "avg": ops.avg_pool}


class UNet(nn.Module):
    """Image to image, of any size. Level i works at 1 / 2^i of the resolution on the way down and up alike.

    Parameters, all float32: `<down_<i>|bottleneck|up_<i>>/conv_<0|1>/kernel` (3, 3, in, out), `up_<i>/transpose/kernel`
    (2, 2, in, out), `head/kernel` (channels, out_channels) and `head/bias`.

    Attributes:
      channels: how many at full resolution; each level down has twice as many.
      levels: how often the resolution is halved.
      pool: "max", or "avg" as fastMRI has it.
      out_channels: of the result.
      residual: whether the network computes a correction, which is then added to the first channel of the input.
      zero_head: whether the last layer starts at zero, as it does in a residual network.
      dtype: of the activations, float32 or bfloat16; statistics and result are float32 either way.
      remat: whether the backward pass computes each level's activations again instead of storing them.
    """

    channels: int = 32
    levels: int = 4
    pool: str = "max"
    out_channels: int = 1
    residual: bool = False
    zero_head: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    input_names: ClassVar[tuple[str, ...]] = ("image",)

    @staticmethod
    def smallest_side(levels: int) -> int:
        """Return the least height or width that leaves 2 pixels after `levels` halvings: one pixel normalises to 0."""
        return 2 ** (levels + 1)

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """Map (batch, height, width, any channels) float32 to (batch, height, width, out_channels) float32."""
        down, up = (nn.remat(_Down), nn.remat(_Up)) if self.remat else (_Down, _Up)
        x = ops.feature_map(image, self.dtype, self.channels, self.levels)
        skips = []
        for level in range(self.levels):
            skip, x = down(self.channels << level, self.pool, name=f"down_{level}")(x)
            skips.append(skip)
        x = down(self.channels << self.levels, name="bottleneck")(x)
        for level in range(self.levels - 1, 0, -1):
            x = up(self.channels << level, name=f"up_{level}")(x, skips[level])
        # A correction starts at zero: the first steps improve on the input instead of finding it again.
        init = nn.initializers.zeros if self.residual or self.zero_head else CONV_INIT
        head = _Kernel((self.channels, self.out_channels), init, bias=True, name="head")()
        output = up(self.channels, name="up_0")(x, skips[0], head)
        return image[..., :1] + output if self.residual else output


class _Down(nn.Module):
    """Convolve twice; with a pool, give the skip connection and its pooled form."""

    channels: int
    pool: str | None = None

    @nn.compact
    def __call__(self, x: ops.FeatureMap) -> Any:
        x = _convolve_twice(x, x.channels, self.channels)
        return ops.norm_act(x, epilogue=POOLS[self.pool]) if self.pool else ops.norm_act(x)


class _Up(nn.Module):
    """Upsample, concatenate the skip connection, convolve twice; with the kernel and bias of a head, apply it."""

    channels: int

    @nn.compact
    def __call__(self, x: ops.FeatureMap, skip: ops.FeatureMap, head: tuple[Array, ...] = ()) -> Any:
        kernel = _Kernel((2, 2, x.channels, self.channels), TRANSPOSE_INIT, name="transpose")()
        x = ops.norm_act(ops.upsample(x, kernel, like=skip))
        x = _convolve_twice((ops.pad_like(x, skip), skip), 2 * self.channels, self.channels)
        return ops.norm_act_conv1x1(x, *head) if head else ops.norm_act(x)


def _convolve_twice(x: ops.FeatureMap | tuple[ops.FeatureMap, ...], channels: int, out: int) -> ops.FeatureMap:
    """Convolve, normalise, activate and convolve, in the module that is being called."""
    x = ops.conv_norm_act(x, _Kernel((3, 3, channels, out), name="conv_0")())
    return ops.convolve(x, _Kernel((3, 3, out, out), name="conv_1")())


class _Kernel(nn.Module):
    """Hold the kernel of a convolution, float32, and if need be its bias."""

    shape: tuple[int, ...]
    initializer: Initializer = CONV_INIT
    bias: bool = False

    @nn.compact
    def __call__(self) -> Any:
        bias = self.param("bias", nn.initializers.zeros, self.shape[-1:]) if self.bias else None
        kernel = self.param("kernel", self.initializer, self.shape)
        return (kernel, bias) if self.bias else kernel
