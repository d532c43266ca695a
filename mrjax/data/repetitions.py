"""Repeated scans, M4Raw's <study>_<contrast><NN>.h5: which belong together, and which moved between them."""

import concurrent.futures
import dataclasses
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mrjax.data import hdf5, resize
from mrjax.data.files import Files
from mrjax.errors import UserError

PIXELS = 0.5  # root-mean-square displacement over the head beyond which a repetition moved, within its slices
SLICES = 0.2  # and across them: M4Raw's are 6 mm apart and its pixels 0.9 mm wide
SIDE = 64  # the samples a side of k-space that images are compared by: its centre has little noise
_NAME = re.compile(r"(.+_.+)(\d\d)")


def group(volumes: Iterable[hdf5.Volume]) -> tuple[list[hdf5.Volume], list[str]]:
    """Gives every volume the files of its other repetitions: same folder, study, contrast and shape.

    Of the repetitions of a scan, those are kept that lie where most of the others do. All samples are read for that.

    Returns:
      The volumes that have others, in their order, with `others` set and with the empty slices of all of them; and a
      sentence for each volume that was left out.

    Raises:
      UserError: a file cannot be read, or holds NaN or Inf.
    """
    volumes = list(volumes)
    scans: dict[tuple[str, str, tuple[int, ...]], list[hdf5.Volume]] = {}
    for volume in volumes:
        scans.setdefault((*_scan(volume.path), volume.shape), []).append(volume)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sorted_out = list(pool.map(_sort_out, scans.values()))
    left_out = [sentence for _, sentences in sorted_out for sentence in sentences]
    kept = {}
    for still, _ in sorted_out:
        empty = tuple(sorted({i for volume in still for i in volume.empty}))
        for volume in still:
            others = tuple(other.path for other in still if other is not volume)
            if others:
                kept[volume.path] = dataclasses.replace(volume, others=others, empty=empty)
            else:
                left_out.append(
                    f"{volume.path}: has no other repetition to compare with, expected files named "
                    "<study>_<contrast><NN> with one study and contrast, and arrays of one shape, in its folder"
                )
    return [kept[volume.path] for volume in volumes if volume.path in kept], left_out


def beside(volume: hdf5.Volume) -> hdf5.Volume:
    """The volume with the other repetitions that lie in its folder, if there are any and it did not move."""
    siblings = [volume]
    for path in hdf5.find(str(Path(volume.path).parent)):
        if path != volume.path and _scan(path) == _scan(volume.path):
            try:
                siblings.append(hdf5.describe(path, "kspace"))
            except UserError:  # nobody asked for that file
                continue
    return next((one for one in group(siblings)[0] if one.path == volume.path), volume)


def _scan(path: str) -> tuple[str, str]:
    """What repetitions of one scan share: their folder, and their name but for the repetition's number."""
    match = _NAME.fullmatch(Path(path).stem)
    return str(Path(path).parent), match.group(1) if match else Path(path).stem


def _sort_out(scan: list[hdf5.Volume]) -> tuple[list[hdf5.Volume], list[str]]:
    """The repetitions of a scan that lie where most do, and a sentence for each of those that moved."""
    if len(scan) == 1:
        return scan, []
    images = np.stack([coarse(volume) for volume in scan])
    images = images[:, images.any((2, 3)).all(0)]  # the slices that none of them lacks
    moved = np.zeros((len(scan), len(scan), 2))  # pixels, slices
    near = np.ones((len(scan), len(scan)), bool)
    for i, j in itertools.combinations(range(len(scan)), 2):
        # One step tells whether anything moved, and noise cannot sway it; more of them tell how far.
        for steps in (1, 20):
            rows, columns, slices = displacement(images[i], images[j], steps)
            height, width = (max(n / SIDE, 1) for n in scan[i].data_shape)  # pixels in those of the coarse image
            pixels = float(np.hypot(rows * height, columns * width))
            moved[i, j] = moved[j, i] = pixels, slices
            if steps == 1:
                near[i, j] = near[j, i] = pixels <= PIXELS and slices <= SLICES
            if near[i, j]:
                break
    most = near.sum(1) == near.sum(1).max()
    middle = int(np.argmin(np.where(most, moved[..., 0].sum(1), np.inf)))
    sentences = [
        f"{scan[i].path}: moved by about {moved[i, middle, 0]:.1f} pixels and {moved[i, middle, 1]:.1f} slices "
        f"against {scan[middle].name}, expected at most {PIXELS} and {SLICES}"
        for i in range(len(scan))
        if not near[i, middle]
    ]
    return [scan[i] for i in range(len(scan)) if near[i, middle]], sentences


