"""A U-Net whose last step is data consistency."""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mrjax.models.data_consistency import data_consistency, normalise_by_rss, root_sum_of_squares
from mrjax.models.unet import UNet
from mrjax.mri.fourier import fft2c, ifft2c


class ConsistentUNet(UNet):
    """The `UNet`, then soft data consistency (as in a cascade of Sriram et al., arXiv:2004.06688).

    The U-Net estimates a magnitude. With phase and coil profiles of the zero-filled coil images it becomes k-space,
    whose measured samples are moved towards the measurement by a learned share, the parameter `consistency` (1,), that
    starts at 1: samples are noisy, and the phase is an approximation. Coils that are zero everywhere change nothing.
    """

    input_names: ClassVar[tuple[str, ...]] = ("image", "kspace", "mask", "offset")

    @nn.compact
    def __call__(self, image: Array, kspace: Array, mask: Array, offset: Array) -> Array:  # type: ignore[override]
        """Reconstruct (batch, height, width, 1) float32 from `NetworkInputs`."""
        magnitude = super().__call__(image)[..., 0] + offset
        profiles = normalise_by_rss(ifft2c(kspace))
        weight = self.param("consistency", nn.initializers.ones, (1,), jnp.float32)
        consistent = data_consistency(fft2c(profiles * magnitude[:, None]), kspace, mask, weight)
        return (root_sum_of_squares(ifft2c(consistent)) - offset)[..., None]
