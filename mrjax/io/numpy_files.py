"""NumPy's files: .npy, one array, and .npz, arrays by their keys. Pickled objects are refused.

Keys of an .npz are the names of `storage`, as data sets of a .t5 are. The array of an .npy is k-space if it is complex
(or real with a last axis of 2), else images: of a pair if its target lies beside it, or if the task is on pairs.

Slices are read through a memory map. What `np.savez_compressed` wrote is unpacked whole, and the array read last is
kept: convert such files before training (mrjax.convert).
"""

import contextlib
import functools
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy

from mrjax.errors import UserError, expect
from mrjax.io.files import identity
from mrjax.io.hdf5_contents import MAX_RATIO, SMALL_SLICE, WORKING_SLICES
from mrjax.io.storage import AXES, NATIVE, Arrangement, Storage, arrange, name_axes, parallel_file
from mrjax.io.volume import DATA_NAMES, TARGET_NAMES, Volume, describe_arrays
from mrjax.parallel.memory import available_memory

ZIP = b"PK\3\4"
_LONGEST_HEADER = 1 << 14  # bytes; NumPy refuses more than 10,000
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What NumPy and zipfile raise for damaged files.
_DAMAGES: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError)
_DAMAGES += (MemoryError, RuntimeError, SyntaxError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error)


class StoredArray(NamedTuple):
    """Where and how a file stores an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]
    path: str
    file: tuple[int, ...]  # see `files.identity`
    offset: int  # of the samples
    member: str = ""  # the compressed file of an .npz that holds them

    def load(self) -> np.ndarray:
        """Map the array, or unpack it."""
        if identity(os.stat(self.path)) != self.file:
            raise OSError("the file was replaced or changed since it was described")
        if self.member:
            return _unpack(self)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)


class ArrangedArray(NamedTuple):
    """An array as it is read, (slices, [coils,] height, width)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int | None  # the stored axis of slices; None: the one slice has none
    arrangement: Arrangement
    stored: StoredArray


