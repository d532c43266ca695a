"""Chunks of HDF5 data sets, read from the file itself: HDF5 would read and inflate under one lock of the process.

Handles raw and gzip-compressed chunks, with and without HDF5's shuffle filter, of any shape; and contiguous data sets,
whose slices count as chunks. libdeflate is faster than zlib, and never writes more than a chunk holds; `inflate_noise`
is faster still, for most k-space, and leaves to it what it cannot do.
"""

import itertools
import math
import os
from typing import BinaryIO, NamedTuple

import deflate
import h5py
import numpy as np
from h5py.h5z import FILTER_DEFLATE, FILTER_SHUFFLE

from mrjax.io.inflate import PADDING, inflate_noise, unshuffle


class Chunks(NamedTuple):
    """Where a file holds the chunks of a data set, and how they are packed.

    Attributes:
      table: (*grid, 3) int64, first byte, number of bytes (0: never written) and filter mask of each chunk; the first
        axis of the grid is that of the slices.
      shape: of a chunk, the axes in the file's order.
      axis: the chunk's axis of slices.
      slice_shape: of a slice in the file, without the axis of slices.
      slices: how many there are.
      filters: HDF5's codes in the order of writing.
      fill: value of chunks that were never written, a scalar array of the stored dtype.
    """

    table: np.ndarray
    shape: tuple[int, ...]
    axis: int
    slice_shape: tuple[int, ...]
    slices: int
    filters: tuple[int, ...]
    fill: np.ndarray


def find_chunks(data: h5py.Dataset, path: str, axis: int | None) -> Chunks | None:
    """Find the chunks of a data set in the file `path`; None if only HDF5 can find or decode them.

    `axis` is that of the slices, None if the data set is one slice.
    """
    # A link may lead into another file. Before HDF5 2, offsets did not count the user block, which MATLAB writes.
    in_file = os.path.samestat(os.stat(path), os.stat(data.file.filename))
    in_file &= not data.file.userblock_size or h5py.version.hdf5_version_tuple >= (2, 0, 0)
    # Numbers may be stored with another precision, padding or order of real and imaginary part.
    if not in_file or 0 in data.shape or data.id.get_type() != h5py.h5t.py_create(data.dtype):
        return None
    creation = data.id.get_create_plist()
    filters = [creation.get_filter(i) for i in range(creation.get_nfilters())]
    codes, itemsize = tuple(code for code, *_ in filters), data.dtype.itemsize
    if codes not in ((), (FILTER_DEFLATE,), (FILTER_SHUFFLE, FILTER_DEFLATE)):
        return None
    if FILTER_SHUFFLE in codes and filters[0][2][:1] != (itemsize,):
        return None
    shape = data.chunks or (data.shape if axis is None else (1, *data.shape[1:]))
    if not codes and axis is not None and shape[axis] > 1:  # HDF5 need not read all of a raw chunk
        return None
    table = np.zeros((*(-(-n // side) for n, side in zip(data.shape, shape, strict=True)), 3), np.int64)
    size, end = itemsize * math.prod(shape), os.path.getsize(path)
    stored: list[h5py.h5d.StoreInfo] = []
    if data.chunks:
        data.id.chunk_iter(stored.append)
    elif axis or data.id.get_offset() is None or data.id.get_storage_size() != itemsize * data.size:
        return None
    else:
        rows = table.reshape(-1, 3)
        rows[:, 0], rows[:, 1] = data.id.get_offset() + size * np.arange(len(rows)), size
    for one in stored:
        raw = not codes or one.filter_mask >> codes.index(FILTER_DEFLATE) & 1
        # A file may keep chunks that reach beyond the data set raw, and their mask does not show it, but their size.
        cut = any(first + side > n for first, side, n in zip(one.chunk_offset, shape, data.shape, strict=True))
        unclear = one.size != size if raw else cut and one.size == size
        if unclear or one.byte_offset + one.size > end:
            return None
        place = tuple(first // side for first, side in zip(one.chunk_offset, shape, strict=True))
        table[place] = one.byte_offset, one.size, one.filter_mask
    fill = np.array(data.fillvalue, data.dtype)
    if axis is None:
        return Chunks(table[None], (1, *shape), 0, data.shape, 1, codes, fill)
    slice_shape = data.shape[:axis] + data.shape[axis + 1 :]
    return Chunks(np.moveaxis(table, axis, 0), shape, axis, slice_shape, data.shape[axis], codes, fill)


def read_slice(file: BinaryIO, chunks: Chunks, index: int, out: np.ndarray) -> None:
    """Read a slice into `out`, C-contiguous, of the stored dtype and `slice_shape`; raises OSError for damage."""
    row, inside = divmod(range(chunks.slices)[index], chunks.shape[chunks.axis])
    sides = chunks.shape[: chunks.axis] + chunks.shape[chunks.axis + 1 :]
    places = itertools.product(*map(range, chunks.table.shape[1:-1]))
    for place, (first, size, mask) in zip(places, chunks.table[row].reshape(-1, 3).tolist(), strict=True):
        part = out[tuple([slice(i * side, (i + 1) * side) for i, side in zip(place, sides, strict=True)])]
        if not size:
            part[...] = chunks.fill
        elif part.flags.c_contiguous and part.size == math.prod(chunks.shape):
            _read_chunk(file, chunks, first, size, mask, part)
        else:
            chunk = np.empty(chunks.shape, out.dtype)
            _read_chunk(file, chunks, first, size, mask, chunk)
            one = np.moveaxis(chunk, chunks.axis, 0)[inside]
            part[...] = one[tuple(map(slice, part.shape))]


def _read_chunk(file: BinaryIO, chunks: Chunks, first: int, size: int, mask: int, out: np.ndarray) -> None:
    """Read and unpack a chunk into `out`, C-contiguous."""
    filters = [code for bit, code in enumerate(chunks.filters) if not mask >> bit & 1]
    data = out.reshape(-1).view(np.uint8)
    packed = np.empty(size + PADDING, np.uint8)[:size] if filters else data
    file.seek(first)
    if file.readinto(packed.data) < size:  # type: ignore[attr-defined]
        raise OSError("the file ends before the slice does")
    # gzip stores shuffled noise as it is, apart from exponents, which are no noise.
    if filters == [FILTER_DEFLATE] and inflate_noise(packed, data):
        return
    if FILTER_DEFLATE in filters:
        try:
            packed = np.frombuffer(deflate.zlib_decompress(packed, data.nbytes), np.uint8)
        except deflate.DeflateError as error:
            raise OSError(f"a chunk's gzip stream is damaged: {error}") from error
        if packed.size != data.size:
            raise OSError(f"a chunk holds {packed.size:,} bytes, expected {data.size:,}")
    if FILTER_SHUFFLE in filters:
        unshuffle(packed, data, out.itemsize)
    elif filters:
        data[:] = packed
