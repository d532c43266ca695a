"""NIfTI: .nii, .nii.gz, and pairs of .hdr and .img (NIfTI-1 and 2), by the package nibabel (Brett et al.).

Which axis is that of the slices, and how they are shown, does not depend on the order in which a file stores its axes:

- slices: along the axis of length 1, or of the thickest spacing if that is THICKER times the next; else along the third
- axial: first row anterior, the patient's left on the right (as in radiology); slices from the feet to the head
- coronal: first row superior, the patient's left on the right; slices from the back to the front
- sagittal: first row superior, anterior on the left; slices from the patient's left to the right

Of oblique volumes the closest of these counts; nothing is interpolated. The slices of the volumes of a 4-D file come
one volume after the other, and the affine of `volume.Volume` is that of the first.
"""

import contextlib
import functools
import gzip
import importlib.util
import logging
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mrjax.errors import UserError, expect
from mrjax.io.files import identity, replacing, stem
from mrjax.io.images import ImageHeader, ImageReader
from mrjax.io.volume import DATA_NAMES, Volume

logger = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.nibabel")  # of what nibabel mends in a header
_quiet.disabled = True
GZIP = b"\x1f\x8b"
HEADER, HEADER_2 = 348, 540  # bytes of a header of NIfTI-1, which ends in its magic bytes, and of NIfTI-2
MAGIC, MAGIC_2 = (b"n+1\0", b"ni1\0"), (b"n+2\0", b"ni2\0")
THICKER = 1.5
SHOWN = ("PIR", "LIA", "LPS")  # towards where columns, rows and slices go, by the world axis of the slices
MILLIMETRES = {1: 1e3, 3: 1e-3}  # in a metre and in a micrometre, by their codes
# Fields of free text, in which programs write names and dates.
IDENTITY = ("descrip", "aux_file", "intent_name", "db_name", "data_type", "unused_str")
MAX_RATIO = 64  # how much all slices may be compressed, each of which counts as LEAST_READ bytes at least
SMALL_SLICE, SMALL = 2**20, 2**27  # pixels of a slice, and bytes of all, that every file may claim
LEAST_READ = 2**16
# What nibabel, NumPy and gzip raise for damaged files.
_DAMAGES = (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, ArithmeticError, MemoryError)


class StoredImages(NamedTuple):
    """How a file stores its images."""

    header: Any  # nibabel's
    samples: str  # the file that holds them
    file: tuple[int, ...]  # its `files.identity`
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]  # with an axis of volumes, the fourth
    axis: int  # the one of `shape` along the slices
    orientation: np.ndarray  # (3, 2), nibabel's, from the axes as stored to columns, rows, slices
    affine: np.ndarray  # of `volume.Volume`
    scale: tuple[float, float] | None  # slope and intercept

    @property
    def images_shape(self) -> tuple[int, int, int]:
        """(slices, height, width)."""
        columns, rows, slices = (self.shape[axis] for axis in np.argsort(self.orientation[:, 0]))
        return slices * self.shape[3], rows, columns

    @property
    def read_dtype(self) -> np.dtype:
        """That of the images as they are read."""
        native = self.dtype.newbyteorder("=")
        return np.result_type(native, np.float32) if self.scale else native


class NiftiReader(ImageReader):
    """Reads slices along the third axis one by one, of gzip too (its index is kept), and whole volumes along others."""

    suffixes: tuple[str, ...] = (".nii", ".nii.gz")
    image_suffix = ".nii.gz"

    def __init__(self) -> None:
        self._stored: dict[str, StoredImages] = {}

    def recognises(self, path: str, start: bytes) -> bool:
        """Tell by the magic bytes, packed or not, or the suffix, which a damaged file still has."""
        return bool(_header_size(_unpack(start, HEADER_2))) or path.lower().endswith(self.suffixes)

    def read_header(self, path: str) -> ImageHeader:
        """Read the header; raises `UserError` for one that is damaged, or claims what the file cannot hold."""
        stored = self._stored[path] = find_images(path)
        return ImageHeader(stored.images_shape, stored.read_dtype, "", stored.affine, (stored.samples,))

    def read_image(self, path: str, index: int) -> np.ndarray:
        """Read a slice, upright, as stored, or in float32 or better if the header scales it."""
        from nibabel.orientations import apply_orientation

        try:
            stored = self._stored.get(path) or self._stored.setdefault(path, find_images(path))
            plane = apply_orientation(_read_plane(stored, index), stored.orientation).T[0]
            plane = plane.astype(stored.read_dtype, order="C")
            if stored.scale:
                plane *= stored.scale[0]
                plane += stored.scale[1]
            return plane
        except UserError:
            raise
        except _DAMAGES as error:
            _open_gzip.cache_clear()  # another try must not find an open file that fails for ever
            raise UserError(f"{path}: slice {index} cannot be read ({error})") from error

    def write(
        self,
        path: Path,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, Any],
        source: Volume,
        keep_identity: bool = False,
    ) -> None:
        """Write `reconstruction` in float32, with the axes, affine and header of a source in NIfTI.

        Other sources give a new header with their affine; where that is unknown, pixels are 1 mm and axial.
        """
        images = np.asarray(arrays[DATA_NAMES["image"]], np.float32)
        extensions = bytes(4)
        if os.path.isfile(source.path) and self.recognises(source.path, _read_start(source.path)):
            stored = find_images(source.path)
            found = f"{path}: is to hold images of shape {images.shape}"
            expect(images.shape == stored.images_shape, found, f"{stored.images_shape}, those of {source.path}")
            header, images = stored.header.copy(), _arrange(images, stored)
            size = len(header.binaryblock)
            if keep_identity and stored.samples == source.path:
                extensions = _read_bytes(stored.samples, stored.file, size, stored.offset - size) or extensions
        else:
            header, images = _make_header(path, images.shape, source), images.T
        header.set_data_dtype(np.float32)
        header.set_slope_inter(1, 0)
        header["magic"], header["vox_offset"] = header.single_magic, len(header.binaryblock) + len(extensions)
        for name in IDENTITY:
            if name in header.keys() and not keep_identity:  # noqa: SIM118 - a header is no mapping
                header[name] = b""
        samples = images.astype(header.get_data_dtype()).tobytes(order="F")
        with replacing(path) as part, open(part, "wb") as file, _packing(file, path) as stream:
            for data in (header.binaryblock, extensions, samples):
                stream.write(data)


