"""What is wrong with the samples of a file."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mrjax.data.resize import crop_or_pad
from mrjax.errors import UserError
from mrjax.io.readers import reader_for
from mrjax.io.volume import Volume
from mrjax.mri.fourier import magnitude_host

LARGEST = 1e15  # the energy of a slice stays finite in float32


@np.errstate(over="ignore", invalid="ignore")
def check(volume: Volume) -> tuple[Volume, list[str]]:
    """Read every sample of a volume, and return a sentence for each fault other than `empty` slices.

    In the volume returned `empty`, `undersampled` and `maximum` are set: samples left out are found without a stored
    mask too, and the maximum is not known if the target image is in other units than the k-space. Of simulated k-space
    the images are read that it comes from.
    """
    faults: list[str] = []
    empty, maximum, reader = np.zeros(volume.slices, bool), volume.maximum, reader_for(volume.path)
    for name in filter(None, (None if volume.simulated else volume.data, volume.target)):
        try:
            slices = (reader.read_slice(volume.path, name, i) for i in range(volume.slices))
            largest = np.array([np.abs(data).max() for data in slices])
        except UserError as error:
            return volume, [*faults, f"{error}, expected a whole file"]
        if not np.isfinite(largest).all():
            found = f"{volume.path}: `{name}` holds NaN or Inf in {_list(np.flatnonzero(~np.isfinite(largest)))}"
            faults.append(f"{found}, expected finite numbers")
        elif largest.max() > LARGEST:
            faults.append(f"{volume.path}: `{name}` holds {largest.max():.3g}, expected at most {LARGEST:g}")
        empty |= largest == 0
        if name == volume.target and maximum is None:
            maximum = float(largest.max())
    volume = dataclasses.replace(volume, empty=tuple(np.flatnonzero(empty).tolist()), maximum=maximum)
    if volume.layout == "kspace" and not volume.simulated and volume.full_slices and not faults:
        return _check_kspace(volume)
    return volume, faults


def _check_kspace(volume: Volume) -> tuple[Volume, list[str]]:
    """Look for samples left out, and compare the target image with k-space, in the first and the middle full slice."""
    reader, full = reader_for(volume.path), volume.full_slices
    slices = sorted({full[0], full[len(full) // 2]})
    kspace = [reader.read_slice(volume.path, volume.data, i) for i in slices]
    undersampled = volume.undersampled or any(map(_is_undersampled, kspace))
    volume = dataclasses.replace(volume, undersampled=undersampled)
    if not volume.target or undersampled:
        return volume, []
    images = [reader.read_slice(volume.path, volume.target, i) for i in slices]
    correlation, ratio = max(map(_compare, kspace, images))
    if not 0.5 < ratio < 2:  # The image was scaled: its maximum says nothing about this k-space.
        volume = dataclasses.replace(volume, maximum=None)
    found = f"{volume.path}: `{volume.target}` is not an image of `{volume.data}` (correlation {correlation:.2f})"
    return volume, [] if correlation >= 0.5 else [f"{found}, expected the root-sum-of-squares of its coils"]


def describe_empty_slices(volume: Volume) -> str:
    """Return a sentence about the empty slices of a checked volume, an empty one if it has none."""
    found = f"{volume.path}: nothing but zeros in {_list(volume.empty)}"
    return f"{found}, training and evaluation leave them out" if volume.empty else ""


def _is_undersampled(kspace: np.ndarray) -> bool:
    """Tell whether columns, rows or single samples were left out of k-space, or much of one side (partial Fourier).

    Zeros all around are padding by the scanner, and so are those in the corners.
    """
    measured = np.any(kspace.reshape(-1, *kspace.shape[-2:]), axis=0)
    lines, sides = [np.flatnonzero(np.any(measured, axis)) for axis in (1, 0)], []
    edges = [measured_lines[[0, -1]] for measured_lines in lines]
    for size, measured_lines, (first, last) in zip(measured.shape, lines, edges, strict=True):
        if len(measured_lines) < last - first + 1:
            return True
        sides.append(sorted((size // 2 - first, last + 1 - size // 2)))
    (top, bottom), (left, right) = edges
    y, x = np.ogrid[-1 : 1 : (bottom - top + 1) * 1j, -1 : 1 : (right - left + 1) * 1j]
    sampled = measured[top : bottom + 1, left : right + 1][y**2 + x**2 <= 1]
    return bool(sampled.sum() < 0.95 * sampled.size or any(short < 0.8 * long for short, long in sides))


def _compare(kspace: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    """Compare |image| with the root-sum-of-squares of k-space, in the centre that both cover.

    Returns their Pearson correlation, which survives the scaling, cropping and filtering of real pipelines, but not an
    image of something else; and the ratio of their norms.
    """
    rss = magnitude_host(kspace.reshape(-1, *kspace.shape[-2:]))
    height, width = np.minimum(rss.shape, image.shape)
    rss, image = (crop_or_pad(x, (height, width)).ravel() for x in (rss, np.abs(image)))
    correlation = np.corrcoef(rss, image)[0, 1] if rss.std() * image.std() else 1.0
    return float(correlation), float(np.linalg.norm(image) / max(np.linalg.norm(rss), np.finfo(np.float32).tiny))


def _list(slices: Sequence[int] | np.ndarray) -> str:
    shown = ", ".join(map(str, slices[:8])) + (", ..." if len(slices) > 8 else "")
    return f"slice{'s' if len(slices) > 1 else ''} {shown}"
