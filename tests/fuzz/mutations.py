"""What all mutations share: a folder that no file may lead to, and damage done to bytes."""

import os
import zlib
from pathlib import Path

import h5py
import numpy as np

OUTSIDE = "outside"  # beside the folders of the files
SECRET = 1234.5  # a number in it that must never be read


def make_outside(folder: Path) -> None:
    """Make the folder, with a scan, raw samples, and a pipe: to open that waits for ever."""
    place = folder / OUTSIDE
    place.mkdir(parents=True)
    os.mkfifo(place / "pipe.h5")
    with h5py.File(place / "scan.h5", "w") as file:
        file["kspace"] = np.full((3, 2, 16, 16), SECRET, np.complex64)
        file["scan/kspace"] = file["kspace"]
    (place / "raw.bin").write_bytes(np.full(3 * 2 * 16 * 16, SECRET, np.complex64).tobytes())


def flip(rng: np.random.Generator, path: Path, first: int = 0, last: int | None = None) -> Path:
    data = bytearray(path.read_bytes())
    for place in rng.integers(first, min(last or len(data), len(data)), 2 ** int(rng.integers(0, 7))):
        data[place] = rng.choice([0, 255, rng.integers(256), data[place] ^ (1 << rng.integers(8))])
    path.write_bytes(data)
    return path


def cut(rng: np.random.Generator, path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])
    return path


def splice(rng: np.random.Generator, path: Path) -> Path:
    data = path.read_bytes()
    first, second = sorted(rng.integers(0, len(data), 2))
    path.write_bytes(data[:first] + (rng.bytes(int(rng.integers(64))) if rng.random() < 0.5 else b"") + data[second:])
    return path


def zeros(size: int) -> bytes:
    """Compress so many zeros as zlib would, but at once: one block of them, repeated."""
    packer = zlib.compressobj(wbits=-15)
    block = packer.compress(bytes(2**16)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.compress(bytes(size % 2**16)) + packer.flush()
    checksum = (size % 65521 << 16 | 1).to_bytes(4, "big")
    return b"\x78\x9c" + block * (size // 2**16) + end + checksum
