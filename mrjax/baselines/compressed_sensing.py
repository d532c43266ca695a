"""A baseline that is not a network: compressed sensing, in the place of one."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mrjax.baselines import fista
from mrjax.baselines.espirit import espirit
from mrjax.mri.coils import adaptive_maps, root_sum_of_squares
from mrjax.mri.fourier import ifft2c


class CompressedSensing(nn.Module):
    """Sensitivities by ESPIRiT from the centre of k-space, then the sparse image that explains what was measured.

    It has no parameters: `apply({"params": {}}, kspace, mask, offset)`. Its magnitude is the root-sum-of-squares of the
    coils' images, as that of the targets. Where less than a block of the centre was measured, the sensitivities are the
    adaptive ones of the images that the central columns make.

    Attributes:
        regulariser: 'tv' or 'wavelet', see `mri.compressed_sensing.reconstruct`.
        weight: of the regulariser, in units of the normalised image.
        iterations: of FISTA.
        calibration: side of the square of k-space that ESPIRiT looks at, in samples.
        kernel: side of ESPIRiT's blocks, in samples: small, as 8x leaves few central columns to make blocks of.
    """

    regulariser: str = "tv"
    weight: float = 0.002
    iterations: int = 60
    calibration: int = 24
    kernel: int = 3

    input_names: ClassVar[tuple[str, ...]] = ("kspace", "mask", "offset")

    @nn.compact
    def __call__(self, kspace: jax.Array, mask: jax.Array, offset: jax.Array) -> jax.Array:
        """The normalised image, (batch, height, width, 1) float32: the magnitude less the offset.

        Args:
            kspace: (batch, coils, height, width) complex64, in units of the normalised image's scale.
            mask: (batch, 1 or height, width) bool, where it was measured.
            offset: (batch, 1, 1) float32, normalised.
        """
        sensitivities = jax.vmap(self._maps)(kspace, mask)
        image = jax.vmap(self._reconstruct)(kspace, mask, sensitivities)
        return (root_sum_of_squares(sensitivities * image[:, None]) - offset)[..., None]

    def _maps(self, kspace: jax.Array, mask: jax.Array) -> jax.Array:
        # Not cropped: the target has noise outside the object too.
        maps = espirit(kspace, mask, calibration=self.calibration, kernel=self.kernel, crop=0.0)
        width = kspace.shape[-1]
        central = abs(jnp.arange(width) - width // 2) <= self.kernel // 2
        return jnp.where(jnp.any(maps), maps, adaptive_maps(ifft2c(jnp.where(central, kspace, 0))))

    def _reconstruct(self, kspace: jax.Array, mask: jax.Array, maps: jax.Array) -> jax.Array:
        return fista.reconstruct(
            kspace, mask, maps, regulariser=self.regulariser, weight=self.weight, iterations=self.iterations
        )
