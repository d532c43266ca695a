"""Variable-length data of HDF5 files, located by their bytes (HDF5 file format, III.E: the global heap).

h5py takes 180 us for each readout of 32 KB, under HDF5's lock, and HDF5 allocates whatever length an element claims;
a read at an offset takes 8 us in any thread.
"""

import os
import struct

import h5py
import numpy as np

from mrjax.errors import expect

POINTER = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])  # to a variable-length sequence
_COLLECTION, _OBJECT = struct.Struct("<4sB3xQ"), struct.Struct("<H6xQ")


def read_elements(data: h5py.Dataset, path: str) -> np.ndarray:
    """Read a data set's elements as stored, pointers in the place of sequences: (elements, bytes) uint8.

    Raises `UserError` if it is compressed or stored otherwise than in chunks or in one piece, `OSError` if bytes are
    missing.
    """
    label, creation = f"{path}: `{data.name}`", data.id.get_create_plist()
    expect(creation.get_nfilters() == 0, f"{label} is compressed", "no compression, as h5repack -f NONE writes it")
    expect(data.file.id.get_create_plist().get_sizes() == (8, 8), f"{path}: has short addresses", "those of 64 bits")
    count = data.size
    expect(count and count == max(data.shape, default=1), f"{label} has shape {data.shape}", "elements along one axis")
    along = data.shape.index(count) if data.shape else 0
    length = data.chunks[along] if data.chunks else count
    stored: list[tuple[int, int]] = []  # first element of a piece, and its position in the file
    if data.chunks:
        data.id.chunk_iter(lambda one: stored.append((one.chunk_offset[along], one.byte_offset)))
    elif data.id.get_offset() is not None:
        stored.append((0, data.id.get_offset()))
    expect(stored, f"{label} is stored in the file's headers or not at all", "chunks or one piece")
    # h5py tells the size of an element in memory, which differs for text.
    size = data.id.get_storage_size() // (len(stored) * length)
    room = os.path.getsize(path)
    whole = len(stored) * length >= count and count * size <= room
    expect(whole, f"{label} claims {count:,} elements of {size} bytes in a file of {room:,}", "all in the file")
    elements = np.zeros((count, size), np.uint8)
    with open(path, "rb") as file:
        for first, offset in stored:
            read_into(file.fileno(), elements[first : first + length], offset)
    return elements


def read_into(file: int, out: np.ndarray, offset: int) -> None:
    """Read a C-contiguous array from an offset of an open file; raises `OSError` if the file ends before."""
    if os.preadv(file, [out.reshape(-1).view(np.uint8).data], offset) < out.nbytes:
        raise OSError("the file ends before its samples do")


class GlobalHeap:
    """Locates the objects of a file's global heap; its walk is bounded by the file's size, whatever the file claims."""

    def __init__(self, file: int):
        self._file = file
        self._size = os.fstat(file).st_size
        self._steps = self._size // _OBJECT.size
        self._collections: dict[int, dict[int, tuple[int, int]]] = {}

    def locate(self, address: int, index: int) -> tuple[int, int]:
        """Return offset and bytes of an object; raises `OSError` or `LookupError` if it is not in the file."""
        if address not in self._collections:
            self._collections[address] = self._walk(address)
        return self._collections[address][index]

    def _walk(self, address: int) -> dict[int, tuple[int, int]]:
        signature, _, length = self._unpack(_COLLECTION, address)
        if signature != b"GCOL":
            raise OSError(f"there is no global heap at {address}")
        objects, place, end = {}, address + _COLLECTION.size, min(address + length, self._size)
        while place + _OBJECT.size <= end:
            index, length = self._unpack(_OBJECT, place)
            place, self._steps = place + _OBJECT.size, self._steps - 1
            if index == 0:  # free space, the last
                break
            if self._steps < 0 or place + length > self._size:
                raise OSError(f"the global heap at {address} is larger than the file")
            objects[index] = (place, length)
            place += -(-length // 8) * 8
        return objects

    def _unpack(self, form: struct.Struct, place: int) -> tuple:
        data = os.pread(self._file, form.size, place)
        if len(data) < form.size:
            raise OSError(f"there is nothing at {place}")
        return form.unpack(data)
