"""Raw files of ISMRMRD that are damaged, or made to do harm."""

import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import ismrmrd
import numpy as np

from tests import raw_files
from tests.fuzz.mutations import OUTSIDE, cut, flip, splice
from tests.fuzz.scans import kspace

SIZE = 16


def write_raw(
    rng: np.random.Generator,
    folder: Path,
    change: Callable[[ismrmrd.Acquisition], None] = lambda readout: None,
    **header: object,
) -> Path:
    """Write a sound file: 2-D or 3-D, some with noise readouts and oversampling."""
    partitions, oversampling = int(rng.choice([1, 3])), int(rng.choice([1, 2]))
    data = kspace(rng)
    readouts = [raw_files.make_readout(data[0, :, :4].reshape(2, -1), [ismrmrd.ACQ_IS_NOISE_MEASUREMENT])]
    readouts = readouts if rng.random() < 0.5 else []
    for z in range(3):
        counter = {"partition": z} if partitions > 1 else {"slice": z, "position": (0.0, 0.0, -4.0 * z)}
        readouts += raw_files.make_lines(data[z], **counter)
    for readout in readouts:
        change(readout)
    fields = {"matrix": (SIZE, SIZE, partitions), "oversampling": oversampling} | header
    return raw_files.write_raw(
        folder / "a.h5", raw_files.make_header(**fields), readouts, one_by_one=rng.random() < 0.5
    )


def raw_flipped_bytes(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_raw(rng, folder))


