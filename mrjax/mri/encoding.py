"""The encoding of an image by coils and an undersampled Fourier transform, and its adjoint, for iterative solvers."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from mrjax.mri.coils import combine

_AXES = (-2, -1)


class Encoding(NamedTuple):
    """E = mask F S, in a form whose repeated use is cheap.

    Centring takes passes over memory, so everything here begins with the centre, index n // 2 of a centred image.
    Where whole columns are measured, the transform along them would cancel in E^H E, and is left out of E.
    """

    mask: Array
    maps: Array  # S, the sensitivities (coils, height, width) complex64
    axes: tuple[int, ...]  # of the transform

    @classmethod
    def of(cls, kspace: Array, mask: Array, maps: Array) -> tuple["Encoding", Array]:
        """Return E, and what it is to equal: `kspace`, (coils, height, width) complex64, where it was measured.

        `mask` is (1 or height, width) bool, of whole columns if it has one row.
        """
        measured = to_first(jnp.where(mask, kspace, 0))
        if len(mask) == 1:
            return cls(to_first(mask), to_first(maps), _AXES[1:]), jnp.fft.ifft(measured, axis=-2, norm="ortho")
        return cls(to_first(mask), to_first(maps), _AXES), measured

    def apply(self, image: Array) -> Array:
        """Apply E to an image (height, width) complex64."""
        return jnp.where(self.mask, jnp.fft.fftn(self.maps * image, axes=self.axes, norm="ortho"), 0)

    def adjoint(self, kspace: Array) -> Array:
        """Apply E^H to what is zero where nothing was measured, (coils, height, width) complex64."""
        return combine(jnp.fft.ifftn(kspace, axes=self.axes, norm="ortho"), self.maps)


def to_first(images: Array) -> Array:
    """Bring the centre of images, k-space or a mask (..., height, width) to index 0."""
    return jnp.fft.ifftshift(images, _AXES)


def to_centre(images: Array) -> Array:
    """Undo `to_first`."""
    return jnp.fft.fftshift(images, _AXES)
