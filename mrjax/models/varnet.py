"""The end-to-end variational network: an unrolled reconstruction whose regulariser and coil sensitivities are learned.

Sriram et al., "End-to-End Variational Networks for Accelerated MRI Reconstruction", MICCAI 2020, arXiv:2004.06688.
Given the same weights, `VarNet` computes what `fastmri.models.VarNet` computes, for odd sizes too, unless `residual`.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mrjax.models.data_consistency import data_consistency, normalise_by_rss, root_sum_of_squares
from mrjax.models.unet import UNet
from mrjax.mri import compressed_sensing
from mrjax.mri.fourier import fft2c, ifft2c
from mrjax.mri.noise import estimate_sigma
from mrjax.mri.sense import estimate_maps, find_centre

# Height and width are padded to multiples of this before the U-Net, however many levels it has, as fastMRI does.
_MULTIPLE = 16


class VarNet(nn.Module):
    """Undersampled k-space of any number of coils to the normalised image.

    Parameters, all float32: those of a `UNet` in `sensitivities/unet` and in `cascade_<i>/unet`, and
    `cascade_<i>/weight` (1,) of the data consistency. Coils that are zero everywhere change nothing.

    If `residual`, the network improves on compressed sensing, which an untrained one equals but for the measured
    samples that it keeps: maps are ESPIRiT's, the cascades start at the image of least total variation, and the U-Nets
    compute what is added to the image in each, whose k-space then replaces the current one. The parameters of
    `sensitivities` are not there. Compressed sensing carries over to any anatomy, resolution and coils, and leaves the
    network less to learn (as MoDL starts at SENSE, Aggarwal et al., IEEE Trans Med Imaging 38 (2019) 394).
    """

    channels: int = 18  # of the `UNet` in each cascade, as are the levels
    levels: int = 4
    cascades: int = 12
    sens_channels: int = 8  # of the `UNet` that estimates the sensitivity maps, as are the levels
    sens_levels: int = 4
    pool: str = "avg"
    residual: bool = False
    dtype: DTypeLike = jnp.float32  # of the U-Nets; k-space and images are complex64 in any case
    remat: bool = False  # compute each cascade again in the backward pass instead of storing its activations

    input_names: ClassVar[tuple[str, ...]] = ("kspace", "mask", "offset")
    start_iterations: ClassVar[int] = 30  # of compressed sensing if `residual`: half of what it takes to converge

    @staticmethod
    def smallest_side(levels: int) -> int:
        """Return the least height or width that, padded, leaves the U-Net 2 pixels after `levels` halvings."""
        return max(UNet.smallest_side(levels) - _MULTIPLE + 1, 1)

    @nn.compact
    def __call__(self, kspace: Array, mask: Array, offset: Array) -> Array:
        """Reconstruct (batch, height, width, 1) float32 from `NetworkInputs`."""
        _, _, current = self.unroll(kspace, mask)
        return (root_sum_of_squares(ifft2c(current)) - offset)[..., None]

    def unroll(self, kspace: Array, mask: Array) -> tuple[Array, Array, Array]:
        """Return sensitivity maps, and k-space before and after the cascades: (batch, coils, height, width)."""
        modules = _Sensitivities, _Cascade
        estimate, cascade = map(nn.remat, modules) if self.remat else modules
        # Two channels: real and imaginary part. The module that a U-Net is given to owns it.
        make_unet = functools.partial(UNet, pool=self.pool, out_channels=2, dtype=self.dtype, parent=None)
        if self.residual:
            solve = functools.partial(_compressed_sensing, iterations=self.start_iterations)
            maps, start = jax.vmap(solve)(kspace, mask)
        else:
            unet = make_unet(self.sens_channels, self.sens_levels)
            maps, start = estimate(unet, name="sensitivities")(kspace, mask), kspace
        current = start
        for i in range(self.cascades):
            # What a cascade subtracts starts at zero.
            unet = make_unet(self.channels, self.levels, zero_head=True)
            current = cascade(unet, self.residual, name=f"cascade_{i}")(current, kspace, mask, maps)
        return maps, start, current


def _compressed_sensing(kspace: Array, mask: Array, iterations: int) -> tuple[Array, Array]:
    """Estimate maps, and k-space by compressed sensing, of one slice (coils, height, width)."""
    sigma = estimate_sigma(kspace, mask)
    maps, weight = estimate_maps(kspace, mask, sigma), compressed_sensing.noise_weight(mask, sigma)
    image = compressed_sensing.reconstruct(kspace, mask, maps, weight=weight, iterations=iterations)
    return maps, fft2c(maps * image)


class _Sensitivities(nn.Module):
    """Estimate the sensitivity maps from the fully sampled centre of k-space."""

    unet: UNet

    def __call__(self, kspace: Array, mask: Array) -> Array:
        images = ifft2c(jnp.where(find_centre(mask)[:, None], kspace, 0))
        b, coils, h, w = images.shape
        maps = _norm_unet(self.unet, images.reshape(b * coils, h, w), residual=False)
        return normalise_by_rss(maps.reshape(images.shape))


class _Cascade(nn.Module):
    """Take one step: data consistency, minus the artefacts that the U-Net finds (equation 5 of the paper).

    If `residual`, data consistency comes after the U-Net, so that the result explains what was measured.
    """

    unet: UNet
    residual: bool

    @nn.compact
    def __call__(self, current: Array, measured: Array, mask: Array, maps: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, (1,), jnp.float32)
        image = jnp.sum(ifft2c(current) * maps.conj(), 1)
        output = _norm_unet(self.unet, image, self.residual)
        if self.residual:
            return data_consistency(fft2c((image + output)[:, None] * maps), measured, mask, weight)
        return data_consistency(current, measured, mask, weight) - fft2c(output[:, None] * maps)


def _norm_unet(unet: UNet, image: Array, residual: bool) -> Array:
    """Apply the U-Net to complex images, (n, height, width) complex64, real and imaginary parts as its two channels.

    Each part has mean 0 and standard deviation 1 in there; the mean is added again unless the result is a correction.
    """
    parts = jnp.stack([image.real, image.imag], -1)
    mean = parts.mean((1, 2), keepdims=True)
    variance = jnp.sum((parts - mean) ** 2, (1, 2), keepdims=True) / (image[0].size - 1)
    # Empty coils have no deviation: they stay zero, and so do their gradients.
    varies = variance > 0
    deviation = jnp.sqrt(jnp.where(varies, variance, 1))
    h, w = image.shape[1:]
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in (-h % _MULTIPLE, -w % _MULTIPLE))
    output = unet(jnp.pad((parts - mean) / deviation, [(0, 0), (top, bottom), (left, right), (0, 0)]))
    output = output[:, top : top + h, left : left + w] * jnp.where(varies, deviation, 0)
    output = output if residual else output + mean
    return output[..., 0] + 1j * output[..., 1]
