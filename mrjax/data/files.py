"""Slices of many files, read at memory speed where they lie uncompressed, through HDF5 where they do not."""

import collections
import os
import threading
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from mrjax.data.hdf5 import open_file
from mrjax.data.layout import Layout, layout_of
from mrjax.errors import UserError


class Files:
    """Reads slices of many files, from any number of threads.

    HDF5 has one lock for all of a process. Uncompressed slices in one piece (contiguous data sets, or one chunk
    a slice: fastMRI's, M4Raw's and our own files) are therefore read by their offset, past the library. Others go
    through a bounded number of open handles, of which a copy sent to another process carries none.

    Args:
      known: where the slices of a data set lie, by file and data set; found out at the first reading of any other.
      most: handles open at a time.
    """

    def __init__(self, known: Mapping[tuple[str, str], Layout | None] | None = None, most: int = 64):
        self._most = most
        self._layouts = dict(known or {})
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[str, h5py.File] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_most": self._most, "_layouts": self._layouts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
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
                    self._layouts[path, name] = layout_of(self._handle(path)[name])
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
