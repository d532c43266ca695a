"""What of a file can be read, but is nearly surely not what its owner means."""

from collections.abc import Iterator, Sequence

import numpy as np

from mrjax.data.resize import crop_or_pad
from mrjax.io.readers import reader_for
from mrjax.io.volume import Volume
from mrjax.mri.fourier import centred_ifft2_host, magnitude_host


@np.errstate(over="ignore", invalid="ignore")
def find_doubts(volume: Volume, image_size: tuple[int, ...] = ()) -> list[str]:
    """Return a sentence, with what mends it, for each doubt about the k-space of a checked volume.

    `image_size` is config.data.image_size: who sets it knows about oversampled readouts.
    """
    if volume.layout != "kspace" or volume.simulated or not volume.full_slices:
        return []
    label = f"{volume.path}: `{volume.data}`"
    doubts = [f"{label} {doubt}" for doubt in _doubts_of_axes(volume)]
    if not doubts:
        kspace = _read(volume, volume.full_slices[len(volume.full_slices) // 2])
        doubts = [f"{label} {doubt}" for doubt in _doubts_of_slice(volume, kspace, image_size)]
    return doubts


def find_doubt_of_acceleration(volume: Volume, trained: Sequence[float]) -> str:
    """Return a sentence if undersampled k-space is accelerated otherwise than a network's training data, else ''."""
    if not volume.full_slices:
        return ""
    found = acceleration(volume)
    if 0.8 * min(trained) <= found <= 1.25 * max(trained):
        return ""
    known = " and ".join(f"{acceleration:g}x" for acceleration in trained)
    return f"{volume.path}: `{volume.data}` is accelerated {found:.1f}x, the network was trained at {known}"


def acceleration(volume: Volume) -> float:
    """Return the acceleration of undersampled k-space that is not all zeros.

    The middle slice counts, from the first to the last row and column that holds data.
    """
    i = volume.full_slices[len(volume.full_slices) // 2]
    held, mask = np.any(_read(volume, i), 0), volume.mask_of_slice(i)
    rows, columns = (np.ptp(np.flatnonzero(np.any(held, axis))) + 1 for axis in (1, 0))
    return float(rows * columns / max(np.sum(held if mask is None else held & mask), 1))


def _doubts_of_axes(volume: Volume) -> Iterator[str]:
    """Find coils where columns or slices are expected."""
    slices, coils, height, width = volume.shape
    if 4 * max(height, width) <= min(slices, coils):
        yield f"has {coils} coils, expected fewer; if MATLAB wrote it, set config.data.axes=height,width,coils,slices"
    elif 4 * width <= min(height, slices if coils == 1 else coils):
        axes = "height,width,coils" if coils == 1 else "slices,height,width,coils"
        yield f"ends in an axis of length {width}, expected columns; if these are coils, set config.data.axes={axes}"
    elif slices >= 4 and (coils == 1 or coils >= 4):
        # Coils see one object: within a few pixels two of their images are proportional, those of two slices are not.
        first = _incoherence(*(_read(volume, i)[coils // 4] for i in _quarters(slices)))
        second = np.inf if coils == 1 else _incoherence(*(_read(volume, slices // 4)[i] for i in _quarters(coils)))
        if first < 0.03 and 3 * first < second:
            axes = "coils,height,width" if coils == 1 else "coils,slices,height,width"
            yield f"begins with {slices} images of one slice, expected slices; for coils, set config.data.axes={axes}"


def _doubts_of_slice(volume: Volume, kspace: np.ndarray, image_size: tuple[int, ...]) -> Iterator[str]:
    """Find k-space that was not shifted, and readouts of twice the field of view, in a slice."""
    height, width = kspace.shape[-2:]
    centre, corners = (
        np.linalg.norm(crop_or_pad(x, (height // 4, width // 4))) for x in (kspace, np.fft.fftshift(kspace, (-2, -1)))
    )
    if corners > 2 * centre:
        mend = "after an FFT without shift, set config.data.shifted=True"
        yield f"has its energy in the corners, expected it in the centre; {mend}"
        return
    long, short = max(height, width), min(height, width)
    half = (height // 2, width) if height == long else (height, width // 2)
    image = magnitude_host(kspace)
    outside = 1 - (np.linalg.norm(crop_or_pad(image, half)) / np.linalg.norm(image)) ** 2
    if not image_size and (volume.image_shape == half or (long >= 1.5 * short and outside < 0.1)):
        mend = f"set config.data.image_size={half[0]},{half[1]} and config.data.resize=image"
        yield f"has readouts of {long} samples over twice the field of view, expected {long // 2}; {mend}"


def _read(volume: Volume, i: int) -> np.ndarray:
    return reader_for(volume.path).read_slice(volume.path, volume.data, i).reshape(volume.shape[1:])


def _quarters(length: int) -> tuple[int, int]:
    return length // 4, 3 * length // 4


def _incoherence(one: np.ndarray, other: np.ndarray) -> float:
    """Compare images of two k-spaces (height, width) in blocks of 4 x 4 pixels: 0 if one is a multiple of the other.

    Some 0.02 to 0.04 for two coils of the demo data, 0.1 to 0.25 for two slices 2 to 9 cm apart.
    """
    images = [centred_ifft2_host(crop_or_pad(kspace, (64, 64))) for kspace in (one, other)]
    cross, *squares = (
        (x * y.conj()).reshape(16, 4, 16, 4).sum((1, 3)) for x, y in (images, images[:1] * 2, images[1:] * 2)
    )
    norm = np.sqrt(np.abs(squares[0] * squares[1])).sum()
    return float(1 - np.abs(cross).sum() / norm) if norm else 1.0
