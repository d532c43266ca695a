"""Where the slices of an HDF5 data set lie in its file, so that they can be read without HDF5."""

from typing import NamedTuple

import h5py
import numpy as np


class Layout(NamedTuple):
    """Where the slices of a data set lie in its file: for each the offset of its first byte."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


def layout_of(data: h5py.Dataset) -> Layout | None:
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
        return None if first is None else Layout(tuple(first + i * size for i in range(data.shape[0])), shape, dtype)
    if data.chunks != (1, *shape) or data.id.get_num_chunks() != data.shape[0]:
        return None
    chunks = [data.id.get_chunk_info_by_coord((i, *(0,) * len(shape))) for i in range(data.shape[0])]
    return Layout(tuple(chunk.byte_offset for chunk in chunks), shape, dtype)
