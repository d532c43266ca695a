"""NIfTI files that are damaged, or made to do harm."""

import gzip
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np

from tests.fuzz.mutations import cut, flip, splice

DTYPES = ("<f4", ">i2", "<u1", "<f8", "<c8", "<i4")


def write_nifti(rng: np.random.Generator, folder: Path) -> Path:
    """Write a sound file: plain or packed, of either version, single or a pair, of 3 or 4 axes, scaled or not."""
    pair, second = rng.random() < 0.2, rng.random() < 0.3
    kind = getattr(nibabel, f"Nifti{2 if second else 1}{'Pair' if pair else 'Image'}")
    dtype = np.dtype(str(rng.choice(DTYPES)))
    data = (99 * rng.normal(size=(16, 12, 3, 2)[: rng.integers(3, 5)])).astype(dtype)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(rng.choice([-1, 1, 3], 3))[rng.permutation(3)]
    header = kind.header_class(endianness=">" if dtype.byteorder == ">" else "<")
    header.set_data_dtype(dtype)
    image = kind(data, affine, header)
    if rng.random() < 0.3:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"J Doe"))
    path = folder / ("a.hdr" if pair else str(rng.choice(["a.nii", "a.nii.gz"])))
    nibabel.save(image, path)
    return path


def unpacked(path: Path) -> bytearray:
    data = path.read_bytes()
    return bytearray(gzip.decompress(data) if path.suffix == ".gz" else data)


def pack(path: Path, data: bytes | bytearray) -> Path:
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def nifti_flipped_bytes(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_nifti(rng, folder))


def nifti_flipped_bytes_in_headers(rng: np.random.Generator, folder: Path) -> Path:
    path = write_nifti(rng, folder)
    plain = folder / "plain"
    plain.write_bytes(unpacked(path))
    data = flip(rng, plain, 0, 352).read_bytes()
    plain.unlink()
    return pack(path, data)


def nifti_truncated(rng: np.random.Generator, folder: Path) -> Path:
    path = write_nifti(rng, folder)
    cut(rng, path.with_suffix(".img") if path.suffix == ".hdr" and rng.random() < 0.5 else path)
    return path


def nifti_spliced(rng: np.random.Generator, folder: Path) -> Path:
    return splice(rng, write_nifti(rng, folder))


def write_claim(path: Path, shape: list[int], dtype: str, offset: int = 352) -> bytes:
    """Return the header of a file of this shape."""
    kind = nibabel.Nifti1Header if max(shape) < 2**15 else nibabel.Nifti2Header
    header = kind()
    header.set_data_dtype(dtype)
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header["magic"], header["vox_offset"] = header.single_magic, max(offset, len(header.binaryblock) + 4)
    return header.binaryblock + bytes(4)


def nifti_huge_shapes(rng: np.random.Generator, folder: Path) -> Path:
    """Shapes and offsets of which little or nothing is there."""
    path = folder / str(rng.choice(["a.nii", "a.nii.gz"]))
    shape = [int(2 ** rng.integers(0, 15)) for _ in range(int(rng.integers(2, 8)))]
    shape[rng.integers(len(shape))] = int(rng.choice([1, 2**14, 2**31, 2**40, 2**62]))
    offset = int(rng.choice([0, 352, 2**20, 2**30]))
    return pack(path, write_claim(path, shape, str(rng.choice(DTYPES)), offset) + rng.bytes(int(rng.integers(2**12))))


def nifti_gzip_bombs(rng: np.random.Generator, folder: Path) -> Path:
    """Ones that compress a thousandfold, as many as the header claims or far more."""
    path, size = folder / "a.nii.gz", int(2 ** rng.integers(20, 30))
    side = int(2 ** rng.integers(4, 13))
    shape = [side, side, max(1, size // side**2)] if rng.random() < 0.7 else [16, 16, 3]
    packer, head, ones = zlib.compressobj(wbits=-15), write_claim(path, shape, "u1"), bytes([1]) * 2**16
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block, count, checksum = packer.compress(ones) + packer.flush(zlib.Z_FULL_FLUSH), size // 2**16, zlib.crc32(head)
    for _ in range(count):
        checksum = zlib.crc32(ones, checksum)
    end = packer.flush() + struct.pack("<2L", checksum, len(head) + size)
    path.write_bytes(b"\x1f\x8b\x08" + bytes(7) + start + block * count + end)
    return path


def nifti_odd_fields(rng: np.random.Generator, folder: Path) -> Path:
    """Numbers in the header that are not finite, unknown, of another sign, or too large."""
    path = write_nifti(rng, folder)
    data = unpacked(path)
    second = data[4:7] in (b"n+2", b"ni2")
    kind, size = (nibabel.Nifti2Header, 540) if second else (nibabel.Nifti1Header, 348)
    header = kind(bytes(data[:size]), check=False)
    numbers = [0, 1, -1, 7, 255, 2**15 - 1, -(2**15), np.nan, np.inf, -np.inf, 1e-40, 3e38]
    for name in rng.choice([key for key in header.keys() if key != "magic"], int(rng.integers(1, 4))):  # noqa: SIM118
        field = header[name]
        value = rng.choice(numbers)
        if field.dtype.kind == "S":
            header[name] = rng.bytes(field.dtype.itemsize)
        elif field.dtype.kind == "f" or np.isfinite(value):
            odd = np.array(value).astype(field.dtype)
            if field.ndim:
                header[name][rng.integers(len(field))] = odd
            else:
                header[name] = odd
    data[:size] = header.binaryblock
    return pack(path, data)


MUTATIONS = (
    nifti_flipped_bytes,
    nifti_flipped_bytes_in_headers,
    nifti_truncated,
    nifti_spliced,
    nifti_huge_shapes,
    nifti_gzip_bombs,
    nifti_odd_fields,
)
