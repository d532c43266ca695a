"""Files of NumPy that are damaged, or made to do harm."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from tests.fuzz.mutations import cut, flip, splice
from tests.fuzz.scans import kspace

HEADER = 128  # bytes before the samples of an .npy


class Touch:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


def write_numpy(rng: np.random.Generator, folder: Path) -> Path:
    """Write a sound file: an array, or several, packed or not, with a mask or a target."""
    data, form = kspace(rng), rng.integers(5)
    images = np.abs(data[:, 0])
    array = (data, data.view(np.float32).reshape(*data.shape, 2).astype(">f8"), np.asfortranarray(images))[form % 3]
    if form < 3:
        np.save(folder / "scan.npy", array)
        return folder / "scan.npy"
    arrays = {"kspace": data, "mask": np.ones(16, bool)} if form == 3 else {"input": images, "target": images + 1}
    (np.savez_compressed if rng.random() < 0.5 else np.savez)(folder / "scan.npz", **arrays)
    return folder / "scan.npz"


def numpy_flipped_bytes(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_numpy(rng, folder))


def numpy_flipped_bytes_in_headers(rng: np.random.Generator, folder: Path) -> Path:
    path = write_numpy(rng, folder)
    first = max(path.stat().st_size - 400, 0) if path.suffix == ".npz" and rng.random() < 0.5 else 0
    return flip(rng, path, first, first + 2 * HEADER)


def numpy_truncated(rng: np.random.Generator, folder: Path) -> Path:
    return cut(rng, write_numpy(rng, folder))


def numpy_spliced(rng: np.random.Generator, folder: Path) -> Path:
    return splice(rng, write_numpy(rng, folder))


def claim(rng: np.random.Generator) -> bytes:
    """Return the header of an array of which little or nothing is there, or that is no array of numbers."""
    shape = tuple(int(2 ** rng.integers(0, 12)) for _ in range(int(rng.integers(0, 6))))
    shapes = [shape, shape, (*shape, int(rng.choice([0, -1, -8, 2**31, 2**62, 2**63, 2**90]))), True, (1.5,), (2,) * 70]
    kinds = ["<c8", "<f4", "|O", "|V9", "<U9", "<M8[s]", "<c32", "|b1", "<f2", "<c7", "(3,)f4", "|V2147483647", "V,", 7]
    kinds += [[("r", "<f4"), ("i", "<f4")], [("r", "|O")], [("", "<f4")], {"a": ("<f4", 2**31)}]
    fields = {"descr": kinds[rng.integers(len(kinds))], "fortran_order": bool(rng.random() < 0.5)}
    text = repr(fields | {"shape": shapes[rng.integers(len(shapes))]})
    texts = [
        text,
        text,
        text,
        "(" * 9000,
        "[" * 300,
        text[:-1],
        "{" + "1:" * 4000,
        "\x1b[2J\0",
        text.replace("'", '"""'),
    ]
    header = texts[rng.integers(len(texts))].encode("latin1") + b"\n"
    major = int(rng.choice([1, 1, 1, 1, 2, 3, 9]))
    return npy.magic(major, 0) + len(header).to_bytes(2 if major == 1 else 4, "little") + header


def numpy_claims(rng: np.random.Generator, folder: Path) -> Path:
    """Headers that claim what is not there."""
    data = claim(rng) + rng.bytes(int(rng.integers(2**12)))
    if rng.random() < 0.5:
        (folder / "scan.npy").write_bytes(data)
        return folder / "scan.npy"
    with zipfile.ZipFile(folder / "scan.npz", "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        archive.writestr("kspace.npy", data)
    return folder / "scan.npz"


def numpy_zips(rng: np.random.Generator, folder: Path) -> Path:
    """Zips of many members, of others' compressions and names, and of zeros that unpack to gigabytes."""
    path, form = folder / "scan.npz", rng.integers(4)
    shape = (int(2 ** rng.integers(0, 8)), 256, 256)
    names = ["kspace.npy", "mask.npy", "../kspace.npy", "/kspace.npy", "\x1b[2J.npy", "a/kspace.npy", ".npy", "kspace"]
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    with zipfile.ZipFile(path, "w", methods[form], compresslevel=1) as archive:
        if form == 0:
            for number in range(int(rng.integers(20_000))):
                archive.writestr(f"{number}.npy", b"")
        else:
            with archive.open(names[rng.integers(len(names))], "w") as file:
                fields = {"descr": "<c8", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(file, fields)
                for _ in range(shape[0]):
                    file.write(bytes(2**19))
    return path


def numpy_pickles(rng: np.random.Generator, folder: Path) -> Path:
    """Objects, whose pickle writes a file."""
    array = np.array([Touch(folder / "harm")] * int(rng.integers(1, 4)), object)
    if rng.random() < 0.5:
        np.save(folder / "scan.npy", array)
        return folder / "scan.npy"
    np.savez(folder / "scan.npz", **{str(rng.choice(["kspace", "mask", "other"])): array, "input": np.ones((3, 4, 4))})
    return folder / "scan.npz"


MUTATIONS = (
    numpy_flipped_bytes,
    numpy_flipped_bytes_in_headers,
    numpy_truncated,
    numpy_spliced,
    numpy_claims,
    numpy_zips,
    numpy_pickles,
)
