"""ISMRMRD (MRD) raw files: single readouts in HDF5, `<group>/xml` and `<group>/data`, sorted into Cartesian k-space.

Axes: height is the readout, width the phase encoding; of 3-D scans the second phase encoding, which must be fully
sampled, is transformed to slices. A readout lies in the encoded matrix where `center_sample` and the centre of the
header's encodingLimits say: what partial Fourier, partial echoes and acceleration leave out is zero. Where a header
leaves these centres 0 and the indices do not fit by that, they count from 0. The encoded matrix is kept but for
oversampling along the readout, which is cropped in image space.

Repeated lines (averages) are replaced by their mean, whatever their segment. Slices are in the order of their positions
along the normal. Repetitions, sets, phases and contrasts are further such stacks of slices, the contrast varying first.
Readouts flagged as reversed are turned round before they are placed. Lines of parallel calibration count where the
header calls it embedded or interleaved, or calls it nothing; separate ones are of another image. Noise readouts
prewhiten: sigma (`mri.noise`) is 1 then. Navigators, phase correction, feedback and dummies are left out.

Each slice of a 3-D scan takes all of its readouts. All slices are computed together and kept, of one scan at a time: to
be read in any order, as for training, such files are better converted first (mrjax.convert).

The affine puts the pixel (height // 2, width // 2), where a centred FFT has its origin, at the position of the slice;
it is that of the first stack. Siemens transforms k-space by an FFT, not its inverse: there the axes of the image are
opposite to the directions of the header (as in MRpro).
"""

import dataclasses
import functools
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mrjax.errors import UserError
from mrjax.io import ismrmrd_header, ismrmrd_index
from mrjax.io.files import identity
from mrjax.io.hdf5 import DAMAGES, SIGNATURE, open_file
from mrjax.io.hdf5_contents import MAX_SLICE_RATIO, SMALL_SLICE, WORKING_SLICES
from mrjax.io.hdf5_heap import read_into
from mrjax.io.ismrmrd_index import RawScan, is_complete
from mrjax.io.storage import NATIVE, Storage
from mrjax.io.volume import DATA_NAMES, Volume, describe_arrays
from mrjax.parallel.memory import available_memory

_lock = threading.Lock()
_block: dict[str, Any] = {}  # the slices of a slab that were read last, together with the one that was asked for


