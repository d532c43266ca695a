"""The .t5 file: HDF5 of one volume, in one of three layouts, with fastMRI's attributes (`max`, `acquisition`, ...).

- kspace: `kspace` complex (slices, [coils,] height, width); optionally its image `reconstruction_rss`,
  `reconstruction_esc` or `target` (slices, height, width), and a `mask` of what was measured: (width,), or
  (height, width), or either for each slice; for acquisition.mask = 'stored', of what to keep
- paired: `input` and `target`, real or complex (slices, height, width), or (height, width) of one slice
- image: `reconstruction` (slices, height, width), as mrjax.reconstruct writes it

The attribute `affine` is that of `volume.Volume`.

Other names, axes and complex numbers: see `storage`.
"""

import functools
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from mrjax.errors import UserError, expect
from mrjax.io import ismrmrd_header
from mrjax.io.files import identity, replacing
from mrjax.io.hdf5_chunks import Chunks, find_chunks, read_slice
from mrjax.io.hdf5_contents import Link, find_data_set, find_data_sets, require_honest, resolve
from mrjax.io.storage import (
    AXES,
    NATIVE,
    Arrangement,
    Storage,
    arrange,
    name_axes,
    parallel_file,
)
from mrjax.io.volume import DATA_NAMES, TARGET_NAMES, Volume, describe_arrays


