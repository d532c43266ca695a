"""Files that are damaged, or made to do harm, each by its number: the same number makes the same file.

`OUTSIDE` is a folder beside that of the files, which none of them may lead to: to open its pipe waits for ever, and its
scan holds a number that must never be read.
"""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import safetensors.numpy

from mrjax import config
from mrjax.interop import fastmri

OUTSIDE = "outside"
SECRET = 1234.5
MUTATIONS: dict[str, Callable[[np.random.Generator, Path], Path]] = {}
LATEST = {"libver": "latest"}


def mutation(function: Callable[[np.random.Generator, Path], Path]) -> Callable[[np.random.Generator, Path], Path]:
    MUTATIONS[function.__name__.replace("_", " ")] = function
    return function


def make(number: int, folder: Path) -> tuple[str, Path]:
    """Make a file in a new folder inside `folder`; return the kind of its mutation and the file."""
    kinds = sorted(MUTATIONS)
    kind, place = kinds[number % len(kinds)], folder / f"{number}"
    place.mkdir(parents=True)
    return kind, MUTATIONS[kind](np.random.default_rng(number), place)


def make_outside(folder: Path) -> None:
    place = folder / OUTSIDE
    place.mkdir(parents=True)
    os.mkfifo(place / "pipe.h5")
    with h5py.File(place / "scan.h5", "w") as file:
        file["kspace"] = np.full((3, 2, 16, 16), SECRET, np.complex64)
        file["scan/kspace"] = file["kspace"]
    (place / "raw.bin").write_bytes(np.full(3 * 2 * 16 * 16, SECRET, np.complex64).tobytes())


def kspace(rng: np.random.Generator, slices: int = 3) -> np.ndarray:
    noise = rng.normal(size=(2, slices, 2, 16, 16)).astype(np.float32)
    return noise[0] + 1j * noise[1]


def write_scan(rng: np.random.Generator, folder: Path) -> Path:
    """Write a sound file: native, compressed, by MATLAB, in the newest format, paired, or with its parts apart."""
    data, form = kspace(rng), rng.integers(6)
    path = folder / ("a.mat" if form == 2 else str(rng.choice(["a.t5", "a.h5", "a.hdf5"])))
    images = np.abs(data[:, 0])
    with h5py.File(path, "w", userblock_size=512 if form == 2 else 0, **(LATEST if form == 3 else {})) as file:
        if form == 1:
            file.create_dataset("kspace", data=data, compression="gzip", shuffle=True, fletcher32=True)
        elif form == 2:
            parts = np.stack([data.real, data.imag], -1).view([("real", "f4"), ("imag", "f4")])[..., 0]
            stored = file.create_dataset("kspace", data=parts.T, chunks=True)
            stored.attrs["MATLAB_class"] = np.bytes_("single")
        elif form == 4:
            file["input"], file["target"] = images, images + 1
        else:
            file.create_dataset("kspace", data=data, chunks=(1, 2, 16, 16) if form == 5 else None)
            file["reconstruction_rss"], file["mask"] = images, np.ones(16)
        file["ismrmrd_header"] = "<ismrmrdHeader/>"
        file.attrs.update({"max": 1.0, "acquisition": "T1", "patient_id": "1"})
    return path


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


@mutation
def hdf5_flipped_bytes(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_scan(rng, folder))


@mutation
def hdf5_flipped_bytes_in_headers(rng: np.random.Generator, folder: Path) -> Path:
    first = 512 * int(rng.integers(0, 4))
    return flip(rng, write_scan(rng, folder), first, first + 1024)


@mutation
def hdf5_truncated(rng: np.random.Generator, folder: Path) -> Path:
    return cut(rng, write_scan(rng, folder))


@mutation
def hdf5_spliced(rng: np.random.Generator, folder: Path) -> Path:
    return splice(rng, write_scan(rng, folder))


