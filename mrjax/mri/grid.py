"""The grid that a network works on, within that of a file: nothing that was measured beyond it is lost.

A network is trained at one resolution and field of view. Files are corrupted and reconstructed on their own grid; the
network is given the part that it knows, and what lies outside of it comes from the measurement.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mrjax.mri.coils import magnitude
from mrjax.mri.fourier import fft2c, ifft2c
from mrjax.mri.sense import explain_measured
from mrjax.mri.tasks import Example


class Grid(NamedTuple):
    """How a file's slices are brought to a network and back.

    `rule` is 'kspace', the same field of view at another resolution, or 'image', the same resolution in another field
    of view (as `data.resize`).
    """

    size: tuple[int, ...]  # (height, width) that the network works at; () for that of each file
    rule: str
    keep_measured: bool  # whether the reconstruction is made to explain the samples that were measured
    kept_by_network: bool = False  # whether the network's own does, where it works at the file's grid

    def to_network(self, example: Example) -> Example:
        """Bring an example of k-space, on the file's grid, to the network's."""
        kspace, mask, adjacent = example.kspace, example.mask, example.adjacent
        assert kspace is not None
        assert mask is not None
        if self.size in ((), kspace.shape[-2:]):
            return example
        if adjacent is not None:
            adjacent = jnp.moveaxis(self._resize(jnp.moveaxis(adjacent, -1, 1), self.size), 1, -1)
        rows = 1 if mask.shape[1] == 1 else self.size[0]
        if self.rule == "kspace":
            mask = crop_or_pad(mask, (rows, self.size[1]))
        else:  # the nearest of the file's frequencies
            row, column = map(_nearest_frequency, (rows, self.size[1]), mask.shape[1:])
            mask = mask[:, row[:, None], column]
        kspace = self._resize_kspace(kspace, self.size)
        return Example(magnitude(kspace), example.target, kspace, mask, adjacent)

    def from_network(self, image: Array, example: Example) -> Array:
        """Bring a reconstruction (batch, height, width) to the file's grid, in which `example` was measured.

        Beyond the network's field of view it is the corrupted image. With `keep_measured`, it is then made to explain
        what was measured (`sense.explain_measured`).
        """
        measured, mask = example.kspace, example.mask
        assert measured is not None
        assert mask is not None
        network_size, size = image.shape[-2:], measured.shape[-2:]
        if network_size != size and self.rule == "image":
            inside = crop_or_pad(jnp.ones(network_size, bool), size)
            image = jnp.where(inside, crop_or_pad(image, size), example.corrupted)
        elif network_size != size:
            image = self._resize(image, size)
        if not self.keep_measured or (self.kept_by_network and network_size == size):
            return image
        # One slice at a time: sensitivities are estimated from coils^2 images.
        return lax.map(lambda of_slice: explain_measured(*of_slice), (image, measured, mask))

    def _resize(self, images: Array, size: Sequence[int]) -> Array:
        """Resize real images (..., height, width)."""
        if self.rule == "image":
            return crop_or_pad(images, size)
        return ifft2c(self._resize_kspace(fft2c(images.astype(jnp.complex64)), size)).real

    def _resize_kspace(self, kspace: Array, size: Sequence[int]) -> Array:
        """Resize the images of k-space (..., height, width); their units are kept."""
        if self.rule == "image":
            return fft2c(crop_or_pad(ifft2c(kspace), size))
        return crop_or_pad(kspace, size) * np.float32(np.sqrt(np.prod(size) / np.prod(kspace.shape[-2:])))


def crop_or_pad(x: Array, size: Sequence[int]) -> Array:
    """Crop or zero-pad the last two axes about their centre (index n // 2, the zero frequency of k-space)."""
    config = [(0, 0, 0)] * (x.ndim - 2)
    for old, new in zip(x.shape[-2:], size, strict=True):
        before = new // 2 - old // 2
        config.append((before, new - old - before, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _nearest_frequency(size: int, old: int) -> np.ndarray:
    """Return for each of `size` centred frequencies the index of the nearest of `old`."""
    return np.clip(np.round((np.arange(size) - size // 2) * old / size).astype(int) + old // 2, 0, old - 1)
