"""The .t5 file: an HDF5 file that holds one volume.

Layouts (the contents count, not whether the name ends in .t5, .h5 or .hdf5):
  kspace: `kspace` complex (slices, [coils,] height, width), with or without its image `reconstruction_rss`,
          `reconstruction_esc` or `target` (slices, height, width), and with a `mask` (width,) if it is undersampled
          (or is to be, in training with config.acquisition.mask = 'stored')
  paired: `input` and `target`, real or complex (slices, height, width)
  result: `reconstruction` (slices, height, width) float32, written by mrjax.reconstruct
Attributes follow fastMRI: `max`, `norm`, `acquisition`, `patient_id`.
"""

import collections
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from mrjax.data.buffers import read_at
from mrjax.data.volume import Volume, describe_arrays
from mrjax.errors import UserError


class SliceOffsets(NamedTuple):
    """Position in the file of each slice's first byte, and the shape and dtype of a slice."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


class Hdf5Reader:
    """Reads slices at memory speed if they are uncompressed, and through HDF5 otherwise; from any number of threads.

    HDF5 has one lock for the whole process. Uncompressed slices in one piece (contiguous data sets or one chunk
    a slice: the files of fastMRI, M4Raw and mrjax) are therefore read by their offset, without the library. Others are
    read through at most `max_open` open files, none of which is pickled.
    """

    suffixes: tuple[str, ...] = (".t5", ".h5", ".hdf5")

    def __init__(self, max_open: int = 64, offsets: Mapping[tuple[str, str], SliceOffsets | None] | None = None):
        self._max_open = max_open
        self._offsets = dict(offsets or {})  # by file and data set
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[str, h5py.File] = collections.OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Hdf5Reader, (self._max_open, self._offsets)

    def describe(self, path: str, layout: str | None = None) -> Volume:
        """Read the headers of a file; `layout` as in `describe_arrays`.

        Raises:
          UserError: not HDF5, truncated, damaged, or a data set missing or misshapen.
        """
        with open_file(path) as file:
            try:
                arrays = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
                volume = describe_arrays(path, arrays, file.attrs, layout)
                # Found here, so that no epoch opens the file with HDF5.
                for name in filter(None, (volume.data, volume.target)):
                    self._offsets[path, name] = find_offsets(arrays[name])
            except UserError:
                raise
            except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
                raise UserError(f"{path}: is damaged ({error}), expected readable data sets and attributes") from error
        with self._lock:
            self._open.pop(path, None)  # opened before the file was written anew
        return volume

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read a slice of a data set as stored (see `volume.Reader`)."""
        try:
            if (path, name) not in self._offsets:
                with self._lock:
                    self._offsets[path, name] = find_offsets(self._file(path)[name])
            found = self._offsets[path, name]
            if found is None:
                with self._lock:
                    return self._file(path)[name][index]
            shapes = (found.shape, (1, *found.shape))  # a single coil may be stored without its axis
            if out is None or out.dtype != found.dtype or out.shape not in shapes:
                out = np.empty(found.shape, found.dtype)
            # Opened for each slice: 3 us, so that any number of files can be in use.
            descriptor = os.open(path, os.O_RDONLY)
            try:
                read_at(descriptor, out, found.offsets[index])
            finally:
                os.close(descriptor)
            return out
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(f"{path}: slice {index} of `{name}` cannot be read ({error})") from error

    def _file(self, path: str) -> h5py.File:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            self._open[path] = open_file(path)
        return self._open[path]

    def write_like(self, source: str, path: Path, arrays: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        """Write a file with the attributes and the ISMRMRD header of the file `source`, and the given ones."""
        with open_file(source) as file:
            header = {"ismrmrd_header": file["ismrmrd_header"][()]} if "ismrmrd_header" in file else {}
            attributes = {**file.attrs, **attributes}
        write(path, {**arrays, **header}, attributes)


def find_offsets(data: h5py.Dataset) -> SliceOffsets | None:
    """Find where the slices of a data set are in its file; None if only HDF5 can find or decode them."""
    shape, dtype = data.shape[1:], data.dtype
    size = int(np.prod(shape)) * dtype.itemsize
    plain = data.id.get_create_plist().get_nfilters() == 0 and not data.external and not data.is_virtual
    # A compound type may be padded in the file and not in memory: then the sizes differ.
    complete = data.id.get_storage_size() == size * data.shape[0]
    if not (plain and complete and dtype.isnative) or data.file.userblock_size:
        return None
    if data.chunks is None:
        first = data.id.get_offset()
        offsets = None if first is None else tuple(first + i * size for i in range(data.shape[0]))
    elif data.chunks == (1, *shape) and data.id.get_num_chunks() == data.shape[0]:
        corner = (0,) * len(shape)
        offsets = tuple(data.id.get_chunk_info_by_coord((i, *corner)).byte_offset for i in range(data.shape[0]))
    else:
        offsets = None
    return None if offsets is None else SliceOffsets(offsets, shape, dtype)


def open_file(path: str) -> h5py.File:
    """Open a file for reading; raises a `UserError` that says why it cannot be opened."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if not os.path.exists(path):
            reason = "no such file"
        elif os.path.isdir(path):
            reason = "is a folder, expected an HDF5 file"
        elif os.path.getsize(path) == 0:
            reason = "is empty, expected an HDF5 file"
        elif "truncated" in str(error):
            reason = f"is truncated ({os.path.getsize(path)} bytes are left), expected a whole HDF5 file; copy it again"
        elif "signature" in str(error):
            reason = "is not an HDF5 file, expected one with `kspace`, or with `input` and `target`"
        else:
            reason = f"cannot be opened as HDF5 ({error})"
        raise UserError(f"{path}: {reason}") from error


def read(path: str, name: str) -> np.ndarray:
    """Read a whole data set as stored."""
    with open_file(path) as file:
        return file[name][()]


def write(path: str | os.PathLike[str], arrays: Mapping[str, Any], attributes: Mapping[str, Any] | None = None) -> None:
    """Write a volume, uncompressed, one chunk a slice; a failure leaves no file, or the old one.

    Args:
      path: the file; its folder is made if need be.
      arrays: data sets by name; those of three or more axes are chunked by slice, a str is written as text.
      attributes: of the file, e.g. `max`, `norm`, `acquisition`, `patient_id`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(part, "w") as file:
            for name, data in arrays.items():
                by_slice = isinstance(data, np.ndarray) and data.ndim >= 3
                file.create_dataset(name, data=data, chunks=(1, *data.shape[1:]) if by_slice else None)
            file.attrs.update(attributes or {})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
