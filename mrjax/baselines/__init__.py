"""The methods that need no training by name: a new one is a class like these and an entry in `METHODS`.

A method is a module without parameters, called as a network is (see `mrjax.models`).
"""

from typing import ClassVar

import jax
from flax import linen as nn
from jax import Array

from mrjax.mri import compressed_sensing, sense
from mrjax.mri.coils import root_sum_of_squares
from mrjax.mri.noise import estimate_sigma


class ZeroFilling(nn.Module):
    """Take the samples that were not measured for zero."""

    input_names: ClassVar[tuple[str, ...]] = ("image",)

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """Return the corrupted image, (batch, height, width, 1), unchanged."""
        return image


class Sense(nn.Module):
    """Estimate sensitivities by ESPIRiT, then solve for the image by conjugate gradients.

    Its magnitude is the root-sum-of-squares of the coils' images, as that of the targets.
    """

    weight: float | None = None  # of the regularisation, for images of range 1; None: chosen by the noise
    iterations: int = 30

    input_names: ClassVar[tuple[str, ...]] = ("kspace", "mask", "offset")

    @nn.compact
    def __call__(self, kspace: Array, mask: Array, offset: Array) -> Array:
        """Reconstruct normalised images, (batch, height, width, 1) float32: the magnitude minus `offset` (batch, 1, 1).

        `kspace` (batch, coils, height, width) complex64 is in units of the normalised image's scale.
        """

        def magnitude(kspace: Array, mask: Array) -> Array:
            sigma = estimate_sigma(kspace, mask)
            maps = sense.estimate_maps(kspace, mask, sigma)
            return root_sum_of_squares(maps * self.solve(kspace, mask, maps, sigma))

        return (jax.vmap(magnitude)(kspace, mask) - offset)[..., None]

    def solve(self, kspace: Array, mask: Array, maps: Array, sigma: Array) -> Array:
        """Solve for the image of one slice, with noise of this sigma."""
        weight = sense.wiener_weight(kspace, mask, sigma) if self.weight is None else self.weight
        return sense.conjugate_gradient(kspace, mask, maps, weight=weight, iterations=self.iterations)


class CompressedSensing(Sense):
    """Estimate sensitivities by ESPIRiT, then solve for the image of least total variation by FISTA."""

    iterations: int = 60

    def solve(self, kspace: Array, mask: Array, maps: Array, sigma: Array) -> Array:
        """Solve for the image of one slice, with noise of this sigma."""
        weight = compressed_sensing.noise_weight(mask, sigma) if self.weight is None else self.weight
        return compressed_sensing.reconstruct(kspace, mask, maps, weight=weight, iterations=self.iterations)


METHODS: dict[str, type[nn.Module]] = {"zero_filled": ZeroFilling, "sense": Sense, "cs": CompressedSensing}