def find_images(path: str) -> StoredImages:
    """Read a header, and find where and how the file stores its images (see `NiftiReader.read_header`)."""
    expect(os.path.isfile(path), f"{path}: no such file, or a folder", "a NIfTI file")
    _require_packages(path)
    from nibabel.spatialimages import HeaderDataError

    try:
        header = _parse_header(path)
        single = header["magic"].item() == header.single_magic
        candidates = [path] if single else [str(Path(path).with_name(stem(path) + end)) for end in (".img", ".img.gz")]
        samples = next(filter(os.path.isfile, candidates), "")
        expect(samples, f"{path}: {stem(path)}.img, which holds its samples, is not there", "it beside the header")
        shape = tuple(map(int, header.get_data_shape()))
        expect(shape and min(shape) > 0, f"{path}: has shape {shape}", "(width, height, slices), or one more axis")
        dtype = header.get_data_dtype()
        expect(dtype.kind in "fciu", f"{path}: holds samples of {dtype}, as of colours", "numbers")
        offset, least = int(header["vox_offset"]), len(header.binaryblock) if single else 0
        expect(offset >= least, f"{path}: its samples begin at byte {offset}", f"{least} or more")
        sides = (*shape, 1, 1, 1)[:3]
        axis, orientation, affine = _orient(header, sides)
        slope, intercept = header.get_slope_inter()
    except UserError:
        raise
    except (HeaderDataError, *_DAMAGES) as error:
        raise UserError(f"{path}: is damaged ({error}), expected a header of NIfTI") from error
    scale = None if (slope, intercept) in ((None, None), (1, 0)) else (float(slope), float(intercept))
    shape, file = (*sides, math.prod(shape[3:])), identity(os.stat(samples))
    stored = StoredImages(header, samples, file, offset, dtype, shape, axis, orientation, affine, scale)
    _require_honest(path, stored)
    return stored


def _require_packages(path: str) -> None:
    missing = [name for name in ("nibabel", "indexed_gzip") if not importlib.util.find_spec(name)]
    found = f"{path}: NIfTI is read with {' and '.join(missing)}, not installed"
    expect(not missing, found, "what pip install 'mrjax[io]' installs")


def _read_start(path: str) -> bytes:
    with open(path, "rb") as file:
        return _unpack(file.read(LEAST_READ), HEADER_2)


def _unpack(start: bytes, size: int) -> bytes:
    """Unpack the first bytes of gzip, as many as can be; return others as they are."""
    if not start.startswith(GZIP):
        return start
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(31).decompress(start, size)
    return b""


def _header_size(start: bytes) -> int:
    """Return the bytes of the header of a file that begins like this, 0 if it is no NIfTI."""
    return HEADER if start[HEADER - 4 : HEADER] in MAGIC else HEADER_2 if start[4:8] in MAGIC_2 else 0


def _parse_header(path: str) -> Any:
    """Read nibabel's header of a file; its extensions stay unread."""
    from nibabel import Nifti1Header, Nifti2Header

    start = _read_start(path)
    size = _header_size(start)
    expect(size and len(start) >= size, f"{path}: has no whole header of NIfTI, or a damaged one", "a NIfTI file")
    header = (Nifti1Header if size == HEADER else Nifti2Header)(start[:size], check=False)
    header.check_fix(logger=_quiet)
    return header


