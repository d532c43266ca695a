"""The file formats, and which files are theirs."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mrjax.data.hdf5 import Hdf5Reader
from mrjax.data.storage import NATIVE, Storage, parallel_file
from mrjax.data.volume import Reader, Volume
from mrjax.errors import expect

READERS: dict[str, Reader] = {"hdf5": Hdf5Reader()}


def reader_for(path: str) -> Reader:
    """Return the reader of a file's suffix; HDF5's if it is no reader's."""
    suffix = Path(path).suffix.lower()
    return next((reader for reader in READERS.values() if suffix in reader.suffixes), READERS["hdf5"])


def find(paths: str | Iterable[str]) -> list[str]:
    """Find the files that a folder (with its subfolders), a glob, a file, or a list of these names; sorted.

    Raises `UserError` if there are none.
    """
    if not isinstance(paths, str):
        return sorted({found for path in paths for found in find(str(path))})
    suffixes = [suffix for reader in READERS.values() for suffix in reader.suffixes]
    if os.path.isdir(paths) and Path(paths).suffix.lower() not in suffixes:
        found = [os.path.normpath(path) for path in _walk(paths) if Path(path).suffix.lower() in suffixes]
        found = [path for path in found if not parallel_file(path, of_target=True)]
    elif os.path.exists(paths):
        return [paths]
    else:
        found = [path for path in glob.glob(paths, recursive=True) if os.path.isfile(path)]
    *most, last = suffixes
    what = f"no {', '.join(most)} or {last} file in it" if os.path.isdir(paths) else "no such file or folder"
    expect(found, f"{paths}: {what}", "a file, a folder of them or a glob")
    return sorted(found)


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
    reader = reader_for(path)
    return np.stack([reader.read_slice(path, name, index) for index in range(slices)])
