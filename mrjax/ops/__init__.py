"""The operations that networks are made of, on feature maps: (batch, height, width, channels).

What is tuned for a platform stays in this package; `reference` says in a few lines what each operation computes.
"""

from mrjax.ops.convolution import convolve
from mrjax.ops.features import FeatureMap, concatenate, feature_map, pad_like
from mrjax.ops.normalisation import conv_norm_act, norm_act, norm_act_conv1x1
from mrjax.ops.pooling import avg_pool, max_pool
from mrjax.ops.upsampling import upsample

__all__ = [
    "FeatureMap",
    "avg_pool",
    "concatenate",
    "conv_norm_act",
    "convolve",
    "feature_map",
    "max_pool",
    "norm_act",
    "norm_act_conv1x1",
    "pad_like",
    "upsample",
]