@np.errstate(over="ignore", invalid="ignore")
def _orient(header: Any, sides: tuple[int, ...]) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the stored axis of the slices, and the orientation and affine of `StoredImages`; see the module."""
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    affine = np.diag([MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1)] * 3 + [1]) @ header.get_best_affine()
    world = io_orientation(affine)
    if not np.isfinite(world).all():
        raise ValueError("its affine is singular")
    spacing = np.where(np.array(sides) == 1, np.inf, voxel_sizes(affine))
    *_, second, thickest = np.sort(spacing)
    axis = int(np.argmax(spacing)) if thickest >= THICKER * second else 2
    orientation = ornt_transform(world, axcodes2ornt(SHOWN[int(world[axis, 0])]))
    return axis, orientation, affine @ inv_ornt_aff(orientation, sides)


def _require_honest(path: str, stored: StoredImages) -> None:
    """Raise a `UserError` for images that no file of this size holds, or that are no images."""
    slices, height, width = stored.images_shape
    expect(min(height, width) > 1, f"{path}: holds images of {height} x {width}", "2 pixels or more a side")
    with open(stored.samples, "rb") as file:
        packed = file.read(2) == GZIP
    size, plane = os.path.getsize(stored.samples), height * width * stored.dtype.itemsize
    need = stored.offset + slices * plane
    found = f"{path}: claims {need:,} bytes of samples"
    expect(packed or need <= size, f"{found} in a file of {size:,}", "a whole file; copy it again")
    room = size + SMALL_SLICE
    found = f"{path}: claims {height * width:,} pixels a slice in a file of {size:,} bytes"
    expect(height * width <= room, found, f"at most {room:,}")
    need, room = stored.offset + slices * max(plane, LEAST_READ), MAX_RATIO * size + SMALL
    expect(need <= room, f"{path}: takes {need:,} bytes to be read from a file of {size:,}", f"at most {room:,}")


def _read_plane(stored: StoredImages, index: int) -> np.ndarray:
    """Read a slice with the axes as stored, of length 1 along the slices."""
    *sides, _ = stored.shape
    volume, number = divmod(index, sides[stored.axis])
    if stored.orientation[stored.axis, 1] < 0:
        number = sides[stored.axis] - 1 - number
    size = math.prod(sides) * stored.dtype.itemsize
    start = stored.offset + volume * size
    if stored.axis == 2:
        plane = size // sides[2]
        data = _read_bytes(stored.samples, stored.file, start + number * plane, plane)
        return np.frombuffer(data, stored.dtype).reshape((*sides[:2], 1), order="F")
    data = _read_volume(stored.samples, stored.file, start, size)
    return np.frombuffer(data, stored.dtype).reshape(sides, order="F").take([number], stored.axis)


def _read_bytes(path: str, file: tuple[int, ...], offset: int, count: int) -> bytes:
    """Read so many bytes, unpacked; raises `OSError` if the file ends before, or is not the one of this identity."""
    with open(path, "rb") as opened:
        if identity(os.fstat(opened.fileno())) != file:
            raise OSError("the file was replaced or changed since it was described")
        if packed := opened.read(2) == GZIP:
            data = _open_gzip(path, file).pread(count, offset)
        else:
            opened.seek(offset)
            data = opened.read(count)
    if len(data) < count:
        raise OSError(f"the {'unpacked ' if packed else ''}file ends before the slice does")
    return data


_read_volume = functools.lru_cache(maxsize=4)(_read_bytes)  # for slices along another than the third axis


@functools.lru_cache(maxsize=512)
def _open_gzip(path: str, file: tuple[int, ...]) -> Any:
    """Open a file for reading anywhere in it: the first pass keeps 32 KB for every 256 KB, or 32nd of a large file."""
    from indexed_gzip import IndexedGzipFile

    return IndexedGzipFile(path, spacing=max(2**18, file[1] // 32))


def _arrange(images: np.ndarray, stored: StoredImages) -> np.ndarray:
    """Bring images (slices, height, width) to the shape and the axes as stored."""
    from nibabel.orientations import apply_orientation

    axes = np.argsort(stored.orientation[:, 0])
    inverse = np.column_stack([axes, stored.orientation[axes, 1]])
    return np.stack([apply_orientation(volume.T, inverse) for volume in np.split(images, stored.shape[3])], -1)


def _make_header(path: Path, shape: tuple[int, ...], source: Volume) -> Any:
    """Make the header of images (slices, height, width) that come from a file of another format."""
    _require_packages(str(path))
    from nibabel import Nifti1Header
    from nibabel.spatialimages import HeaderDataError

    header, affine = Nifti1Header(), source.affine
    if affine is None:
        logger.info("%s: its position and the size of its pixels are unknown, 1 mm is written to %s", source.path, path)
        affine = np.diag([-1, -1, 1, 1])  # shown as it is read: first row anterior, left on the right
    try:
        header.set_data_shape(shape[::-1])
        header.set_xyzt_units("mm")
        header.set_sform(affine, 1)
        header.set_qform(affine, 1)
    except (HeaderDataError, *_DAMAGES) as error:
        raise UserError(f"{path}: images of shape {shape} cannot be written as NIfTI ({error})") from error
    return header


def _packing(file: IO[bytes], path: Path) -> contextlib.AbstractContextManager[Any]:
    """Return the stream to write to; gzip's has neither a name nor a time in it."""
    return gzip.GzipFile("", "wb", 1, file, 0) if path.suffix == ".gz" else contextlib.nullcontext(file)
