"""Chunks read without HDF5 hold what h5py reads, whatever their shape and filters, from many threads at once."""

import concurrent.futures
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import coil_images, to_kspace

from mrjax.errors import UserError
from mrjax.io import hdf5, hdf5_chunks

KSPACE = to_kspace(coil_images(5, 2, 24, 17))
SLICE = (1, *KSPACE.shape[1:])
GZIP, SHUFFLED = {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}


def floats(data: np.ndarray) -> np.ndarray:
    return data.view(np.float32).reshape(*data.shape, 2)


# Arrays, how they are stored, and whether they are read without HDF5.
FORMS = {
    "chunk a slice": (KSPACE, {"chunks": SLICE, **GZIP}, True),
    "shuffled": (KSPACE, {"chunks": SLICE, **SHUFFLED}, True),
    "split slices, cut at the edges": (KSPACE, {"chunks": (1, 1, 7, 8), **SHUFFLED}, True),
    "several slices a chunk, cut at the end": (KSPACE, {"chunks": (2, 2, 24, 17), **GZIP}, True),
    "several slices a chunk, split": (KSPACE, {"chunks": (3, 1, 10, 17), **SHUFFLED}, True),
    "h5py's choice": (KSPACE.repeat(40, 0), GZIP, True),
    "all in one": (KSPACE, {"chunks": KSPACE.shape, **SHUFFLED}, True),
    "split, raw": (KSPACE, {"chunks": (1, 1, 7, 8)}, True),
    "double": (KSPACE, {"chunks": SLICE, "dtype": "c16", **SHUFFLED}, True),
    "big endian": (KSPACE, {"chunks": SLICE, "dtype": ">c8", **SHUFFLED}, True),
    "pairs": (floats(KSPACE), {"chunks": (2, 2, 24, 17, 2), **SHUFFLED}, True),
    "pairs, split in parts": (floats(KSPACE), {"chunks": (1, 2, 24, 17, 1), **GZIP}, True),
    "integers": (np.arange(10 * 24 * 17, dtype=np.int16).reshape(5, 2, 24, 17), {"chunks": SLICE, **SHUFFLED}, True),
    "checksummed": (KSPACE, {"chunks": SLICE, "fletcher32": True, **GZIP}, False),
    "other filters": (KSPACE, {"chunks": SLICE, "compression": "lzf"}, False),
    "several slices a chunk, raw": (KSPACE, {"chunks": (2, 2, 24, 17)}, False),
}


def write(path: Path, data: np.ndarray, **storage) -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=data, **storage)
    return str(path)