@mutation
def hdf5_huge_shapes(rng: np.random.Generator, folder: Path) -> Path:
    """Shapes claimed by data sets of which little or nothing is written, or by a changed header."""
    path, form = folder / "a.h5", rng.integers(4)
    shape = [int(2 ** rng.integers(0, 20)) for _ in range(4)]
    shape[rng.integers(4)] = int(rng.choice([1, 2**20, 2**31, 2**40, 2**60]))
    with h5py.File(path, "w") as file:
        if form == 0:
            file["kspace"] = kspace(rng)
        elif form == 1:  # contiguous, and not there
            while np.prod(shape, dtype=object) * 8 >= 2**63:
                shape[int(np.argmax(shape))] //= 2
            file.create_dataset("kspace", shape, "c8")
        else:
            chunks = tuple(min(size, 16) for size in shape)
            while np.prod(shape, dtype=object) * 8 >= 2**63:
                shape[int(np.argmax(shape))] //= 2
            chunks = tuple(min(size, 16) for size in shape)
            file.create_dataset("kspace", shape, "c8", chunks=chunks, compression="gzip" if form == 2 else None)
            file["kspace"][0, 0, 0, 0] = 1
        if rng.random() < 0.3:
            file["mask"] = np.ones(16)
    if form == 0:
        honest = struct.pack("<4Q", 3, 2, 16, 16)
        lie = struct.pack("<4Q", *(min(size, 2**62) for size in shape))
        path.write_bytes(path.read_bytes().replace(honest, lie))
    return path


