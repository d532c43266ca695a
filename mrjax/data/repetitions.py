"""Repetitions of a scan, M4Raw's <study>_<contrast><NN>.h5: which belong together, and which moved."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mrjax.data.findings import Findings
from mrjax.data.resize import crop_or_pad
from mrjax.errors import UserError, expect
from mrjax.io import readers
from mrjax.io.files import stem
from mrjax.io.storage import NATIVE, Storage
from mrjax.io.volume import Volume
from mrjax.mri.fourier import magnitude_host

MAX_PIXELS = 0.5  # root-mean-square displacement of the head within its slices up to which a repetition did not move
MAX_SLICES = 0.2  # and across them: M4Raw's are 6 mm apart and its pixels 0.9 mm wide
COARSE_SIZE = 64  # the samples a side of k-space that images are compared by: its centre has little noise
_NAME = re.compile(r"(.+_.+)(\d\d)")


def group(volumes: Sequence[Volume], findings: Findings) -> tuple[list[Volume], list[str]]:
    """Find the repetitions of each volume: files of one folder, study, contrast and shape, still against most of them.

    Reads all samples, unless `findings` has what they tell. Returns the volumes that have repetitions, by path, with
    `repetitions` set and with the empty slices of all of them; and a sentence for each volume that was left out. Raises
    `UserError` if a file cannot be read, or holds NaN or Inf.
    """
    scans: dict[tuple[str, str, tuple[int, ...]], list[Volume]] = {}
    for volume in volumes:
        scans.setdefault((*_scan(volume.path), volume.shape), []).append(volume)
    kept: list[Volume] = []
    left_out: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda scan: findings.find("moved", scan, lambda: _find_moved(scan)), scans.values())
        for all_of_scan, moved in zip(scans.values(), found, strict=True):
            left_out += moved.values()
            scan = [volume for volume in all_of_scan if volume.path not in moved]
            if len(scan) == 1:
                left_out.append(
                    f"{scan[0].path}: has no other repetition to compare with, expected files named "
                    "<study>_<contrast><NN> with one study and contrast, and arrays of one shape, in its folder"
                )
                continue
            empty = tuple(sorted({i for volume in scan for i in volume.empty}))
            for volume in scan:
                paths = tuple(one.path for one in scan if one is not volume)
                kept.append(dataclasses.replace(volume, repetitions=paths, empty=empty))
    return sorted(kept, key=lambda volume: volume.path), left_out


def add_repetitions(volume: Volume, storage: Storage = NATIVE) -> Volume:
    """Add the repetitions in its folder to a volume, if there are any and it did not move."""
    scan = [volume]
    for path in readers.find(str(Path(volume.path).parent)):
        if path != volume.path and _scan(path) == _scan(volume.path):
            with contextlib.suppress(UserError):  # a file that the user did not name
                scan.append(readers.describe(path, "kspace", storage))
    with Findings(storage) as findings:
        return next((one for one in group(scan, findings)[0] if one.path == volume.path), volume)


def _scan(path: str) -> tuple[str, str]:
    """Return what the repetitions of a scan share: folder, and name without the number of the repetition."""
    match = _NAME.fullmatch(stem(path))
    return str(Path(path).parent), match.group(1) if match else stem(path)


def _find_moved(scan: list[Volume]) -> dict[str, str]:
    """Return a sentence for each repetition of a scan that moved against most, by its path."""
    if len(scan) == 1:
        return {}
    images = np.stack([coarse_images(volume) for volume in scan])
    images = images[:, images.any((2, 3)).all(0)]  # slices that no repetition lacks
    scale = np.maximum(np.array(scan[0].data_shape) / COARSE_SIZE, 1)  # pixels of the file in one of the coarse image
    moved = np.zeros((len(scan), len(scan), 2))  # pixels, slices

    def measure(i: int, j: int, steps: int) -> None:
        *pixels, slices = displacement(images[i], images[j], steps)
        moved[i, j] = moved[j, i] = np.hypot(*(scale * pixels)), slices

    # One step tells whether anything moved, and noise cannot sway it; more steps tell how far.
    for i, j in itertools.combinations(range(len(scan)), 2):
        measure(i, j, 1)
    near = np.all(moved <= (MAX_PIXELS, MAX_SLICES), axis=-1)
    for i, j in np.argwhere(np.triu(~near)):
        measure(i, j, 20)
    most = near.sum(1) == near.sum(1).max()
    reference = int(np.argmin(np.where(most, moved[..., 0].sum(1), np.inf)))
    return {
        volume.path: f"{volume.path}: moved by about {pixels:.1f} pixels and {slices:.1f} slices against "
        f"{scan[reference].name}, expected at most {MAX_PIXELS} and {MAX_SLICES}"
        for volume, still, (pixels, slices) in zip(scan, near[reference], moved[reference], strict=True)
        if not still
    }


def coarse_images(volume: Volume) -> np.ndarray:
    """Compute root-sum-of-squares images of the centre of k-space, float32 (slices, height, width) up to COARSE_SIZE.

    Raises `UserError` if the file cannot be read, or is not finite.
    """
    height, width = (min(n, COARSE_SIZE) for n in volume.data_shape)
    # A Hann window: no ringing, and images smooth enough for the gradients to reach over a few pixels.
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1]).astype(np.float32)
    reader, images = readers.reader_for(volume.path), []
    for i in range(volume.slices):
        kspace = reader.read_slice(volume.path, volume.data, i).reshape(volume.shape[1:])
        images.append(magnitude_host(crop_or_pad(kspace, (height, width)) * window))
        found = f"{volume.path}: `{volume.data}` holds NaN or Inf in slice {i}"
        expect(np.isfinite(images[-1]).all(), found, "finite numbers")
    return np.stack(images)


def displacement(fixed: np.ndarray, moving: np.ndarray, steps: int) -> tuple[float, float, float]:
    """Register two images (slices, height, width) and return how far the head moved: rows, columns, slices.

    Fits an affine map (a rigid motion in mm is affine in voxels of any size) and an intensity, by Gauss-Newton steps
    with the mean of both images' gradients (Lucas and Kanade, 1981; Benhimane and Malis, 2004). The first step finds
    displacements below a voxel, hardly swayed by noise; later steps find greater ones, but go astray in strong noise.
    Returned is the root mean square, weighted by the intensity.
    """
    from scipy import ndimage  # slow to import, and most tasks have no repetitions

    grid = np.indices(fixed.shape, np.float64)
    centre = (np.array(fixed.shape) - 1) / 2
    position = np.stack([np.ones(fixed.shape), *((grid.T - centre) / np.maximum(centre, 1)).T])
    energy = fixed.astype(np.float64) ** 2
    weight = energy / max(energy.sum(), np.finfo(np.float64).tiny)
    affine, field = np.zeros((3, 4)), np.zeros(grid.shape)
    for _ in range(steps):
        moved = ndimage.map_coordinates(moving, grid + field, np.float64, order=1, mode="nearest")
        mean = (fixed + moved) / 2
        gradient = np.stack([ndimage.correlate1d(mean, [-0.5, 0, 0.5], axis, mode="nearest") for axis in range(3)])
        design = np.concatenate([(gradient[:, None] * position).reshape(12, -1), mean.reshape(1, -1)])
        # Least squares of least norm: a single slice tells nothing about motion across it.
        change = np.linalg.lstsq(design @ design.T, design @ (fixed - moved).ravel(), rcond=1e-9)[0][:12]
        affine += change.reshape(3, 4)
        field = np.tensordot(affine, position, 1)
        if np.abs(change).max() < 0.01:
            break
    slices, rows, columns = np.sqrt((weight * field**2).sum((1, 2, 3)))
    return float(rows), float(columns), float(slices)
