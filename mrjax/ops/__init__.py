"""The operations that networks are made of, on feature maps: (batch, height, width, channels).

What is tuned for a platform stays in this package; `reference` says in a few lines what each operation computes.
"""

from mrjax.ops.convolution import convolve as convolve
from mrjax.ops.convolution import upsample as upsample
from mrjax.ops.features import FeatureMap as FeatureMap
from mrjax.ops.features import feature_map as feature_map
from mrjax.ops.features import pad_like as pad_like
from mrjax.ops.normalisation import conv_norm_act as conv_norm_act
from mrjax.ops.normalisation import norm_act as norm_act
from mrjax.ops.normalisation import norm_act_conv1x1 as norm_act_conv1x1
from mrjax.ops.pooling import avg_pool as avg_pool
from mrjax.ops.pooling import max_pool as max_pool
