"""Smooth random fields, and interpolation of volumes."""

from collections.abc import Sequence

import numpy as np
import scipy


def draw_random_field(rng: np.random.Generator, extent: Sequence[int], *scales: tuple[float, float]) -> np.ndarray:
    """Draw a sum of smooth fields, each of a spacing in mm and a deviation, float32 on a 4 mm grid over `extent` mm."""
    grid = [np.arange(0, e + 4, 4) for e in extent]
    field = np.zeros([len(positions) for positions in grid], np.float32)
    for spacing, deviation in scales:
        knots = rng.normal(0, 1.25 * deviation, [int(e // spacing) + 4 for e in extent])
        field += spline(knots, [positions / spacing + 1 for positions in grid])
    return field


def spline(values: np.ndarray, positions: Sequence[np.ndarray]) -> np.ndarray:
    """Interpolate `values` (a, b, c) by cubic splines at `positions` along each axis, counted in samples of it."""
    for axis, samples in enumerate(values.shape):
        values = scipy.interpolate.CubicSpline(np.arange(samples), values, axis)(positions[axis])
    return values


def interpolate(volume: np.ndarray, index: np.ndarray, voxel: float) -> np.ndarray:
    """Interpolate `volume`, of voxels of this size in mm, linearly at `index` (3, ...) in mm."""
    return scipy.ndimage.map_coordinates(volume, index / np.float32(voxel), order=1, mode="nearest", output=np.float32)
