"""DICOM series: the stacks that frames make, and where in space their slices lie."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mrjax.errors import UserError, expect
from mrjax.io.dicom_files import Frame

_TOLERANCE = 0.05  # of the distance of slices, by which one may be off its place


class Stack(NamedTuple):
    """Frames in the order of their positions along the normal of their plane."""

    frames: tuple[Frame, ...]
    affine: np.ndarray | None  # see `volume.Volume`


def split(frames: Iterable[Frame]) -> list[list[Frame]]:
    """Split frames into stacks; by the number of the acquisition only where positions occur more than once."""
    stacks: dict[Any, list[Frame]] = {}
    for frame in frames:
        stacks.setdefault(frame.stack, []).append(frame)
    for key, found in list(stacks.items()):
        places = {None if frame.position is None else tuple(frame.position) for frame in found}
        if len(places) < len(found) and not found[0].file.fault:
            del stacks[key]
            for frame in found:
                stacks.setdefault((key, frame.acquisition), []).append(frame)
    return list(stacks.values())


def sort(label: str, frames: list[Frame]) -> Stack:
    """Sort the frames of a stack; `UserError` if they are no regular grid, or cannot be read."""
    first, count = frames[0], len(frames)
    fault = next((frame.file.fault for frame in frames if frame.file.fault), "")
    if fault:
        raise UserError(f"{label}: {fault}")
    shapes = sorted({frame.file.shape for frame in frames})
    sizes = ", ".join(f"{height} x {width}" for height, width in shapes[:4])
    expect(len(shapes) == 1, f"{label}: holds slices of several sizes in one series ({sizes})", "one size")
    if first.axes is None or any(frame.position is None for frame in frames):
        found = f"{label}: holds {count} slices without ImagePositionPatient and ImageOrientationPatient"
        expect(len({frame.file.path for frame in frames}) == 1, found, "the position of each, or one file")
        return Stack(tuple(sorted(frames, key=lambda frame: frame.number)), None)
    normal = np.cross(*first.axes)
    positions = np.array([frame.position for frame in frames])
    order = np.argsort(positions @ normal, kind="stable")
    positions, step = positions[order], normal * first.thickness
    if count > 1:
        step = (positions[-1] - positions[0]) / (count - 1)
        distances = np.diff(positions @ normal)
        found = f"{label}: holds {np.sum(distances < 1e-3) + 1} slices at one position"
        expect(distances.min() >= 1e-3, found, "one; split what was measured several times")
        off = np.linalg.norm(np.diff(positions, axis=0) - step, axis=1).max()
        found = f"{label}: its {count} slices lie {distances.min():.4g} to {distances.max():.4g} mm apart"
        expect(off <= _TOLERANCE * np.linalg.norm(step), found, "one distance; a slice may be missing")
    if first.spacing is None:
        return Stack(tuple(frames[i] for i in order), None)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([first.axes[0] * first.spacing[1], first.axes[1] * first.spacing[0], step], 1)
    affine[:3, 3] = positions[0]
    return Stack(tuple(frames[i] for i in order), np.diag([-1.0, -1, 1, 1]) @ affine)
