"""DICOM: a series of single-frame files in a folder, or an enhanced multi-frame file, is a volume.

A volume goes by its folder where this holds nothing else, otherwise by the first file of its stack. Slices are in the
order of their positions along the normal of their plane; values are those of RescaleSlope and RescaleIntercept.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from mrjax.errors import UserError, expect
from mrjax.io.files import read_start
from mrjax.io.images import ImageHeader, ImageReader
from mrjax.io.storage import NATIVE, Storage, parallel_file
from mrjax.io.volume import Volume

if TYPE_CHECKING:
    from mrjax.io.dicom_files import Frame
    from mrjax.io.dicom_series import Stack

_DICOMDIR = b"1.2.840.10008.1.3.10"  # the class of a list of files, which is no image
_FILE_SUFFIXES = (".dcm", ".ima", ".dicom")  # of files and folders; their names go on to those of results without


class DicomReader(ImageReader):
    """Reads DICOM images of any kind, and writes a folder of single-frame MR images."""

    suffixes: tuple[str, ...] = (".dcm", ".ima")
    image_suffix = ".dicom"

    def __init__(self) -> None:
        self._stacks: dict[str, Stack] = {}  # by file or folder, as described

    def recognises(self, path: str, start: bytes) -> bool:
        """Tell by the signature, the first elements of a file that lacks it, or the suffix; a folder by its files."""
        return _is_dicom(path, start) or path in self._stacks or (os.path.isdir(path) and bool(_list_folder(path)))

    def group(self, paths: list[str]) -> list[str]:
        """Return the folder if its files make one stack, else the first file of each; those that are faulty as well."""
        folder = os.path.dirname(paths[0]) or "."
        try:
            _files()
        except UserError:  # `describe` will say so, once
            return [folder]
        by_name = {os.path.basename(path): path for path in paths}
        frames, faults = _read_folder(folder)
        found = [path for name, path in by_name.items() if os.path.join(folder, name) in faults]
        stacks = _split(frames)
        if len(stacks) == 1 and not faults and by_name.keys() >= set(_list_folder(folder)):
            return [folder]
        for stack in stacks:
            names = (os.path.basename(frame.file.path) for frame in stack)
            found += [path for path in map(by_name.get, names) if path][:1]
        return sorted(set(found)) or paths

    def read_header(self, path: str) -> ImageHeader:
        """Read the headers of a stack of slices."""
        stack = self._stack(path)
        file, files = stack.frames[0].file, tuple(frame.file.path for frame in stack.frames)
        return ImageHeader((len(stack.frames), *file.shape), np.dtype(np.float32), file.contrast, stack.affine, files)

    def _stack(self, path: str) -> Stack:
        """Return the stack as it was described, or else find it."""
        if (stack := self._stacks.get(path)) is None:
            stack = self._stacks[path] = _find_stack(path)
        return stack

    def describe(self, path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
        """Describe a volume by its headers; it goes by a hash where its file's or folder's name tells the patient's."""
        for known in (path, parallel_file(path)):
            self._stacks.pop(str(known), None)  # they may have changed
        volume = super().describe(path, layout, storage)
        frame = self._stack(path).frames[0]
        name = os.path.basename(os.path.abspath(path))
        name = Path(name).stem if name.lower().endswith(_FILE_SUFFIXES) else name
        if _files().names_patient(name, frame.file.identity):
            name = hashlib.sha256(frame.uid.encode()).hexdigest()[:12]
        return replace(volume, alias=name)

    def read_image(self, path: str, index: int) -> np.ndarray:
        """Read a slice (height, width) float32, as DICOM shows it."""
        return _files().read_pixels(self._stack(path).frames[index])

    def write(
        self,
        path: Path,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, Any],
        source: Volume,
        keep_identity: bool = False,
    ) -> None:
        """Write a folder of single-frame files (see `dicom_writer`)."""
        _files()
        from mrjax.io import dicom_writer

        own = self.recognises(source.path, read_start(source.path))
        first = _find_stack(source.path).frames[0].file.path if own else None
        dicom_writer.write(path, arrays, attributes, source, first, keep_identity)


def _files() -> ModuleType:
    """Import what needs pydicom."""
    try:
        from mrjax.io import dicom_files
    except ImportError as error:
        raise UserError("the package pydicom, which reads DICOM, is missing: pip install 'mrjax[io]'") from error
    return dicom_files


def _is_dicom(path: str, start: bytes) -> bool:
    """Tell by the signature; the suffix; or two elements in ascending order, of the groups that begin every file."""
    if start[128:132] == b"DICM":
        return _DICOMDIR not in start
    if path.lower().endswith(DicomReader.suffixes) and os.path.isfile(path):
        return True
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    size = int.from_bytes(start[6:8] if explicit else start[4:8], "little")
    first, second = start[:4], start[8 + size : 12 + size]
    known = all(len(tag) == 4 and tag[:2] in (b"\2\0", b"\x08\0") and tag[3] == 0 for tag in (first, second))
    return known and (first[0], first[2]) < (second[0], second[2])


def _list_folder(folder: str) -> tuple[str, ...]:
    """Return the names of the DICOM files in a folder, sorted."""
    try:
        return _select_dicom(folder, tuple(sorted(name for name in os.listdir(folder) if not name.startswith("."))))
    except OSError:
        return ()


@functools.lru_cache(maxsize=64)
def _select_dicom(folder: str, names: tuple[str, ...]) -> tuple[str, ...]:
    paths = [os.path.join(folder, name) for name in names]
    return tuple(name for name, path in zip(names, paths, strict=True) if _is_dicom(path, read_start(path)))


def _read_folder(folder: str) -> tuple[list[Frame], dict[str, UserError]]:
    """Return the frames of a folder's files, and what is wrong with the others by their paths."""
    frames: list[Frame] = []
    faults = {}
    for name in _list_folder(folder):
        path = os.path.join(folder, name)
        try:
            frames += _files().read_frames(path)
        except UserError as error:
            faults[path] = error
    return frames, faults


def _split(frames: list[Frame]) -> list[list[Frame]]:
    from mrjax.io import dicom_series

    return dicom_series.split(frames)


def _find_stack(path: str) -> Stack:
    """Find the one stack of a folder, or the one that a file is part of; `UserError` if there are none or several."""
    whole = os.path.isdir(path)
    folder = path if whole else os.path.dirname(path) or "."
    expect(whole or os.path.isfile(path), f"{path}: no such file or folder", "a DICOM file or a folder of them")
    frames, faults = _read_folder(folder)
    file = os.path.join(folder, os.path.basename(path))
    if error := faults.get(file) or (whole and next(iter(faults.values()), None)):
        raise error
    if not whole:  # of many volumes in one folder only this one is split
        own = {frame.stack for frame in frames if frame.file.path == file}
        frames = [frame for frame in frames if frame.stack in own]
    stacks = [stack for stack in _split(frames) if whole or any(frame.file.path == file for frame in stack)]
    expect(stacks, f"{path}: holds no image", "DICOM images")
    expect(len(stacks) == 1, f"{path}: holds {len(stacks)} stacks of slices (by series, echo, time or plane)", "one")
    from mrjax.io import dicom_series

    return dicom_series.sort(path, stacks[0])
