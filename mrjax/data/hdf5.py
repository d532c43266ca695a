"""The .t5 file: HDF5 of one volume, in one of three layouts, with fastMRI's attributes (`max`, `acquisition`, ...).

kspace: `kspace` complex (slices, [coils,] height, width); optionally its image `reconstruction_rss`,
        `reconstruction_esc` or `target` (slices, height, width), and a `mask` of what was measured: (width,), or
        (height, width), or either for each slice; for acquisition.mask = 'stored', of what to keep
paired: `input` and `target`, real or complex (slices, height, width)
result: `reconstruction` (slices, height, width) float32, written by mrjax.reconstruct
"""

import functools
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from mrjax.data.files import replacing
from mrjax.data.volume import Volume, describe_arrays
from mrjax.errors import UserError


class SliceOffsets(NamedTuple):
    """Position in the file of each slice's first byte, the shape and dtype of a slice, and which file they are of."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    file: tuple[int, ...]


_lock = threading.Lock()  # as HDF5 has one for the whole process
_open = functools.lru_cache(maxsize=64)(lambda path: open_file(path))


class Hdf5Reader:
    """Reads slices from any number of threads: uncompressed ones in one piece by their offset in the file.

    HDF5 reads what is compressed or in pieces (not the files of fastMRI, M4Raw and mrjax), 64 open files at most.
    """

    suffixes: tuple[str, ...] = (".t5", ".h5", ".hdf5")

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, str], SliceOffsets | None] = {}  # by file and data set

    def describe(self, path: str, layout: str | None = None) -> Volume:
        """Read the headers of a file; raises `UserError` if it is damaged, no HDF5, or of no layout."""
        with open_file(path) as file:
            try:
                arrays = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
                volume = describe_arrays(path, arrays, file.attrs, layout)
                # Found here, so that no epoch opens the file with HDF5.
                for name in filter(None, (volume.data, volume.target)):
                    self._offsets[path, name] = find_offsets(arrays[name], path)
            except UserError:
                raise
            except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
                raise UserError(f"{path}: is damaged ({error}), expected readable data sets and attributes") from error
        with _lock:
            _open.cache_clear()  # this file may have been written anew
        return volume

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read a slice of a data set as stored (see `volume.Reader`)."""
        try:
            if (path, name) not in self._offsets:
                with _lock:
                    self._offsets[path, name] = find_offsets(_open(path)[name], path)
            found = self._offsets[path, name]
            if found is None:
                with _lock:
                    return _open(path)[name][index]
            shapes = (found.shape, (1, *found.shape))  # a single coil may be stored without its axis
            if out is None or out.dtype != found.dtype or out.shape not in shapes:
                out = np.empty(found.shape, found.dtype)
            # Opened for each slice: 6 us, so that any number of files can be in use.
            with open(path, "rb") as file:
                if _identity(os.fstat(file.fileno())) != found.file:
                    raise OSError("the file was replaced or changed since it was described")
                file.seek(found.offsets[index])
                if file.readinto(out.reshape(-1).view(np.uint8).data) < out.nbytes:
                    raise OSError("the file ends before the slice does")
            return out
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(f"{path}: slice {index} of `{name}` cannot be read ({error})") from error

    def write_like(self, source: str, path: Path, arrays: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        """Write a file with the attributes and the ISMRMRD header of the file `source`, and the given ones."""
        with open_file(source) as file:
            header = {"ismrmrd_header": file["ismrmrd_header"][()]} if "ismrmrd_header" in file else {}
            attributes = {**file.attrs, **attributes}
        write(path, {**arrays, **header}, attributes)


def find_offsets(data: h5py.Dataset, path: str) -> SliceOffsets | None:
    """Find where the slices of a data set are in the file `path`; None if only HDF5 can find or decode them."""
    count, *shape = data.shape
    size, file = data.dtype.itemsize * math.prod(shape), os.stat(path)
    # Chunks may be missing, and then the sizes differ; a link may lead into another file.
    complete = data.id.get_storage_size() == size * count and data.id.get_create_plist().get_nfilters() == 0
    in_file = os.path.samestat(file, os.stat(data.file.filename)) and not data.file.userblock_size
    # Numbers may be stored with another precision, padding or order of real and imaginary part.
    if not complete or not in_file or data.id.get_type() != h5py.h5t.py_create(data.dtype):
        return None
    start = data.id.get_offset()  # None unless the data set is contiguous, and in this file
    if data.chunks == (1, *shape):
        corners = [(i, *[0] * len(shape)) for i in range(count)]
        offsets = [data.id.get_chunk_info_by_coord(corner).byte_offset for corner in corners]
    elif start is not None:
        offsets = [start + i * size for i in range(count)]
    else:
        return None
    return SliceOffsets(tuple(offsets), tuple(shape), data.dtype, _identity(file))


def _identity(file: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written to."""
    return file.st_ino, file.st_size, file.st_mtime_ns


def open_file(path: str) -> h5py.File:
    """Open a file for reading; raises a `UserError` that says why it cannot be opened."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if not os.path.isfile(path):
            reason = "no such file, or a folder, expected an HDF5 file"
        elif os.path.getsize(path) == 0:
            reason = "is empty, expected an HDF5 file"
        elif "truncated" in str(error):
            reason = f"is truncated ({os.path.getsize(path)} bytes are left), expected a whole HDF5 file; copy it again"
        elif "signature" in str(error):
            reason = "is not an HDF5 file, expected one with `kspace`, or with `input` and `target`"
        else:
            reason = f"cannot be opened as HDF5 ({error})"
        raise UserError(f"{path}: {reason}") from error


def write(path: str | os.PathLike[str], arrays: Mapping[str, Any], attributes: Mapping[str, Any] | None = None) -> None:
    """Write data sets and attributes, uncompressed, one chunk a slice where there are three or more axes.

    The folder is made if need be; a failure leaves no file, or the old one.
    """
    with replacing(path) as part, h5py.File(part, "w") as file:
        for name, data in arrays.items():
            by_slice = isinstance(data, np.ndarray) and data.ndim >= 3
            file.create_dataset(name, data=data, chunks=(1, *data.shape[1:]) if by_slice else None)
        file.attrs.update(attributes or {})
