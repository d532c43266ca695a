"""Slices of any size brought to one size on the host, and back again."""

import functools

import numpy as np

from mrjax.mri.fourier import centred_fft2_host, centred_ifft2_host

Size = tuple[int, int]


def fit(x: np.ndarray, size: Size) -> np.ndarray:
    """Crops or zero-pads the last two axes about their centre (index n // 2, where k-space has its zero frequency)."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = x.shape[axis]
        if old > new:
            start = old // 2 - new // 2
            x = np.take(x, range(start, start + new), axis) if axis == -2 else x[..., start : start + new]
        elif old < new:
            before = new // 2 - old // 2
            widths = [(0, 0)] * x.ndim
            widths[axis] = (before, new - old - before)
            x = np.pad(x, widths)
    return x


def kspace_to(kspace: np.ndarray, size: Size, rule: str) -> np.ndarray:
    """K-space (..., height, width) of an image of `size`, in the same units.

    Args:
      kspace: complex, centred.
      size: the (height, width) wanted.
      rule: 'kspace' crops or zero-pads k-space: the same field of view at another resolution; 'image' crops or
        zero-pads the image: the same resolution in another field of view, what fastMRI does.
    """
    if kspace.shape[-2:] == size:
        return kspace
    if rule == "image":
        cropped = centred_fft2_host(fit(centred_ifft2_host(kspace), size))
        return np.where(_within_measured(kspace, size[1]), cropped, 0)
    # An orthonormal transform of fewer samples divides by a smaller root: undo it, or the image would change its units.
    return fit(kspace, size) * np.float32(np.sqrt(np.prod(size) / np.prod(kspace.shape[-2:])))


def _within_measured(kspace: np.ndarray, width: int) -> np.ndarray:
    """(width,) bool: which columns of another field of view lie within the frequencies measured in this one.

    Cropping the image smears k-space over columns at the edge that no scanner measured.
    """
    measured = np.flatnonzero(kspace.any(tuple(range(kspace.ndim - 1))))
    old = kspace.shape[-1]
    if measured.size == 0 or measured.size == old:
        return np.ones(width, bool)
    frequency = (np.arange(width) - width // 2) / width
    low, high = ((measured[i] - old // 2) / old for i in (0, -1))
    return (frequency >= low) & (frequency <= high)


def image_from(image: np.ndarray, size: Size, rule: str) -> np.ndarray:
    """Undoes `kspace_to` for a real image (..., height, width): the same image on the grid it came from."""
    if image.shape[-2:] == size:
        return image
    if rule == "image":
        return fit(image, size)
    return centred_ifft2_host(kspace_to(centred_fft2_host(image), size, "kspace")).real.astype(image.dtype)


def scale_to(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes a real image (..., height, width) to fit into `size` without changing its aspect ratio, then zero-pads.

    Linear interpolation, with the kernel widened when shrinking (anti-aliasing), as jax.image.resize does it.
    """
    return fit(_interpolate(image, _inner(image.shape[-2:], size)), size)


def scale_from(image: np.ndarray, size: Size) -> np.ndarray:
    """Undoes `scale_to`: cuts off the padding and resizes a real image (..., height, width) back to `size`."""
    return _interpolate(fit(image, _inner(size, image.shape[-2:])), size)


def _inner(old: tuple[int, ...], box: tuple[int, ...]) -> Size:
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
    """(new, old) float32: rows of a triangle kernel that add up to one."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    reach = max(1.0, old / new)
    weights = np.maximum(0, 1 - np.abs(np.arange(old) - centres[:, None]) / reach)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
