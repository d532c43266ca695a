"""Slices brought from any size to one size on the host, and paired images back again."""

import functools

import numpy as np

from mrjax.mri.fourier import centred_fft2_host, centred_ifft2_host

Size = tuple[int, int]


def crop_or_pad(x: np.ndarray, size: Size) -> np.ndarray:
    """Crop or zero-pad the last two axes about their centre (index n // 2, the zero frequency of k-space)."""
    for axis, old, new in zip((-2, -1), x.shape[-2:], size, strict=True):
        before = new // 2 - old // 2
        if old > new:
            x = x.swapaxes(axis, -1)[..., -before : new - before].swapaxes(axis, -1)
        elif old < new:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (before, new - old - before)
            x = np.pad(x, widths)
    return x


def resize_kspace(kspace: np.ndarray, size: Size, rule: str) -> np.ndarray:
    """Resize the image of k-space (..., height, width), complex and centred, to (height, width); its units are kept.

    The rule 'kspace' crops or zero-pads k-space: the same field of view at another resolution; 'image' crops or
    zero-pads the image: the same resolution in another field of view, as fastMRI does.
    """
    if kspace.shape[-2:] == size:
        return kspace
    if rule == "image":
        cropped = centred_fft2_host(crop_or_pad(centred_ifft2_host(kspace), size))
        measured, old, new = np.flatnonzero(kspace.any(tuple(range(kspace.ndim - 1)))), kspace.shape[-1], size[1]
        if measured.size in (0, old):
            return cropped
        # Cropping the image smears k-space into columns at the edge that no scanner measured.
        low, high = (measured[[0, -1]] - old // 2) / old
        frequency = (np.arange(new) - new // 2) / new
        return np.where((frequency >= low) & (frequency <= high), cropped, 0)
    # An orthonormal transform of fewer samples divides by a smaller root, which would change the image's units.
    return crop_or_pad(kspace, size) * np.float32(np.sqrt(np.prod(size) / np.prod(kspace.shape[-2:])))


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Scale a real image (..., height, width) to fit into `size` at its aspect ratio, then zero-pad it.

    Linear interpolation, with the kernel widened when shrinking (anti-aliasing), as in jax.image.resize.
    """
    return crop_or_pad(_interpolate(image, _scaled_size(image.shape[-2:], size)), size)


def undo_resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Bring a real image (..., height, width) resized by `resize_image` back to the file's size."""
    return _interpolate(crop_or_pad(image, _scaled_size(size, image.shape[-2:])), size)


def _scaled_size(old: tuple[int, ...], box: tuple[int, ...]) -> Size:
    factor = min(b / o for b, o in zip(box, old, strict=True))
    height, width = (max(1, min(b, round(o * factor))) for b, o in zip(box, old, strict=True))
    return height, width


def _interpolate(image: np.ndarray, size: Size) -> np.ndarray:
    if image.shape[-2:] == size:
        return image
    rows, columns = (_weights(old, new) for old, new in zip(image.shape[-2:], size, strict=True))
    return np.ascontiguousarray(rows @ image.astype(np.float32, copy=False) @ columns.T)


@functools.lru_cache(maxsize=256)
def _weights(old: int, new: int) -> np.ndarray:
    """Make the matrix (new, old) float32 that interpolates along an axis: rows of a triangle kernel of sum 1."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    reach = max(1.0, old / new)
    weights = np.maximum(0, 1 - np.abs(np.arange(old) - centres[:, None]) / reach)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
