"""Inflate zlib streams of noise, as k-space is, and undo the shuffle filter, faster than libdeflate and NumPy do.

By `inflate.cc`, compiled on first use.
"""

import ctypes
import functools
import logging
from pathlib import Path

import deflate
import numpy as np

from mrjax.ops.cpu import native

PADDING = 16  # bytes of memory after a stream, which are read and ignored


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = native.load(Path(__file__).with_name("inflate.cc"))
    except OSError as error:
        logging.getLogger(__name__).info("libdeflate alone reads gzip-compressed k-space: %s", error)
        return None
    library.mrjax_inflate.argtypes = (ctypes.c_void_p, ctypes.c_size_t) * 2
    library.mrjax_unshuffle.argtypes = (*(ctypes.c_void_p,) * 2, *(ctypes.c_size_t,) * 2)
    library.mrjax_inflate.restype = library.mrjax_unshuffle.restype = ctypes.c_bool
    return library


def inflate_noise(packed: np.ndarray, out: np.ndarray) -> bool:
    """Inflate a zlib stream into `out`, both (bytes,) uint8, without Python's lock; return whether that worked.

    `PADDING` bytes of memory must follow the stream. It is left to another decoder, and `out` undefined, if it is
    damaged, holds more or fewer bytes, or is no noise, and without a C++ compiler.
    """
    library = _library()
    if library is None or not library.mrjax_inflate(packed.ctypes.data, packed.size, out.ctypes.data, out.size):
        return False
    return deflate.adler32(out) == int.from_bytes(packed[-4:].tobytes(), "big")


def unshuffle(packed: np.ndarray, out: np.ndarray, itemsize: int) -> None:
    """Undo HDF5's shuffle filter: bytes sorted by their place in an item become items. Both are (bytes,) uint8."""
    items, library = out.size // itemsize, _library()
    if library is None or not library.mrjax_unshuffle(packed.ctypes.data, out.ctypes.data, items, itemsize):
        for byte, plane in enumerate(packed.reshape(itemsize, -1)):
            out[byte::itemsize] = plane