class NumpyReader:
    """Reads slices from any number of threads."""

    suffixes: tuple[str, ...] = (".npy", ".npz")
    image_suffix = ""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, str], ArrangedArray] = {}  # by file and name

    def recognises(self, path: str, start: bytes) -> bool:
        """Tell by the magic bytes, those of a zip whose first member is an array, or the suffix."""
        member = start[30 : 30 + int.from_bytes(start[26:28], "little")]
        arrays = start.startswith(ZIP) and member.endswith(b".npy")
        return arrays or start.startswith(npy.MAGIC_PREFIX) or path.lower().endswith(self.suffixes)

    def group(self, paths: list[str]) -> list[str]:
        """Return the files: each is a volume."""
        return paths

    def describe(self, path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
        """Read the headers of a file; raises `UserError` if it is damaged, or holds Python objects."""
        with _explained(f"{path}: is damaged", ", expected a file of np.save or np.savez"):
            arrays = find_arrays(path, layout, storage)
            volume = describe_arrays(path, arrays, {}, layout, storage)
        read = {name: arrays[name] for name in (volume.data, volume.target) if name}
        self._arrays |= {(path, name): array for name, array in read.items()}
        return replace(volume, files=tuple({array.stored.path: None for array in read.values()}))

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read a slice of an array (see `volume.Reader`), as it was described to be stored."""
        with _explained(f"{path}: slice {index} of `{name}` cannot be read"):
            if (path, name) not in self._arrays:
                self.describe(path)
            array = self._arrays[path, name]
            place = () if array.axis is None else (slice(None),) * array.axis + (index,)
            data = array.arrangement.apply(array.stored.load()[place])
            if out is None or (out.shape, out.dtype) != (data.shape, array.dtype):
                out = np.empty(data.shape, array.dtype)
            out[...] = data  # a copy: what is mapped changes with the file
            return out

    def write(
        self,
        path: Path,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, Any],
        source: Volume,
        keep_identity: bool = False,
    ) -> None:
        """Raise a `UserError`: the format is only read."""
        raise UserError(f"{path}: NumPy's files are only read, expected another format")


@contextlib.contextmanager
def _explained(found: str, expected: str = "") -> Iterator[None]:
    """Raise what damaged files raise as a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGES as error:
        raise UserError(f"{found} ({str(error)[:200]}){expected}") from error


def find_arrays(path: str, layout: str | None, storage: Storage) -> dict[str, Any]:
    """Find all arrays by name: the mask as an array, others as described; the target of a parallel folder is one."""
    targets = [storage.target] if storage.target else TARGET_NAMES["kspace"]
    headers, twin = _read_headers(path), parallel_file(path)
    if "" in headers:
        header = headers.pop("")
        is_complex = header.dtype.kind == "c" or (len(header.shape) > 2 and header.shape[-1] == 2)
        paired = layout == "paired" or (twin and not is_complex)
        name = storage.input if paired else storage.kspace if is_complex else DATA_NAMES["image"]
        headers = {name: header}
    for key in headers.keys() & {storage.kspace, storage.input, storage.mask, DATA_NAMES["image"], *targets}:
        found = f"{path}: `{key}` holds Python objects, which a pickle would make"
        expect(not headers[key].dtype.hasobject, found, "numbers, as np.save with allow_pickle=False writes them")
    arrays: dict[str, Any] = {name: _arrange(one, storage, name == storage.kspace) for name, one in headers.items()}
    if mask := headers.get(storage.mask):
        axes = name_axes(mask.shape, "b", storage, coils=False, matlab=False)
        order = [axes.index(axis) for axis in AXES.split(",") if axis in axes]
        arrays[storage.mask] = mask.load().transpose(order or None)
    if twin:
        beside = _read_headers(twin)
        present = [name for name in ("", *targets, "image", DATA_NAMES["image"]) if name in beside]
        expect(present, f"{twin}: has no array `{targets[-1]}`", "one: the target of the file beside its folder")
        arrays[targets[-1]] = _arrange(beside[present[0]], storage, kspace=False)
    return arrays


def _arrange(stored: StoredArray, storage: Storage, kspace: bool) -> ArrangedArray | StoredArray:
    """Find how an array is read; as stored if its axes are too few or too many, or it holds no numbers."""
    arranged = arrange(stored.shape, stored.dtype, storage, kspace=kspace)
    if arranged is None:
        return stored
    shape, dtype, axis, arrangement = arranged
    return ArrangedArray(shape, dtype.newbyteorder("="), axis, arrangement, stored)


def _read_headers(path: str) -> dict[str, StoredArray]:
    """Read the headers of all arrays by their keys, '' for that of an .npy."""
    with open(path, "rb") as file:
        size, headers = os.fstat(file.fileno()).st_size, {}
        if file.read(len(ZIP)) != ZIP:
            file.seek(0)
            return {"": _read_header(file, path, path, size)}
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                key, suffix = os.path.splitext(info.filename)
                if suffix != ".npy":
                    continue
                start, packed = info.header_offset + 26, info.compress_type != zipfile.ZIP_STORED
                room = min(MAX_RATIO * size + SMALL_SLICE, available_memory() // WORKING_SLICES) if packed else 0
                if not packed:
                    file.seek(start)
                    start += 4 + sum(struct.unpack("<HH", file.read(4)))
                    room = start + info.file_size
                with archive.open(info) as stream:
                    header = _read_header(stream, path, f"{path}: `{key}`", room, 0 if packed else start)
                headers[key] = header._replace(member=info.filename if packed else "")
        return headers


def _read_header(file: IO[bytes], path: str, label: str, room: int, start: int = 0) -> StoredArray:
    """Read a header; raises `UserError` for samples that end beyond `room` bytes.

    `start` is the place of the file in the one at `path`.
    """
    file = io.BytesIO(file.read(_LONGEST_HEADER))  # a header may claim any length, which NumPy would read
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = _HEADERS[version](file)
    shape, offset = tuple(map(int, shape)), start + file.tell()
    expect(min(shape, default=0) >= 0, f"{label} has shape {shape}", "numbers of samples")
    end = offset + (0 if dtype.hasobject else dtype.itemsize * math.prod(shape))
    expect(end <= room, f"{label} claims {end:,} bytes", f"at most {room:,} by the file's size; copy it again")
    return StoredArray(shape, dtype, "F" if fortran else "C", path, identity(os.stat(path)), offset)


@functools.lru_cache(maxsize=1)
def _unpack(stored: StoredArray) -> np.ndarray:
    """Unpack a compressed array, and keep the last."""
    count = math.prod(stored.shape)
    with zipfile.ZipFile(stored.path) as archive, archive.open(stored.member) as stream:
        stream.seek(stored.offset)
        data = stream.read(count * stored.dtype.itemsize)
    return np.frombuffer(data, stored.dtype, count).reshape(stored.shape, order=stored.order)