class StoredArray(NamedTuple):
    """An array as it is read, (slices, [coils,] height, width), and where and how a file stores it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    path: str
    name: str
    file: tuple[int, ...]  # see `files.identity`
    axis: int | None = None  # the stored axis of slices; None: the one slice has none
    chunks: Chunks | None = None  # None: HDF5 reads it
    arrangement: Arrangement | None = None  # None: slices are stored as they are read


SIGNATURE = b"\x89HDF\r\n\x1a\n"
# What h5py and NumPy raise for damaged files, and for those made to do harm.
DAMAGES = (OSError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError)
_lock = threading.Lock()  # as HDF5 has one for the whole process
_open = functools.lru_cache(maxsize=64)(lambda path: open_file(path))


class Hdf5Reader:
    """Reads slices from any number of threads: raw and gzip-compressed ones from the file itself (`hdf5_chunks`).

    HDF5 reads what else there is, one slice at a time, through 64 open files at most.
    """

    suffixes: tuple[str, ...] = (".t5", ".h5", ".hdf5", ".mat")
    image_suffix = ".t5"

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str], StoredArray] = {}  # by file and data set

    def recognises(self, path: str, start: bytes) -> bool:
        """Tell by the signature, which a MATLAB file has later on, or the suffix, which a damaged file still has."""
        return start.startswith(SIGNATURE) or Path(path).suffix.lower() in self.suffixes

    def group(self, paths: list[str]) -> list[str]:
        """Return the files: each is a volume."""
        return paths

    def describe(self, path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
        """Read the headers of a file; raises `UserError` if it is damaged, no HDF5, or of no layout."""
        with open_file(path) as file:
            try:
                arrays = find_arrays(file, path, storage)
                volume = describe_arrays(path, arrays, file.attrs, layout, storage)
            except UserError:
                raise
            except DAMAGES as error:
                raise UserError(f"{path}: is damaged ({error}), expected readable data sets and attributes") from error
        # Kept, so that no epoch opens the file with HDF5.
        stored = {name: arrays[name] for name in (volume.data, volume.target) if name}
        self._stored |= {(path, name): array for name, array in stored.items()}
        with _lock:
            _open.cache_clear()  # this file may have been written anew
        return replace(volume, files=tuple({array.path: None for array in stored.values()}))

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read a slice of a data set (see `volume.Reader`), as it was described to be stored."""
        try:
            stored = self._stored.get((path, name))
            if stored is None:
                with _lock:
                    found = find_data_sets(_open(path), path)
                    stored = self._stored[path, name] = find_array(found[name], path, name, NATIVE)
            if stored.chunks is not None:
                data = _read_chunks(stored, stored.chunks, index, out)
            else:
                place = () if stored.axis is None else (slice(None),) * stored.axis + (index,)
                _require_unchanged(os.stat(stored.path), stored)
                with _lock:
                    data = _open(stored.path)[stored.name][place]
            return data if stored.arrangement is None else stored.arrangement.apply(data)
        except UserError:
            raise
        except DAMAGES as error:
            with _lock:
                _open.cache_clear()  # another try must not find an open file that fails for ever
            raise UserError(f"{path}: slice {index} of `{name}` cannot be read ({error})") from error

    def write(
        self,
        path: Path,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, Any],
        source: Volume,
        keep_identity: bool = False,
    ) -> None:
        """Write a file with the attributes and the ISMRMRD header of the source, and the given ones.

        Of a source in HDF5 all attributes are kept: fastMRI's `patient_id` names nobody.
        """
        arrays, attributes = self._add_headers(source, dict(arrays), dict(attributes), keep_identity)
        try:
            write(path, arrays, attributes)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{source.path}: has attributes that cannot be copied ({error}), expected text or numbers"
            ) from error

    def _add_headers(
        self, source: Volume, arrays: Any, attributes: Any, keep_identity: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        known: dict[str, Any] = {"acquisition": source.contrast}
        if source.affine is not None:
            known["affine"] = source.affine
        if not h5py.is_hdf5(source.path):
            return arrays, known | attributes
        with open_file(source.path) as file:
            try:
                raw = ismrmrd_header.find_raw(file, source.path)
                for xml, _ in raw.values():
                    text = ismrmrd_header.read_xml(xml, source.path)
                    text = text if keep_identity else ismrmrd_header.without_identity(text, source.path)
                    arrays["ismrmrd_header"] = text
                header = find_data_sets(file, source.path).get("ismrmrd_header")
                if isinstance(header, h5py.Dataset):
                    require_honest(header, source.path, "ismrmrd_header", None)
                    arrays["ismrmrd_header"] = header[()]
                return arrays, (known if raw else {}) | {**file.attrs, **attributes}
            except UserError:
                raise
            except DAMAGES as error:
                raise UserError(f"{source.path}: is damaged ({error}), expected readable attributes") from error


def find_arrays(file: h5py.File, path: str, storage: Storage) -> dict[str, Any]:
    """Find all data sets: the masks as arrays, images and k-space as `StoredArray`, others as they are.

    A target in a parallel folder counts as one of this file.
    """
    found = find_data_sets(file, path)
    targets = [storage.target] if storage.target else TARGET_NAMES["kspace"]
    images = {storage.kspace, storage.input, DATA_NAMES["image"], *targets} & found.keys()
    arrays: dict[str, Any] = {**found, **{name: find_array(found[name], path, name, storage) for name in images}}
    if isinstance(mask := found.get(storage.mask), h5py.Dataset):
        require_honest(mask, path, storage.mask, None)
        arrays[storage.mask] = _read_mask(mask, storage)
    if twin := parallel_file(path):
        with open_file(twin) as other:
            found = find_data_sets(other, twin)
            present = [name for name in (*targets, "image", DATA_NAMES["image"]) if name in found]
            expect(present, f"{twin}: has no data set `{targets[-1]}`", "one: the target of the file beside its folder")
            arrays[targets[-1]] = find_array(found[present[0]], twin, present[0], storage)
    return arrays


def find_array(data: h5py.Dataset | Link, path: str, name: str, storage: Storage) -> StoredArray:
    """Find how the file `path`, or the one in its folder that a link names, stores the data set of this name."""
    if isinstance(data, Link):
        other = resolve(data, path)
        with open_file(other) as file:
            return find_array(find_data_set(file, other, data.name), other, name, storage)
    kspace, matlab, file = name == storage.kspace, "MATLAB_class" in data.attrs, identity(os.stat(path))
    arranged = arrange(data.shape, data.dtype, storage, kspace=kspace, matlab=matlab)
    require_honest(data, path, name, arranged and arranged.axis)
    if arranged is None:
        return StoredArray(data.shape, data.dtype, path, str(data.name), file)
    shape, dtype, axis, arrangement = arranged
    stored = StoredArray(shape, dtype, path, str(data.name), file, axis, find_chunks(data, path, axis))
    if kspace:
        arrangement = arrangement._replace(columns=_measured_columns(data.file.attrs, shape[-1], path))
    # Pairs of real and imaginary part have the bytes of complex numbers.
    real = dtype.type().real.dtype
    packed = [real, np.dtype([(part, real) for part in arrangement.parts])] if stored.chunks else []
    in_order = arrangement.order == tuple(range(len(arrangement.order)))
    as_read = in_order and not arrangement.shifted and arrangement.columns == slice(None)
    return stored if as_read and data.dtype in (dtype, *packed) else stored._replace(arrangement=arrangement)


def _measured_columns(attributes: Mapping[str, Any], width: int, path: str) -> slice:
    """Return the columns between fastMRI's `padding_left` and `padding_right`; all if there are no such attributes."""
    left, right = (int(attributes.get(f"padding_{side}", end)) for side, end in (("left", 0), ("right", width)))
    found = f"{path}: its attributes padding_left and padding_right are {left} and {right}"
    expect(0 <= left < right <= width, found, f"columns of {width}")
    return slice(left, right) if (left, right) != (0, width) else slice(None)


def _read_mask(data: h5py.Dataset, storage: Storage) -> np.ndarray:
    """Read a mask, its axes in order."""
    axes = name_axes(data.shape, "b", storage, coils=False, matlab="MATLAB_class" in data.attrs)
    return np.asarray(data[()]).transpose([axes.index(axis) for axis in AXES.split(",") if axis in axes] or None)


def _read_chunks(stored: StoredArray, chunks: Chunks, index: int, out: np.ndarray | None) -> np.ndarray:
    """Read a slice without HDF5, into `out` if it fits: as it is read or, if it is yet to be arranged, as stored."""
    shape, dtype = chunks.slice_shape, chunks.fill.dtype
    if stored.arrangement is None:
        shape, dtype = stored.shape[1:], stored.dtype
    shapes = (shape, (1, *shape))  # a single coil may be stored without its axis
    if out is None or out.dtype != dtype or out.shape not in shapes:
        out = np.empty(shape, dtype)
    # Opened for each slice: 6 us, so that any number of files can be in use.
    with open(stored.path, "rb") as file:
        _require_unchanged(os.fstat(file.fileno()), stored)
        read_slice(file, chunks, index, out.reshape(-1).view(chunks.fill.dtype).reshape(chunks.slice_shape))
    return out


def _require_unchanged(file: os.stat_result, stored: StoredArray) -> None:
    if identity(file) != stored.file:
        raise OSError("the file was replaced or changed since it was described")


def open_file(path: str) -> h5py.File:
    """Open a file for reading; raises a `UserError` that says why it cannot be opened."""
    # Asked first: to open a pipe would wait for ever.
    expect(os.path.isfile(path), f"{path}: no such file, or a folder", "an HDF5 file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if os.path.getsize(path) == 0:
            reason = "is empty, expected an HDF5 file"
        elif "truncated" in str(error):
            reason = f"is truncated ({os.path.getsize(path)} bytes are left), expected a whole HDF5 file; copy it again"
        elif "signature" in str(error) and Path(path).suffix.lower() == ".mat":
            reason = "is a MATLAB file older than v7.3, expected one that is HDF5: save(file, 'kspace', '-v7.3')"
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