@mutation
def hdf5_huge_chunks(rng: np.random.Generator, folder: Path) -> Path:
    """Chunks far larger than the file, or so small that there are far too many."""
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        if rng.random() < 0.5:
            side = int(2 ** rng.integers(9, 14))
            shape = (int(rng.integers(2, 200)), 1, side, side)
            chunks = (1, 1, side, side) if rng.random() < 0.5 else (min(shape[0], max(1, 2**28 // side**2)), 1, side, side)
        else:
            side = int(2 ** rng.integers(6, 11))
            shape, chunks = (int(rng.integers(2, 200)), 1, side, side), (1, 1, 1, int(rng.integers(1, 3)))
        file.create_dataset("kspace", shape, "c8", chunks=chunks, compression="gzip" if rng.random() < 0.7 else None)
        if np.prod(chunks) < 2**22:
            file["kspace"][0, 0, 0, :4] = 1
    return path


@mutation
def hdf5_compressed_bombs(rng: np.random.Generator, folder: Path) -> Path:
    """Zeros that compress a thousandfold, within the chunk that is claimed or far beyond it."""
    path, beyond = folder / "a.h5", rng.random() < 0.5
    with h5py.File(path, "w") as file:
        side = 32 if beyond else int(2 ** rng.integers(7, 12))
        shape = (int(rng.integers(1, 40)), 1, side, side)
        data = file.create_dataset("kspace", shape, "c8", chunks=(1, 1, side, side), compression="gzip", shuffle=True)
        bomb = zeros(int(2 ** rng.integers(27, 31)) if beyond else 8 * side * side)
        for i in range(1 if beyond else shape[0]):
            data.id.write_direct_chunk((i, 0, 0, 0), bomb)
    return path


def zeros(size: int) -> bytes:
    """Compress so many zeros."""
    packer, block = zlib.compressobj(9), bytes(2**20)
    parts = [packer.compress(block[: min(2**20, size - start)]) for start in range(0, size, 2**20)]
    return b"".join(parts) + packer.flush()


@mutation
def hdf5_external_links(rng: np.random.Generator, folder: Path) -> Path:
    """Links out of the folder: of the data, of a group, of a mask or header, by a soft link, by a file in the folder."""
    path = write_scan(rng, folder)
    target = str(rng.choice(["pipe.h5", "scan.h5", "none.h5"]))
    target = str(rng.choice([f"../{OUTSIDE}/{target}", str(folder.parent / OUTSIDE / target), "/dev/stdin"]))
    with h5py.File(path, "a") as file:
        names = ["kspace", "mask", "ismrmrd_header", "reconstruction_rss", "input", "target"]
        for name in rng.choice(names, int(rng.integers(1, 4)), replace=False):
            file.pop(name, None)
            form = rng.integers(4)
            if form == 0:
                file[name] = h5py.ExternalLink(target, "kspace")
            elif form == 1:
                file[f"away {name}"] = h5py.ExternalLink(target, "scan")
                file[name] = h5py.SoftLink(f"/away {name}/kspace")
            elif form == 2:
                with h5py.File(folder / f"{name}.h5", "w") as other:
                    other["kspace"] = h5py.ExternalLink(target, "kspace")
                file[name] = h5py.ExternalLink(f"{name}.h5", "kspace")
            else:
                (folder / f"{name}-link.h5").symlink_to(target)
                file[name] = h5py.ExternalLink(f"{name}-link.h5", "kspace")
    return path


@mutation
def hdf5_samples_in_other_files(rng: np.random.Generator, folder: Path) -> Path:
    """External storage and virtual data sets."""
    path, outside, shape = folder / "a.h5", folder.parent / OUTSIDE, (3, 2, 16, 16)
    with h5py.File(path, "w", **LATEST) as file:
        if rng.random() < 0.5:
            raw = outside / ("raw.bin" if rng.random() < 0.5 else "pipe.h5")
            file.create_dataset("kspace", shape, "c8", external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
        else:
            layout = h5py.VirtualLayout(shape, "c8")
            layout[:] = h5py.VirtualSource(outside / str(rng.choice(["scan.h5", "pipe.h5"])), "kspace", shape, "c8")
            file.create_virtual_dataset("kspace", layout)
        file["mask"] = np.ones(16)
    return path


@mutation
def hdf5_soft_links(rng: np.random.Generator, folder: Path) -> Path:
    path = write_scan(rng, folder)
    with h5py.File(path, "a") as file:
        targets = ["/none", "/loop", "loop", "/", ".", "/kspace", "kspace/", "//", "/group/kspace", "x" * 5000]
        file["loop"] = h5py.SoftLink("/loop")
        file["group/up"] = file["/"]
        file["group/kspace"] = h5py.SoftLink("/group/up/group/kspace")
        for name in ("kspace", "mask", "target"):
            if rng.random() < 0.5:
                file.pop(name, None)
                file[name] = h5py.SoftLink(str(rng.choice(targets)))
    return path


@mutation
def hdf5_groups_in_groups(rng: np.random.Generator, folder: Path) -> Path:
    """Circles of groups, groups deep in groups, and very many."""
    path = write_scan(rng, folder)
    with h5py.File(path, "a", **LATEST) as file:
        form, group = rng.integers(3), file.create_group("g")
        if form == 0:
            group["self"], group["up"], file["g2"] = group, file["/"], group
        else:
            for i in range(int(10 ** rng.uniform(1, 3.3))):
                child = group.create_group(f"{i}" if form == 1 else "g")
                group = group if form == 1 else child
            if form == 1 and rng.random() < 0.3:
                for i in range(11_000):
                    group[f"again {i}"] = child
        if "kspace" in file:
            file.move("kspace", str(rng.choice(["g/kspace", "kspace2"])))
    return path


@mutation
def hdf5_filters_not_installed(rng: np.random.Generator, folder: Path) -> Path:
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=kspace(rng), compression="gzip", chunks=(1, 2, 16, 16))
    data = bytearray(path.read_bytes())
    place = data.index(b"deflate") - 8
    data[place : place + 2] = struct.pack("<H", int(rng.choice([2, 3, 4, 5, 6, 32000, 32001, 32004, 32015, 65535])))
    path.write_bytes(data)
    return path


@mutation
def hdf5_names_and_attributes(rng: np.random.Generator, folder: Path) -> Path:
    """Names and attributes of any bytes: no UTF-8, terminal escapes, markup, other types than expected."""
    path = write_scan(rng, folder)
    texts = [b"\xff\xfe", b"\x1b]0;title\x07\x1b[31m", b"<script>alert(1)</script>", b"$\\frac{1}{0}$", b"a\nFAULT  b"]
    texts += [rng.bytes(int(rng.integers(1, 40))).replace(b"\0", b"/").replace(b".", b""), b"x" * 3000, "\u202e".encode()]
    values = [1e400, -1.0, 0, np.nan, "high", b"\xff", np.zeros(0), np.arange(3), h5py.Empty("f4"), 2**63, 1j, [b"a", b"b"]]
    values += [np.array(["a", "bc"], h5py.string_dtype()), np.zeros((), [("r", "f4"), ("x", "S3")]), *texts]
    with h5py.File(path, "a") as file:
        for name in ("max", "acquisition", "padding_left", "padding_right", "norm", "patient_id", "mrjax_step"):
            if rng.random() < 0.4:
                value = values[rng.integers(len(values))]
                file.attrs[name] = np.void(value) if isinstance(value, bytes) and rng.random() < 0.2 else value
        for text in rng.choice(np.array(texts, object), int(rng.integers(1, 4)), replace=False):
            if not (text.strip(b"/") and h5py.h5l):
                continue
            file.id.links.create_soft(b"odd " + text.replace(b"/", b""), text)
            if rng.random() < 0.4 and "kspace" in file:
                file.id.links.move(b"kspace", file.id, b"odd2 " + text.replace(b"/", b""))
    if rng.random() < 0.4:
        path = path.rename(path.with_stem("\x1b[2J\n$x_1$<b>\udcff"))
    return path


@mutation
def hdf5_other_types_and_values(rng: np.random.Generator, folder: Path) -> Path:
    """Data sets of every type that HDF5 has, of other axes, and of numbers that are not finite."""
    path, data = folder / "a.h5", kspace(rng)
    odd = rng.choice(np.array([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0], object))
    infinite = data.copy()
    infinite[rng.integers(3)] = odd
    values = [infinite, infinite * np.complex64(1e30), data.real * 0 + odd, data[0], data[0, 0], data[0, 0, 0], 1.0, "text"]
    values += [h5py.Empty("c8"), np.zeros((0, 2, 4, 4), "c8"), np.zeros((3, 2, 0, 4), "c8"), data.astype("c16") * 1e300]
    values += [(data.real * 99).astype(kind) for kind in ("i1", "u2", "i8", ">f8", "f2", "bool", "longdouble")]
    values += [data.real.astype([("r", "f4"), ("i", "f4"), ("x", "f4")]), data.real.astype([("r", "f4"), ("i", "i2")])]
    values += [np.zeros((3, 16, 16), [("r", "f4", 3), ("i", "f4")]), np.zeros((3, 4, 4), "S7"), np.zeros((3, 4, 4), "V9")]
    values += [np.full((3, 4), "a", h5py.string_dtype()), np.zeros((3, 8, 8), h5py.enum_dtype({"A": 0}, "i4"))]
    values += [np.zeros((3, 8, 8), [("r", [("r", "f4"), ("i", "f4")]), ("i", "f4")]), np.zeros((1, 1, 1, 1), "c8"), data[:1]]
    with h5py.File(path, "w") as file:
        file.create_dataset("vlen", (3,), h5py.vlen_dtype("f4"))[0] = [1, 2]
        file.create_dataset("references", (3, 4, 4), h5py.ref_dtype)
        for name in ("kspace", "reconstruction_rss", "mask", "input", "target", "ismrmrd_header"):
            if rng.random() < (0.8 if name == "kspace" else 0.3):
                choice = rng.integers(len(values) + 2)
                if choice >= len(values):
                    file[name] = file[("vlen", "references")[choice - len(values)]]
                else:
                    file[name] = values[choice]
    return path


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a state_dict of fastMRI's U-Net or VarNet."""
    name = str(rng.choice(["unet", "varnet"]))
    fields = {"channels": 2, "levels": 2, "cascades": 2, "sens_channels": 2, "sens_levels": 1}
    table = fastmri._parameters(name, fields)
    return {key: rng.normal(size=shape).astype(np.float32) for key, (_, _, shape) in table.items()}


def atom(value: object) -> bytes:
    """Pickle a value without the pickle's first and last instruction."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key: object, dtype: str = "FloatStorage") -> bytes:
    return b"(" + atom("storage") + f"ctorch\n{dtype}\n".encode() + atom(key) + atom("cpu") + atom(1) + b"tQ"


def tensor(storage: bytes, *arguments: object) -> bytes:
    """The instructions that rebuild a tensor from a storage, offset, shape and strides."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(map(atom, arguments)) + b"\x89)tR"


def write_pt(path: Path, pickled: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def state_dict(tensors: dict[str, bytes]) -> bytes:
    items = b"".join(atom(name) + value for name, value in tensors.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def write_weights(rng: np.random.Generator, folder: Path) -> Path:
    """Write a sound state_dict in one of the formats."""
    arrays, suffix = weights(rng), str(rng.choice(["pt", "ckpt", "npz", "safetensors"]))
    path = folder / f"a.{suffix}"
    if suffix == "npz":
        (np.savez if rng.random() < 0.5 else np.savez_compressed)(path, **arrays)
    elif suffix == "safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        keys = {name: tensor(storage(name), 0, x.shape, contiguous(x.shape)) for name, x in arrays.items()}
        write_pt(path, state_dict(keys), {name: x.tobytes() for name, x in arrays.items()})
    return path


@mutation
def weights_flipped_bytes(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_weights(rng, folder))


@mutation
def weights_truncated(rng: np.random.Generator, folder: Path) -> Path:
    return cut(rng, write_weights(rng, folder))


@mutation
def weights_spliced(rng: np.random.Generator, folder: Path) -> Path:
    return splice(rng, write_weights(rng, folder))


@mutation
def weights_of_other_values(rng: np.random.Generator, folder: Path) -> Path:
    """Arrays of other types and shapes than a network's, and numbers that are not finite."""
    arrays = weights(rng)
    for name in rng.choice(list(arrays), 3):
        x = arrays[name]
        others = [x * np.nan, x * np.inf, x.astype("f8") * 1e300, x.astype("c8"), x.astype("S3"), x[0], x[..., None]]
        others += [np.float32(1), np.zeros(0), np.zeros((0, *x.shape[1:])), x.astype([("a", "f4")]), x.astype(bool), x.T]
        others += [x.astype(object), np.zeros((2,) * 20), x.astype("m8[s]"), x.astype(">f8"), x.astype("U5")]
        arrays[name] = others[rng.integers(len(others))]
    np.savez(folder / "a.npz", **{("$\x1b" + name if rng.random() < 0.05 else name): x for name, x in arrays.items()})
    return folder / "a.npz"


@mutation
def pt_strides_and_nested_tensors(rng: np.random.Generator, folder: Path) -> Path:
    """Views that leave their storage, overlap, overflow, or are of no storage at all."""
    arrays, data = weights(rng), {}
    numbers = [-1, 0, 1, 2, 9, 2**31, 2**59, 2**61, 2**62, 2**63, 2**64, -(2**62), 2**70000, 1.5, "a", None, (1,), True]
    for name, x in arrays.items():
        arguments: list[object] = [0, x.shape, contiguous(x.shape)]
        if rng.random() < 0.2:
            shape, strides = list(x.shape), list(contiguous(x.shape))
            for part in (shape, strides):
                if part and rng.random() < 0.6:
                    part[rng.integers(len(part))] = numbers[rng.integers(len(numbers))]
            arguments = [numbers[rng.integers(len(numbers))] if rng.random() < 0.3 else 0, tuple(shape), tuple(strides)]
            if rng.random() < 0.2:
                arguments[rng.integers(3)] = [numbers[rng.integers(len(numbers))]] * int(2 ** rng.integers(0, 12))
        source = storage(str(rng.choice([name, name, name, name, "../0", "\x1b"])), str(rng.choice(["FloatStorage"] * 9 + ["X"])))
        if rng.random() < 0.1:
            source = tensor(source, 0, (4,), (int(rng.integers(3)),))
        data[name] = tensor(source, *arguments)
    kept = {name: x.tobytes() for name, x in arrays.items() if rng.random() < 0.99}
    return write_pt(folder / "a.pt", state_dict(data), kept)


@mutation
def pt_hostile_pickles(rng: np.random.Generator, folder: Path) -> Path:
    """Code to run, instructions at random, memory and time without end, an object that is told other methods."""
    mark = f"touch {folder / 'harm'}"
    doubled = b"(" + b"t" * 0 + b")" + b"".join(b"q\x00h\x00\x86" for _ in range(int(rng.integers(20, 3000))))
    forms = [
        b"\x80\x02cos\nsystem\n" + atom(mark) + b"\x85R.",
        b"\x80\x02}" + atom("state_dict") + b"cbuiltins\nexec\n" + atom("raise SystemExit(3)") + b"\x85Rs.",
        b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x02" + doubled + b".",
        b"\x80\x02}" + doubled + b"K\x01s.",
        state_dict({"a": tensor(b"(" + atom("storage") + b"ctorch\nFloatStorage\n" + doubled + b"NNtQ", 0, (1,), (1,))}),
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
        b"\x80\x02ccollections\nOrderedDict\n)R}" + atom("items") + b"K\x05sb.",
        b"\x80\x02" + b"(" * int(rng.integers(1, 10**5)) + b"t" * int(rng.integers(1, 10**5)) + b".",
        b"\x80\x02" + b"]" * int(rng.integers(1, 4 * 10**6)) + b".",
        b"\x80\x02" + b"\x86" * 9 + b".",
        b"\x80\x02I" + b"9" * int(rng.integers(1, 10**6)) + b"\n.",
        bytes(rng.choice(list(b"()]}a.bceghijloqrstu0126789RQNKMJX\x80\x81\x85\x86\x87\x88\x89\x8a\x8b"), 400).tolist()) + b".",
        state_dict({"a": b"ctorch._utils\n_rebuild_tensor_v2\n}" + atom("__defaults__") + b")s\x86b"}),
    ]
    return write_pt(folder / "a.pt", forms[rng.integers(len(forms))], {"0": bytes(64)})


@mutation
def weights_compressed_bombs(rng: np.random.Generator, folder: Path) -> Path:
    """Archives that unpack to a thousand times their size, and say so or not; other methods of compression."""
    suffix, size = str(rng.choice(["pt", "npz"])), int(2 ** rng.integers(20, 31))
    method = int(rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    if method != zipfile.ZIP_DEFLATED:
        size = min(size, 2**26)  # slow to make
    path = folder / f"a.{suffix}"
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (size // 4,)})
    with zipfile.ZipFile(path, "w", method) as archive:
        name = "archive/data/0" if suffix == "pt" else f"{fastmri._FIRST}.npy"
        with archive.open(name, "w") as stream:
            stream.write(head.getvalue() if suffix == "npz" else b"")
            for _ in range(size // 2**20):
                stream.write(bytes(2**20))
        if suffix == "pt":
            copies = {f"{i}{fastmri._FIRST}": tensor(storage("0"), 0, (size // 4,), (1,)) for i in range(100)}
            archive.writestr("archive/data.pkl", state_dict(copies))
    if rng.random() < 0.5:  # the directory understates
        data = path.read_bytes()
        path.write_bytes(data.replace(struct.pack("<I", size + (len(head.getvalue()) if suffix == "npz" else 0)), b"\x40\0\0\0"))
    return path


@mutation
def npz_headers(rng: np.random.Generator, folder: Path) -> Path:
    """Headers of arrays that claim shapes and types at will."""
    shapes = ["()", "(2**60,)", "(99999999999,)", "(-1,)", "(1,)*99", "(1e9,)", "(" * 99, "None", "(3, 4)", "(True,)"]
    types = ["'<f4'", "'O'", "'V99999999'", "'<f99'", "[('a', 'O')]", "'S0'", "None", "'<c8'", "'f4,' * 9", "'M8'"]
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for name in (fastmri._FIRST, "b"):
            shape, kind = (str(rng.choice(forms)) if rng.random() < 0.6 else forms[0] for forms in (shapes, types))
            header = f"{{'descr': {kind}, 'fortran_order': {rng.choice(['True', 'False', '3'])}, 'shape': {shape}}}".encode()
            header += b" " * int(rng.choice([1, 9, 50_000])) + b"\n"
            version = bytes([int(rng.choice([1, 1, 2, 3, 9])), 0])
            length = struct.pack("<H" if version[0] == 1 else "<I", len(header) if rng.random() < 0.8 else 60_000)
            archive.writestr(f"{name}.npy", b"\x93NUMPY" + version + length + header + rng.bytes(int(rng.integers(100))))
    return folder / "a.npz"


@mutation
def safetensors_headers(rng: np.random.Generator, folder: Path) -> Path:
    """Headers that claim offsets, shapes, types and lengths at will."""
    numbers = [0, 1, 4, 64, -1, 2**31, 2**62, 2**64 - 1, 2**70, 1.5, "1", None, []]
    draw = lambda: numbers[rng.integers(len(numbers))]
    header: dict[str, object] = {}
    for name in (fastmri._FIRST, "b", "\x1b[2J"):
        kind = str(rng.choice(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "X", "C64"]))
        shape = [draw() for _ in range(rng.integers(4))] if rng.random() < 0.5 else [16]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [0, 64] if rng.random() < 0.5 else [draw(), draw()]}
    text = json.dumps(header).encode()
    forms = [text, text, text, b"[" * 10**5, b'{"a":' * 10**5, rng.bytes(300), b'{"__metadata__": 3}', b"{}"]
    text = forms[rng.integers(len(forms))]
    length = len(text) if rng.random() < 0.8 else int(rng.choice([0, 99_999_999, 2**62]))
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(64))
    return folder / "a.safetensors"


@mutation
def config_of_a_checkpoint(rng: np.random.Generator, folder: Path) -> Path:
    """JSON of a config with fields and values at random; no code in it may run."""
    values = config.defaults().to_dict()
    odd = [None, [], {}, "x", -1, 1e400, 2**70, [[1]], {"a": 1}, "__import__('os').abort()", True, "@raise", [None], "\x1b"]
    for _ in range(rng.integers(1, 5)):
        place, name = values, str(rng.choice(list(values)))
        while isinstance(place.get(name), dict) and place[name] and rng.random() < 0.8:
            place = place[name]
            name = str(rng.choice(list(place)))
        place[str(rng.choice([name, name, name, "other", "a.b"]))] = odd[rng.integers(len(odd))]
    text = json.dumps(values)
    forms = [text] * 6 + [text[: rng.integers(len(text))], "[" * 10**5, "[]", "3", '{"model": 3}', "null", "\udcff"]
    (folder / "config.json").write_bytes(forms[rng.integers(len(forms))].encode(errors="surrogateescape"))
    return folder / "config.json"
