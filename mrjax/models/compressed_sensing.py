"""A baseline that is not a network: compressed sensing, in the place of one."""

import functools
from typing import ClassVar

import jax
from flax import linen as nn

from mrjax.mri import compressed_sensing
from mrjax.mri.coils import root_sum_of_squares
from mrjax.mri.espirit import espirit


class CompressedSensing(nn.Module):
    """Sensitivities by ESPIRiT from the centre of k-space, then the sparse image that explains what was measured.

    It has no parameters: `apply({"params": {}}, kspace, mask, offset)`. Its magnitude is the root-sum-of-squares of the
    coils' images, as that of the targets. Where fewer than `kernel` columns of the centre were measured there are no
    sensitivities, and each slice of zeros says so.

    Attributes:
        regulariser: 'tv' or 'wavelet', see `mri.compressed_sensing.reconstruct`.
        weight: of the regulariser, in units of the normalised image.
        iterations: of FISTA.
        calibration: side of the square of k-space that ESPIRiT looks at, in samples.
        kernel: side of ESPIRiT's blocks, in samples.
    """

    regulariser: str = "tv"
    weight: float = 0.002
    iterations: int = 50
    calibration: int = 24
    kernel: int = 4

    needs: ClassVar[tuple[str, ...]] = ("kspace", "mask", "offset")

    @nn.compact
    def __call__(self, kspace: jax.Array, mask: jax.Array, offset: jax.Array) -> jax.Array:
        """The normalised image, (batch, height, width, 1) float32: the magnitude less the offset.

        Args:
            kspace: (batch, coils, height, width) complex64, in units of the normalised image's scale.
            mask: (batch, 1 or height, width) bool, where it was measured.
            offset: (batch, 1, 1) float32, normalised.
        """
        # Not cropped: the target has noise outside the object too.
        maps = jax.vmap(functools.partial(espirit, calibration=self.calibration, kernel=self.kernel, crop=0.0))
        how = {"regulariser": self.regulariser, "weight": self.weight, "iterations": self.iterations}
        sensitivities = maps(kspace, mask)
        image = jax.vmap(functools.partial(compressed_sensing.reconstruct, **how))(kspace, mask, sensitivities)
        return (root_sum_of_squares(sensitivities * image[:, None]) - offset)[..., None]
