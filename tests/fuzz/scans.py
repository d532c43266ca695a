"""HDF5 files that are damaged, or made to do harm."""

import struct
from pathlib import Path

import h5py
import numpy as np

from tests.fuzz.mutations import OUTSIDE, cut, flip, splice, zeros

LATEST = {"libver": "latest"}


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


def hdf5_flipped_bytes(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_scan(rng, folder))


def hdf5_flipped_bytes_in_headers(rng: np.random.Generator, folder: Path) -> Path:
    first = 512 * int(rng.integers(0, 4))
    return flip(rng, write_scan(rng, folder), first, first + 1024)


def hdf5_truncated(rng: np.random.Generator, folder: Path) -> Path:
    return cut(rng, write_scan(rng, folder))


def hdf5_spliced(rng: np.random.Generator, folder: Path) -> Path:
    return splice(rng, write_scan(rng, folder))


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


def hdf5_huge_chunks(rng: np.random.Generator, folder: Path) -> Path:
    """Chunks far larger than the file, or so small that there are far too many."""
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        if rng.random() < 0.5:
            side = int(2 ** rng.integers(9, 14))
            shape = (int(rng.integers(2, 200)), 1, side, side)
            chunks = (
                (1, 1, side, side) if rng.random() < 0.5 else (min(shape[0], max(1, 2**28 // side**2)), 1, side, side)
            )
        else:
            side = int(2 ** rng.integers(6, 11))
            shape, chunks = (int(rng.integers(2, 200)), 1, side, side), (1, 1, 1, int(rng.integers(1, 3)))
        file.create_dataset("kspace", shape, "c8", chunks=chunks, compression="gzip" if rng.random() < 0.7 else None)
        if np.prod(chunks) < 2**22:
            file["kspace"][0, 0, 0, :4] = 1
    return path


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


def hdf5_external_links(rng: np.random.Generator, folder: Path) -> Path:
    """Links out of the folder: of data sets, of a group by a soft link, by a file in the folder, by a symbolic link."""
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


def hdf5_filters_not_installed(rng: np.random.Generator, folder: Path) -> Path:
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=kspace(rng), compression="gzip", chunks=(1, 2, 16, 16))
    data = bytearray(path.read_bytes())
    place = data.index(b"deflate") - 8
    data[place : place + 2] = struct.pack("<H", int(rng.choice([2, 3, 4, 5, 6, 32000, 32001, 32004, 32015, 65535])))
    path.write_bytes(data)
    return path


def hdf5_names_and_attributes(rng: np.random.Generator, folder: Path) -> Path:
    """Names and attributes of any bytes: no UTF-8, terminal escapes, markup, other types than expected."""
    path = write_scan(rng, folder)
    texts = [b"\xff\xfe", b"\x1b]0;title\x07\x1b[31m", b"<script>alert(1)</script>", b"$\\frac{1}{0}$", b"a\nFAULT  b"]
    texts += [
        rng.bytes(int(rng.integers(1, 40))).replace(b"\0", b"/").replace(b".", b""),
        b"x" * 3000,
        "\u202e".encode(),
    ]
    values = [
        1e400,
        -1.0,
        0,
        np.nan,
        "high",
        b"\xff",
        np.zeros(0),
        np.arange(3),
        h5py.Empty("f4"),
        2**63,
        1j,
        [b"a", b"b"],
    ]
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


def hdf5_other_types_and_values(rng: np.random.Generator, folder: Path) -> Path:
    """Data sets of every type that HDF5 has, of other axes, and of numbers that are not finite."""
    path, data = folder / "a.h5", kspace(rng)
    odd = rng.choice(np.array([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0], object))
    infinite = data.copy()
    infinite[rng.integers(3)] = odd
    values = [
        infinite,
        infinite * np.complex64(1e30),
        data.real * 0 + odd,
        data[0],
        data[0, 0],
        data[0, 0, 0],
        1.0,
        "text",
    ]
    values += [h5py.Empty("c8"), np.zeros((0, 2, 4, 4), "c8"), np.zeros((3, 2, 0, 4), "c8"), data.astype("c16") * 1e300]
    values += [(data.real * 99).astype(kind) for kind in ("i1", "u2", "i8", ">f8", "f2", "bool", "longdouble")]
    values += [data.real.astype([("r", "f4"), ("i", "f4"), ("x", "f4")]), data.real.astype([("r", "f4"), ("i", "i2")])]
    values += [
        np.zeros((3, 16, 16), [("r", "f4", 3), ("i", "f4")]),
        np.zeros((3, 4, 4), "S7"),
        np.zeros((3, 4, 4), "V9"),
    ]
    values += [np.full((3, 4), "a", h5py.string_dtype()), np.zeros((3, 8, 8), h5py.enum_dtype({"A": 0}, "i4"))]
    values += [
        np.zeros((3, 8, 8), [("r", [("r", "f4"), ("i", "f4")]), ("i", "f4")]),
        np.zeros((1, 1, 1, 1), "c8"),
        data[:1],
    ]
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


MUTATIONS = (
    hdf5_flipped_bytes,
    hdf5_flipped_bytes_in_headers,
    hdf5_truncated,
    hdf5_spliced,
    hdf5_huge_shapes,
    hdf5_huge_chunks,
    hdf5_compressed_bombs,
    hdf5_external_links,
    hdf5_samples_in_other_files,
    hdf5_soft_links,
    hdf5_groups_in_groups,
    hdf5_filters_not_installed,
    hdf5_names_and_attributes,
    hdf5_other_types_and_values,
)