def raw_flipped_bytes_in_headers(rng: np.random.Generator, folder: Path) -> Path:
    path = write_raw(rng, folder)
    first = 2048 * int(rng.integers(0, path.stat().st_size // 2048))
    return flip(rng, path, first, first + 2048)


def raw_truncated(rng: np.random.Generator, folder: Path) -> Path:
    return cut(rng, write_raw(rng, folder))


def raw_spliced(rng: np.random.Generator, folder: Path) -> Path:
    return splice(rng, write_raw(rng, folder))


def raw_counters(rng: np.random.Generator, folder: Path) -> Path:
    """Fields of some readouts' headers changed to the smallest and largest values, and to what is no number."""
    names = ["flags", "center_sample", "discard_pre", "discard_post", "encoding_space_ref", "trajectory_dimensions"]
    names += ["sample_time_us", *(name for name, _ in ismrmrd.EncodingCounters._fields_[:-1])]
    vectors = ["position", "read_dir", "phase_dir", "slice_dir"]
    chosen, part = rng.choice([*names, *vectors], int(rng.integers(1, 4))), rng.choice([0.01, 0.5, 1])
    every = rng.random() < 0.5

    def change(readout: ismrmrd.Acquisition) -> None:
        if rng.random() > part:
            return
        for name in chosen:
            value = int(rng.choice([0, 1, 17, 255, 2**15, 2**16 - 1])) if not every else int(rng.integers(2**16))
            if name in vectors:
                getattr(readout, name)[:] = rng.choice([0.0, 1e30, np.nan, np.inf, -1.0], 3).tolist()
            elif name == "flags":
                readout.flags = 1 << value % 64
            elif name == "trajectory_dimensions":
                continue
            else:
                setattr(readout.idx if hasattr(readout.idx, name) else readout, name, value)

    return write_raw(rng, folder, change)


def raw_claims(rng: np.random.Generator, folder: Path) -> Path:
    """Samples, coils, matrices and centres beyond the file."""
    sizes = [0, 1, 3, SIZE, 255, 4096, 2**16 - 1]
    matrix = tuple(int(rng.choice(sizes)) if rng.random() < 0.4 else size for size in (SIZE, SIZE, 1))
    centres = (int(rng.choice(sizes)), int(rng.choice(sizes)))
    path = write_raw(rng, folder, matrix=matrix, centres=centres, oversampling=1)
    if rng.random() < 0.6:
        with h5py.File(path, "a") as file:
            data = file["dataset/data"]
            for i in range(0, len(data), int(rng.integers(1, 20))):
                element = data[i]
                for name in ("number_of_samples", "active_channels", "trajectory_dimensions"):
                    if rng.random() < 0.5:
                        element["head"][name] = rng.choice([0, 1, 2, 15, 17, 1024, 2**16 - 1])
                data[i] = element
    return path


def raw_headers(rng: np.random.Generator, folder: Path) -> Path:
    """XML that is none, deep, wide, of entities, of other encodings, and with numbers that are none."""
    path = write_raw(rng, folder)
    with h5py.File(path, "a") as file:
        text = bytes(file["dataset/xml"][0])
        entities = b"".join(b'<!ENTITY e%d "%s">' % (i, b"&e%d;" % (i - 1) * 10 if i else b"x" * 99) for i in range(12))
        local = f'<!ENTITY e11 SYSTEM "file://{folder.parent / OUTSIDE / "raw.bin"}">'.encode()
        choices = [
            b"",
            rng.bytes(500),
            text[: rng.integers(len(text))],
            b"<a>" * 200_000,
            b"<a>" + b"<b/>" * 2_000_000,
            text.replace(b"?>", b"?><!DOCTYPE a [" + entities + b"]>").replace(b"T1 tse", b"&e11;"),
            text.replace(b"?>", b"?><!DOCTYPE a [" + local + b"]>").replace(b"T1 tse", b"&e11;"),
            text.decode().replace("ascii", "utf-16").encode("utf-16"),
            text.replace(b"ascii", b"nonsense"),
            text.replace(b"T1 tse", b"\x1b[2J&#27;"),
            text.replace(b"T1 tse", b"&#x202e;" * 999),
        ]
        numbers = [b"nan", b"inf", b"-1", b"1e999", b"9" * 9000, b"", b"0x10", b"1.5", b"-0", "\u0663".encode()]
        for tag in (b"x", b"y", b"z", b"center", b"relativeReceiverNoiseBandwidth"):
            value = numbers[rng.integers(len(numbers))]
            parts = text.split(b"<%s>" % tag)
            place = int(rng.integers(1, len(parts)))
            parts[place] = value + parts[place][parts[place].index(b"<") :]
            choices.append((b"<%s>" % tag).join(parts))
        choice = choices[rng.integers(len(choices))]
        del file["dataset/xml"]
        if rng.random() < 0.5:
            file["dataset"].create_dataset("xml", (1,), h5py.string_dtype())[0] = choice.replace(b"\0", b"")
        else:
            file["dataset/xml"] = np.bytes_(choice or b"\0")
    return path


def find_pointers(path: Path) -> list[int]:
    """The offsets in a file of the pointers to samples, each of a length, an address and an index."""
    with h5py.File(path) as file:
        elements, places = file["dataset/data"], []
        elements.id.chunk_iter(lambda one: places.append(one.byte_offset))
        length, count = elements.chunks[0], len(elements)
        size = elements.id.get_storage_size() // (len(places) * length)
    return [place + size * i + size - 16 for place in places for i in range(length)][:count]


def raw_heaps(rng: np.random.Generator, folder: Path) -> Path:
    """Lengths, addresses and sizes in the global heap and of the pointers into it, changed to what is not there."""
    path = write_raw(rng, folder)
    data = bytearray(path.read_bytes())
    pointers = find_pointers(path)
    heaps = [i for i in range(0, len(data) - 16, 8) if data[i : i + 4] == b"GCOL"]
    odd = [0, 1, 15, 16, 2**16, len(data) - 8, len(data), 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
    for _ in range(2 ** int(rng.integers(0, 8))):
        value = int(rng.choice(np.array([*odd, int(rng.integers(len(data))), int(rng.choice(heaps))], object)))
        pointer, heap = int(rng.choice(pointers)), int(rng.choice(heaps))
        form = rng.integers(5)
        if form == 0:
            data[pointer : pointer + 4] = struct.pack("<I", value % 2**32)
        elif form == 1:
            data[pointer + 4 : pointer + 12] = struct.pack("<Q", value)
        elif form == 2:
            data[pointer + 12 : pointer + 16] = struct.pack("<I", value % 2**32)
        elif form == 3:
            data[heap + 8 : heap + 16] = struct.pack("<Q", value)
        else:
            data[heap + 24 : heap + 32] = struct.pack("<Q", value)
    path.write_bytes(data)
    return path


def raw_endless_heaps(rng: np.random.Generator, folder: Path) -> Path:
    """As many heaps as readouts, each of which begins in the one before and goes on through the whole file."""
    path = write_raw(rng, folder)
    data, count = bytearray(path.read_bytes()), int(rng.integers(100, 3000))
    base = len(data) + -len(data) % 16
    heaps = b"".join(struct.pack("<4sB3xQ", b"GCOL", 1, 2**40) for _ in range(count))
    data += bytes(base - len(data)) + heaps + struct.pack("<HHIQ", 1, 1, 0, 0) * 60_000
    for number, pointer in enumerate(find_pointers(path)):
        data[pointer + 4 : pointer + 12] = struct.pack("<Q", base + 16 * (number % count))
    path.write_bytes(data)
    return path


MUTATIONS = (
    raw_flipped_bytes,
    raw_flipped_bytes_in_headers,
    raw_truncated,
    raw_spliced,
    raw_counters,
    raw_claims,
    raw_headers,
    raw_heaps,
    raw_endless_heaps,
)
