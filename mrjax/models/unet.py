"""The U-Net of Ronneberger et al. (MICCAI 2015) as fastMRI's baseline has it (Zbontar et al., arXiv:1811.08839).

Given the same weights, `UNet(pool="avg")` computes what `fastmri.models.Unet` computes, for odd sizes too.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mrjax.ops.convolution import convolve, upsample
from mrjax.ops.features import FeatureMap, feature_map, pad_like
from mrjax.ops.normalisation import conv_norm_act, norm_act, norm_act_conv1x1
from mrjax.ops.pooling import avg_pool, max_pool

# Bounds of 1 / sqrt(fan in), PyTorch's default for convolutions, so that fastMRI's hyper-parameters carry over.
# PyTorch counts the fan-in of a transposed convolution over its output channels.
CONV_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
TRANSPOSE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2)
POOLS = {"max": max_pool, "avg": avg_pool, None: None}


class UNet(nn.Module):
    """Image to image, of any size. Level i works at 1 / 2^i of the resolution on the way down and up alike.

    Parameters, all float32: `<down_<i>|bottleneck|up_<i>>/conv_<0|1>/kernel` (3, 3, in, out), `up_<i>/transpose/kernel`
    (2, 2, in, out), `head/kernel` (channels, out_channels) and `head/bias`.
    """

    channels: int = 32  # at full resolution; each level down has twice as many
    levels: int = 4  # how often the resolution is halved
    pool: str = "max"  # or "avg", as fastMRI has it
    out_channels: int = 1
    residual: bool = False  # compute a correction, which is then added to the first channel of the input
    zero_head: bool = False  # start the last layer at zero, as in a residual network
    dtype: DTypeLike = jnp.float32  # of the activations, or bfloat16; statistics and result are float32 either way
    remat: bool = False  # compute each level's activations again in the backward pass instead of storing them

    input_names: ClassVar[tuple[str, ...]] = ("image",)

    @staticmethod
    def smallest_side(levels: int) -> int:
        """Return the least height or width that leaves 2 pixels after `levels` halvings: one pixel normalises to 0."""
        return 2 ** (levels + 1)

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """Map (batch, height, width, any channels) float32 to (batch, height, width, out_channels) float32."""
        level = nn.remat(_Level) if self.remat else _Level
        x = feature_map(image, self.dtype, self.channels, self.levels)
        skips = []
        for i in range(self.levels):
            skip, x = level(self.channels << i, self.pool, name=f"down_{i}")(x)
            skips.append(skip)
        x = level(self.channels << self.levels, name="bottleneck")(x)
        for i in range(self.levels - 1, 0, -1):
            x = level(self.channels << i, name=f"up_{i}")(x, skips[i])
        # A correction starts at zero: the first steps improve on the input instead of finding it again.
        init = nn.initializers.zeros if self.residual or self.zero_head else CONV_INIT
        head = _Kernel((self.channels, self.out_channels), init, bias=True, name="head")()
        output = level(self.channels, name="up_0")(x, skips[0], head)
        return image[..., :1] + output if self.residual else output


class _Level(nn.Module):
    """Convolve twice; given a skip connection, upsample before and concatenate it.

    With a pool, return the result and its pooled form; given the kernel and bias of a head, apply it.
    """

    channels: int
    pool: str | None = None

    @nn.compact
    def __call__(self, x: FeatureMap, skip: FeatureMap | None = None, head: tuple[Array, ...] = ()) -> Any:
        parts = [x]
        if skip is not None:
            kernel = _Kernel((2, 2, x.channels, self.channels), TRANSPOSE_INIT, name="transpose")()
            parts = [pad_like(norm_act(upsample(x, kernel, like=skip)), skip), skip]
        channels = sum(part.channels for part in parts)
        x = conv_norm_act(parts, _Kernel((3, 3, channels, self.channels), name="conv_0")())
        x = convolve([x], _Kernel((3, 3, self.channels, self.channels), name="conv_1")())
        return norm_act_conv1x1(x, *head) if head else norm_act(x, POOLS[self.pool])


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
