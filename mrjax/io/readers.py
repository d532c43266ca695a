"""The file formats, and which files are theirs."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mrjax.errors import expect
from mrjax.io.dicom import DicomReader
from mrjax.io.files import read_start
from mrjax.io.hdf5 import Hdf5Reader
from mrjax.io.ismrmrd import IsmrmrdReader
from mrjax.io.nifti import NiftiReader
from mrjax.io.numpy_files import NumpyReader
from mrjax.io.storage import NATIVE, Storage, parallel_file
from mrjax.io.volume import Reader, Volume

READERS: dict[str, Reader] = {
    "ismrmrd": IsmrmrdReader(),
    "nifti": NiftiReader(),
    "dicom": DicomReader(),
    "numpy": NumpyReader(),
    "hdf5": Hdf5Reader(),
}


def reader_for(path: str) -> Reader:
    """Return the reader of a file or folder by its contents; HDF5's, which says what is wrong, if it is no reader's."""
    start = read_start(path)
    return next((reader for reader in READERS.values() if reader.recognises(path, start)), READERS["hdf5"])


def find(paths: str | Iterable[str]) -> list[str]:
    """Find the volumes in a folder (with its subfolders), a glob, a file, or a list of these; sorted.

    Files count by their contents, whatever their names. Raises `UserError` if there are none.
    """
    if not isinstance(paths, str):
        return sorted({found for path in paths for found in find(str(path))})
    walked = os.path.isdir(paths) and not _is_volume(paths)
    if walked:
        found = [os.path.normpath(path) for path in _walk(paths) if _is_volume(path)]
    elif os.path.exists(paths):
        found = [paths]
    else:
        found = [path for path in glob.glob(paths, recursive=True) if os.path.isfile(path)]
    *most, last = [suffix for reader in READERS.values() for suffix in reader.suffixes]
    what = f"no {', '.join(most)} or {last} file in it" if os.path.isdir(paths) else "no such file or folder"
    found = sorted(set(_group(found)))
    if walked:
        found = [path for path in found if not parallel_file(path, of_target=True)]
    expect(found, f"{paths}: {what}", "a file, a folder of them or a glob")
    return found


def _is_volume(path: str) -> bool:
    """Tell whether a file holds a volume or a part of one, or a folder is one, by suffix or else by contents."""
    known = any(path.lower().endswith(reader.suffixes) for reader in READERS.values())
    if known or os.path.isdir(path):
        return known
    start = read_start(path)
    return bool(start) and any(reader.recognises(path, start) for reader in READERS.values())


def _group(paths: list[str]) -> Iterator[str]:
    """Yield a path for each volume."""
    by_place: dict[tuple[str, int], list[str]] = {}
    of_place: dict[tuple[str, int], Reader] = {}
    for path in paths:
        reader = reader_for(path)
        place = os.path.dirname(path), id(reader)
        of_place[place] = reader
        by_place.setdefault(place, []).append(path)
    for place, found in by_place.items():
        yield from of_place[place].group(found)


def result_places(path: Path, source: Volume) -> list[tuple[Path, Reader]]:
    """Return where a reconstruction goes, and who writes it: as the .t5 `path`, and in the source's own format."""
    own = reader_for(source.path)
    places = [(path, READERS["hdf5"])]
    if own.image_suffix not in ("", places[0][1].image_suffix):
        places.append((path.with_suffix(own.image_suffix), own))
    return places


def _walk(folder: str) -> Iterator[str]:
    """Yield what is in a folder, its subfolders and linked ones, but nothing hidden, and each folder once."""
    seen: set[str] = set()  # links may lead in circles
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in (*folders, *files) if not name.startswith("."))


def describe(path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
    """Read the headers of a file in any format (see `Reader.describe`)."""
    return reader_for(path).describe(path, layout, storage)


def read_slices(path: str, name: str, slices: int) -> np.ndarray:
    """Read all slices of an array."""
    return np.stack(list(iterate_slices(path, name, slices)))


def iterate_slices(path: str, name: str, slices: int) -> Iterator[np.ndarray]:
    """Read the slices of an array one by one."""
    reader = reader_for(path)
    return (reader.read_slice(path, name, index) for index in range(slices))
