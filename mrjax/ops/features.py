"""Feature maps: what the layers of a network pass on, stored as the platform computes it fastest.

A TPU pads the channels to rows of 128 lanes. There neighbouring pixels of a row are packed into the channel axis until
they fill the lanes, and are convolved as one pixel with more channels. Elsewhere a feature map is an array, no more.
"""

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike

from mrjax.ops.platform import traced_platform

LANES = {"tpu": 128}  # other platforms have no use for packing


class FeatureMap(struct.PyTreeNode):
    """Activations, (batch, height, width, channels) to whoever uses them, with pixels packed where that pays."""

    data: Array  # (batch, height, width / lane_pack, lane_pack * channels), float32 or bfloat16
    lane_pack: int = struct.field(pytree_node=False, default=1)  # how many pixels side by side are stored as one
    # Whether as many meaningless channels, left by pooling, follow those of each pixel in the last axis.
    spaced: bool = struct.field(pytree_node=False, default=False)

    @property
    def channels(self) -> int:
        """How many channels each pixel has."""
        return self.data.shape[-1] // self.lane_pack // (2 if self.spaced else 1)


def feature_map(image: Array, dtype: DTypeLike, channels: int, levels: int) -> FeatureMap:
    """Make a feature map of an image (batch, height, width, any channels).

    The network that it is for has `channels` at full resolution, and halves the resolution `levels` times.
    """
    b, h, w, c = image.shape
    lanes = LANES.get(traced_platform(), 1)
    fits = h % 2**levels == w % 2**levels == lanes % channels == w * channels % lanes == 0
    lane_pack = lanes // channels if fits else 1
    return FeatureMap(image.astype(dtype).reshape(b, h, w // lane_pack, lane_pack * c), lane_pack)


def pad_like(x: FeatureMap, like: FeatureMap) -> FeatureMap:
    """Pad by reflection, below and on the right, to the height and width of `like` (odd sizes lose a pixel each)."""
    missing = [(0, there - here) for there, here in zip(like.data.shape, x.data.shape, strict=True)]
    return x.replace(data=jnp.pad(x.data, missing, mode="reflect")) if any(after for _, after in missing) else x