class IsmrmrdReader:
    """Reads the k-space of raw files: each is indexed once, then read by offset, from any number of threads."""

    suffixes: tuple[str, ...] = (".mrd",)
    image_suffix = ""

    def __init__(self) -> None:
        self._scans: dict[str, RawScan] = {}

    def recognises(self, path: str, start: bytes) -> bool:
        """Tell by the data sets."""
        return start.startswith(SIGNATURE) and _holds_raw_data(path, identity(os.stat(path)))

    def group(self, paths: list[str]) -> list[str]:
        """Return the files: each is a volume."""
        return paths

    def describe(self, path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
        """Index a file; raises `UserError` if it is damaged, or no Cartesian scan."""
        scan = self._scan(path)
        attributes: dict[str, Any] = {"acquisition": scan.header.protocol or "unknown"}
        if scan.affine is not None:
            attributes["affine"] = scan.affine
        arrays = {DATA_NAMES["kspace"]: np.broadcast_to(np.complex64(), scan.shape)}
        volume = describe_arrays(path, arrays, attributes, layout)
        mask = None if all(map(is_complete, scan.measured)) else scan.measured[:, None]
        undersampled = mask is not None or not is_complete(scan.rows)
        return dataclasses.replace(volume, stored_mask=mask, undersampled=undersampled)

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read a slice (coils, height, width) complex64 of `kspace` (see `volume.Reader`)."""
        try:
            scan = self._scans.get(path) or self._scan(path)
            with open(path, "rb") as file:
                if identity(os.fstat(file.fileno())) != scan.file:
                    raise OSError("the file was replaced or changed since it was described")
                kspace = _read_slice(scan, file.fileno(), index)
        except UserError:
            raise
        except DAMAGES as error:
            raise UserError(f"{path}: slice {index} of `{name}` cannot be read ({error})") from error
        if out is None or (out.shape, out.dtype) != (kspace.shape, kspace.dtype):
            return kspace.copy()
        out[...] = kspace
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
        raise UserError(f"{path}: ISMRMRD raw files are only read, expected another format")

    def _scan(self, path: str) -> RawScan:
        """Return the index of a file, made anew if the file has changed."""
        found = self._scans.get(path)
        if found is None or found.file != identity(os.stat(path)):
            found = self._scans[path] = ismrmrd_index.index(path)
        return found


@functools.lru_cache(maxsize=2**16)
def _holds_raw_data(path: str, _: tuple[int, ...]) -> bool:
    """Tell whether a file of this identity holds raw data; once, for all HDF5 files are asked, several times each."""
    try:
        with open_file(path) as file:
            return bool(ismrmrd_header.find_raw(file, path))
    except (UserError, *DAMAGES):  # HDF5's reader will say what is wrong
        return False


def _read_slice(scan: RawScan, file: int, index: int) -> np.ndarray:
    """Read a slice (coils, height, width); of a slab, of which each takes all readouts, as many as memory allows."""
    slab, z = divmod(index, scan.partitions)
    if scan.partitions == 1:
        return _read_slices(scan, file, slab, range(1))[0]
    with _lock:
        if _block.get("file") != (scan.file, slab) or z not in _block["slices"]:
            _block.clear()
            size, slice_bytes = os.fstat(file).st_size, 8 * scan.shape[1] * scan.shape[3] * scan.header.matrix[0]
            room = min(MAX_SLICE_RATIO * size + SMALL_SLICE, available_memory() // WORKING_SLICES)
            count = max(room // slice_bytes, 1)
            slices = range(scan.partitions) if count >= scan.partitions else range(z, min(z + count, scan.partitions))
            _block.update(file=(scan.file, slab), slices=slices, kspace=_read_slices(scan, file, slab, slices))
        return _block["kspace"][z - _block["slices"].start]


@np.errstate(over="ignore", invalid="ignore")
def _read_slices(scan: RawScan, file: int, slab: int, slices: range) -> list[np.ndarray]:
    """Read the readouts of a slice or slab, and transform, whiten and crop them: slices (coils, height, width)."""
    (width, samples), partitions = scan.header.matrix[1::-1], scan.partitions
    first, last = np.searchsorted(scan.readouts["slice"], (slab, slab + 1))
    kspace = np.zeros((len(slices), width, scan.shape[1], samples), np.complex64)
    turns = np.outer(np.arange(partitions) - partitions // 2, np.array(slices) - partitions // 2) / partitions
    phases = (np.exp(2j * np.pi * turns) / np.sqrt(partitions)).astype(np.complex64)
    for _, partition, column, row, offset, length, start, used, reverse, weight in scan.readouts[first:last].tolist():
        readout = np.empty((scan.shape[1], length), np.complex64)
        read_into(file, readout, offset)
        readout = np.float32(weight) * (readout[:, ::-1] if reverse else readout)[:, start : start + used]
        if len(slices) == partitions:
            kspace[partition, column, :, row : row + used] += readout
        else:
            kspace[:, column, :, row : row + used] += phases[partition, :, None, None] * readout
    if len(slices) == partitions > 1:
        for column in range(width):  # one by one, for want of memory
            lines = np.fft.ifft(np.fft.ifftshift(kspace[:, column], 0), axis=0, norm="ortho")
            kspace[:, column] = np.fft.fftshift(lines, 0)
    white = (one if scan.whitening is None else scan.whitening @ one for one in kspace)
    return [_remove_oversampling(one, scan).astype(np.complex64, copy=False).transpose(1, 2, 0) for one in white]


def _remove_oversampling(kspace: np.ndarray, scan: RawScan) -> np.ndarray:
    """Crop the image along readouts (..., samples), but leave rows of k-space that were not measured zero."""
    old, new = kspace.shape[-1], scan.header.height
    if new == old:
        return kspace
    # Between the transforms the origin is at index 0: the middle of the image is its two ends.
    image = np.fft.ifft(np.fft.ifftshift(kspace, -1), norm="ortho")
    image = np.concatenate([image[..., : new - new // 2], image[..., old - new // 2 :]], -1)
    kspace = np.fft.fftshift(np.fft.fft(image, norm="ortho"), -1)
    low, high = (np.flatnonzero(scan.rows)[[0, -1]] - old // 2) / old
    frequency = (np.arange(new) - new // 2) / new
    return np.where((frequency >= low) & (frequency <= high), kspace, 0)