def find(path: str) -> hdf5_chunks.Chunks | None:
    with h5py.File(path) as file:
        return hdf5_chunks.find_chunks(file["kspace"], path, 0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_chunks_holds_what_h5py_reads(tmp_path: Path, form: str) -> None:
    data, storage, direct = FORMS[form]
    path = write(tmp_path / "a.t5", data, **storage)
    assert (find(path) is not None) == direct
    reader = hdf5.Hdf5Reader()
    with h5py.File(path) as file:
        expected = file["kspace"][()]
    if form.startswith("pairs"):
        expected = expected.view(np.complex64)[..., 0]
    for i in (3, 0, len(expected) - 1):
        out = np.empty(expected.shape[1:], expected.dtype)
        read = reader.read_slice(path, "kspace", i, out)
        assert np.array_equal(read, expected[i])
        assert (read is out) == direct
        assert np.array_equal(reader.read_slice(path, "kspace", i), expected[i])
    with pytest.raises(UserError, match=rf"a\.t5: slice {len(expected)} of `kspace` cannot be read"):
        reader.read_slice(path, "kspace", len(expected))  # even if the last chunk reaches beyond it


def test_chunks_never_written_hold_the_fill_value(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.t5", "w") as file:
        data = file.create_dataset("kspace", KSPACE.shape, "c8", chunks=(2, 1, 24, 17), fillvalue=3 - 1j, **SHUFFLED)
        data[2:4, 1] = KSPACE[2:4, 1]
        file.create_dataset("reconstruction", (2, 4, 4), "f4", chunks=(1, 4, 4), **GZIP)
    path, reader = str(tmp_path / "a.t5"), hdf5.Hdf5Reader()
    assert find(path) is not None
    assert np.array_equal(reader.read_slice(path, "kspace", 2), [np.full((24, 17), 3 - 1j), KSPACE[2, 1]])
    assert np.array_equal(reader.read_slice(path, "kspace", 4), np.full((2, 24, 17), 3 - 1j))
    assert not reader.read_slice(path, "reconstruction", 1).any()


def test_filters_that_a_chunk_left_out_are_not_undone(tmp_path: Path) -> None:
    plain = KSPACE[0].tobytes()
    shuffled = np.frombuffer(plain, np.uint8).reshape(-1, 8).T.tobytes()
    stored = [(plain, 3), (shuffled, 2), (zlib.compress(plain), 1), (zlib.compress(shuffled), 0)]
    with h5py.File(tmp_path / "a.t5", "w") as file:
        data = file.create_dataset("kspace", (4, *KSPACE.shape[1:]), "c8", chunks=SLICE, **SHUFFLED)
        for i, (packed, mask) in enumerate(stored):
            data.id.write_direct_chunk((i, 0, 0, 0), packed, filter_mask=mask)
        assert all(np.array_equal(data[i], KSPACE[0]) for i in range(4))
    path, reader = str(tmp_path / "a.t5"), hdf5.Hdf5Reader()
    assert find(path) is not None
    assert all(np.array_equal(reader.read_slice(path, "kspace", i), KSPACE[0]) for i in range(4))


def test_eight_threads_read_at_once_and_nobody_holds_the_lock(tmp_path: Path) -> None:
    names = [name for name, (data, _, direct) in FORMS.items() if direct and data is KSPACE]
    paths = [write(tmp_path / f"{i}.t5", KSPACE, **FORMS[name][1]) for i, name in enumerate(names)]
    reader = hdf5.Hdf5Reader()
    for path in paths:
        reader.describe(path)
    tasks = [(path, i) for path in paths for i in range(5)] * 4
    with concurrent.futures.ThreadPoolExecutor(8) as pool, hdf5._lock:
        read = list(pool.map(lambda task: reader.read_slice(task[0], "kspace", task[1]), tasks, timeout=20))
    assert all(np.array_equal(x, KSPACE[i]) for x, (_, i) in zip(read, tasks, strict=True))


@pytest.mark.parametrize("noise", [True, False])
def test_python_runs_on_while_a_chunk_inflates(tmp_path: Path, monkeypatch, noise: bool) -> None:
    data = np.random.default_rng(0).normal(size=(1, 1, 1024, 2048)).astype(np.float32).view(np.complex64)  # 8 MB
    path = write(tmp_path / "a.t5", data, chunks=data.shape, compression="gzip", compression_opts=2)
    owner, name = (hdf5_chunks, "inflate_noise") if noise else (hdf5_chunks.deflate, "zlib_decompress")
    reader, inflate = hdf5.Hdf5Reader(), getattr(owner, name)
    reader.describe(path)
    turns, turns_meanwhile, interval = 0, 0, sys.getswitchinterval()

    def watched(*arguments: Any) -> Any:
        nonlocal turns_meanwhile
        before = turns
        result = inflate(*arguments)
        turns_meanwhile = turns - before
        return result

    monkeypatch.setattr(hdf5_chunks, "inflate_noise", lambda packed, out: False)
    monkeypatch.setattr(owner, name, watched)
    sys.setswitchinterval(60)  # Python's lock goes to another thread only where the one that holds it releases it
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            read = pool.submit(reader.read_slice, path, "kspace", 0)
            while not read.done():
                turns += 1
                time.sleep(0)
            assert np.array_equal(read.result(), data[0])
    finally:
        sys.setswitchinterval(interval)
    assert turns_meanwhile > 10


@pytest.mark.parametrize(
    ("packed", "sentence"),
    [
        (zlib.compress(KSPACE[0].tobytes())[:-40], "a chunk's gzip stream is damaged"),
        (zlib.compress(KSPACE[0].tobytes())[:-4] + bytes(4), "a chunk's gzip stream is damaged"),  # the checksum
        (b"no stream at all", "a chunk's gzip stream is damaged"),
        (zlib.compress(KSPACE[0].tobytes()[8:]), "a chunk holds 6,520 bytes, expected 6,528"),
        (zlib.compress(bytes(10**6)), "a chunk's gzip stream is damaged"),  # longer than the chunk
    ],
)
def test_a_damaged_chunk_is_named(tmp_path: Path, packed: bytes, sentence: str) -> None:
    path = write(tmp_path / "a.t5", KSPACE, chunks=SLICE, **GZIP)
    with h5py.File(path, "a") as file:
        file["kspace"].id.write_direct_chunk((1, 0, 0, 0), packed)
    reader = hdf5.Hdf5Reader()
    with pytest.raises(UserError, match=rf"a\.t5: slice 1 of `kspace` cannot be read \({sentence}"):
        reader.read_slice(path, "kspace", 1)
    assert np.array_equal(reader.read_slice(path, "kspace", 2), KSPACE[2])


def test_chunks_that_may_be_raw_although_their_mask_says_nothing_are_left_to_hdf5(tmp_path: Path) -> None:
    cut = np.zeros((2, 2, 24, 17), np.complex64)
    for i, packed, mask in ((4, cut.tobytes(), 0), (0, b"short", 1)):
        path = write(tmp_path / f"{i}.t5", KSPACE, chunks=cut.shape, **GZIP)
        with h5py.File(path, "a") as file:
            file["kspace"].id.write_direct_chunk((i, 0, 0, 0), packed, filter_mask=mask)
        assert find(path) is None
