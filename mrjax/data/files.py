"""Slices of many files, read at memory speed where they lie uncompressed, through HDF5 where they do not."""

import collections
import os
import threading
from typing import Any, NamedTuple

import h5py
import numpy as np

from mrjax.data.t5 import open_file
from mrjax.errors import UserError


class _Layout(NamedTuple):
    """Where the slices of a data set lie in its file: for each the offset of its first byte."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


class Files:
    """Reads slices of many files, from any number of threads.

    HDF5 has one lock for all of a process. Uncompressed slices in one piece (contiguous data sets, or one chunk
    a slice: fastMRI's, M4Raw's and our own files) are therefore read by their offset, past the library. Others go
    through a bounded number of open handles. A copy sent to another process carries neither.
    """

    def __init__(self, most: int = 64):
        self._most = most
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[str, h5py.File] = collections.OrderedDict()
        self._layouts: dict[tuple[str, str], _Layout | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_most": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._most = state["_most"]
        self._forget()

    def read(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Slice `index` of the data set `name`, as stored.

        Args:
          path: the file.
          name: the data set.
          index: the slice.
          out: C-contiguous memory for it, used where the slice can be read straight into it: then `out` is returned.

        Raises:
          UserError: the file or the slice cannot be read.
        """
        try:
            if (path, name) not in self._layouts:
                with self._lock:
                    self._layouts[path, name] = _layout(self._handle(path)[name])
            layout = self._layouts[path, name]
            if layout is None:
                with self._lock:
                    return self._handle(path)[name][index]
            shapes = (layout.shape, (1, *layout.shape))  # a single coil may come without its axis
            if out is None or out.dtype != layout.dtype or out.shape not in shapes:
                out = np.empty(layout.shape, layout.dtype)
            # Opened anew for each slice: 3 us, against keeping open as many files as a data set may have.
            number = os.open(path, os.O_RDONLY)
            try:
                read_at(number, out, layout.offsets[index])
            finally:
                os.close(number)
            return out
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(f"{path}: slice {index} of `{name}` cannot be read ({error})") from error

    def _handle(self, path: str) -> h5py.File:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) >= self._most:
                self._open.popitem(last=False)[1].close()
            self._open[path] = open_file(path)
        return self._open[path]


def read_at(number: int, out: np.ndarray, offset: int) -> None:
    """Fills a C-contiguous array with the bytes of an open file from `offset` on; too few of them are an OSError."""
    left = out.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(number, [left], offset)
        if not count:
            raise OSError("the file ends before the slice does")
        left, offset = left[count:], offset + count


def _layout(data: h5py.Dataset) -> _Layout | None:
    """Where the slices lie, or None where HDF5 has to find or decode them."""
    shape, dtype = data.shape[1:], data.dtype
    size = int(np.prod(shape)) * dtype.itemsize
    plain = data.id.get_create_plist().get_nfilters() == 0 and not data.external and not data.is_virtual
    # A compound type may be padded in the file and not in memory: then the sizes differ.
    whole = data.id.get_storage_size() == size * data.shape[0]
    if not (plain and whole and dtype.isnative) or data.file.userblock_size:
        return None
    if data.chunks is None:
        first = data.id.get_offset()
        return None if first is None else _Layout(tuple(first + i * size for i in range(data.shape[0])), shape, dtype)
    if data.chunks != (1, *shape) or data.id.get_num_chunks() != data.shape[0]:
        return None
    chunks = [data.id.get_chunk_info_by_coord((i, *(0,) * len(shape))) for i in range(data.shape[0])]
    return _Layout(tuple(chunk.byte_offset for chunk in chunks), shape, dtype)
