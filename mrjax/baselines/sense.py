"""SENSE: the image whose coil images explain what was measured, in the least-squares sense."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from mrjax.baselines.espirit import espirit
from mrjax.models.varnet import find_centre
from mrjax.mri.coils import adaptive_maps, combine, root_sum_of_squares
from mrjax.mri.fourier import fft2c, ifft2c
from mrjax.mri.noise import estimate_sigma

_KERNEL = 3  # side of ESPIRiT's blocks, in samples: small, as 8x leaves few central columns


class Sense(nn.Module):
    """Estimate sensitivities by ESPIRiT, then solve for the image, in the place of a network.

    It has no parameters: `apply({"params": {}}, kspace, mask, offset)`. Its magnitude is the root-sum-of-squares of the
    coils' images, as that of the targets. Where the fully sampled centre of k-space has no room for ESPIRiT's kernel,
    the sensitivities are the adaptive ones of its images.
    """

    weight: float | None = None  # of the regularisation, for images of range 1; None: chosen by the noise
    iterations: int = 30

    input_names: ClassVar[tuple[str, ...]] = ("kspace", "mask", "offset")

    @nn.compact
    def __call__(self, kspace: jax.Array, mask: jax.Array, offset: jax.Array) -> jax.Array:
        """Reconstruct normalised images, (batch, height, width, 1) float32: the magnitude minus `offset` (batch, 1, 1).

        `kspace` (batch, coils, height, width) complex64 is in units of the normalised image's scale.
        """

        def magnitude(kspace: jax.Array, mask: jax.Array) -> jax.Array:
            sigma = estimate_sigma(kspace, mask)
            # Not cropped: the target has noise outside the object too.
            maps = espirit(kspace, mask, kernel=_KERNEL, crop=0.0, sigma=sigma)
            centre = find_centre(mask[None])
            maps = jnp.where(jnp.any(maps), maps, adaptive_maps(ifft2c(jnp.where(centre, kspace, 0))))
            weight = self.choose_weight(kspace, mask, sigma) if self.weight is None else self.weight
            return root_sum_of_squares(maps * self.solve(kspace, mask, maps, weight))

        return (jax.vmap(magnitude)(kspace, mask) - offset)[..., None]

    def solve(self, kspace: jax.Array, mask: jax.Array, maps: jax.Array, weight: ArrayLike) -> jax.Array:
        """Solve for the image of one slice by conjugate gradients."""
        return conjugate_gradient(kspace, mask, maps, weight=weight, iterations=self.iterations)

    @staticmethod
    def choose_weight(kspace: jax.Array, mask: jax.Array, sigma: jax.Array) -> jax.Array:
        """Choose the Wiener filter's weight: the variance of the noise over the mean power of the zero-filled image."""
        power = jnp.sum(jnp.where(mask, abs(kspace) ** 2, 0)) / kspace[0].size
        return 2 * sigma**2 / jnp.where(power > 0, power, 1)


def conjugate_gradient(
    kspace: jax.Array, mask: jax.Array, maps: jax.Array, *, weight: ArrayLike, iterations: int
) -> jax.Array:
    """Minimise |mask F(S x) - kspace|^2 + weight |x|^2 over images x (height, width) complex64.

    By conjugate gradients on the normal equations (Pruessmann et al., Magn Reson Med 46 (2001) 638). `kspace` and the
    sensitivities `maps`, S, are (coils, height, width) complex64, `mask` (1 or height, width) bool.
    """

    def normal(image: jax.Array) -> jax.Array:
        return combine(ifft2c(jnp.where(mask, fft2c(maps * image), 0)), maps) + weight * image

    return cg(normal, combine(ifft2c(jnp.where(mask, kspace, 0)), maps), maxiter=iterations)[0]