def coarse(volume: hdf5.Volume) -> np.ndarray:
    """Root-sum-of-squares images, float32 (slices, at most SIDE, at most SIDE), of the centre of its k-space.

    Raises:
      UserError: it cannot be read, or is not finite.
    """
    from scipy import fft  # slow to import, and most tasks have no repetitions

    size = (min(volume.data_shape[0], SIDE), min(volume.data_shape[1], SIDE))
    # A Hann window: no ringing, and images smooth enough for the gradients to reach over a few pixels.
    window = np.outer(*(np.hanning(n + 2)[1:-1] for n in size)).astype(np.float32)
    files, images = Files(), []
    for i in range(volume.slices):
        kspace = files.read(volume.path, "kspace", i).reshape(volume.shape[1:]).astype(np.complex64, copy=False)
        coils = fft.fftshift(fft.ifft2(fft.ifftshift(resize.fit(kspace, size) * window, (-2, -1))), (-2, -1))
        images.append(np.sqrt((np.abs(coils) ** 2).sum(0)))
        if not np.isfinite(images[-1]).all():
            raise UserError(f"{volume.path}: `kspace` holds NaN or Inf in slice {i}, expected finite numbers")
    return np.stack(images)


def displacement(fixed: np.ndarray, moving: np.ndarray, steps: int) -> tuple[float, float, float]:
    """How far a head moved between two images (slices, height, width), by registration.

    The affine map and the intensity that best carry one image over to the other, by Gauss-Newton steps with the mean of
    both images' gradients (Lucas and Kanade, 1981; efficient second-order minimisation, Benhimane and Malis, 2004). A
    rigid motion in mm is affine in voxels, whatever their size.

    The first step finds a displacement of less than a voxel, and of a greater one the first voxel or so. Noise hardly
    sways it: thirteen numbers are fitted to all voxels, and the noise of two scans pushes them either way alike. The
    steps after it compare one image with an interpolated one, less noisy for that, which in much noise leads astray.

    Returns:
      Root-mean-square displacement of the head, weighted by its intensity: rows, columns, slices.
    """
    from scipy import ndimage

    grid = np.indices(fixed.shape, np.float64)
    centre = (np.array(fixed.shape) - 1) / 2
    reach = np.maximum(centre, 1)
    place = np.stack([np.ones(fixed.shape), *((grid.T - centre) / reach).T])
    weight = fixed.astype(np.float64) ** 2 / max((fixed.astype(np.float64) ** 2).sum(), np.finfo(np.float64).tiny)
    affine = np.zeros((3, 4))
    field = np.zeros(grid.shape)
    for _ in range(steps):
        moved = ndimage.map_coordinates(moving, grid + field, np.float64, order=1, mode="nearest")
        both = (fixed + moved) / 2
        gradient = np.stack([ndimage.correlate1d(both, [-0.5, 0, 0.5], axis, mode="nearest") for axis in range(3)])
        design = np.concatenate([(gradient[:, None] * place).reshape(12, -1), both.reshape(1, -1)])
        # Least squares of least norm: a single slice tells nothing of motion across it.
        change = np.linalg.lstsq(design @ design.T, design @ (fixed - moved).ravel(), rcond=1e-9)[0][:12]
        affine += change.reshape(3, 4)
        field = np.tensordot(affine, place, 1)
        if np.abs(change).max() < 0.01:
            break
    slices, rows, columns = np.sqrt((weight * field**2).sum((1, 2, 3)))
    return float(rows), float(columns), float(slices)
