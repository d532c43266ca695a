import concurrent.futures
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, to_kspace, write_scan

from mrjax.data import files, hdf5
from mrjax.data.layout import layout_of
from mrjax.errors import UserError

KSPACE = to_kspace(coil_images(5, 2, 24, 17))
LAYOUTS = {
    "contiguous": {},
    "chunk a slice": {"chunks": (1, 2, 24, 17)},
    "small chunks": {"chunks": (1, 1, 8, 8)},
    "two slices a chunk": {"chunks": (2, 2, 24, 17)},
    "compressed": {"chunks": (1, 2, 24, 17), "compression": "gzip"},
    "checksummed": {"chunks": (1, 2, 24, 17), "fletcher32": True},
    "big endian": {"dtype": ">c8"},
    "double": {"dtype": "c16"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_h5py_reads_it(tmp_path: Path, layout: str) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file.create_dataset("before", data=np.arange(7, dtype=np.int8))
        file.create_dataset("kspace", data=KSPACE, **LAYOUTS[layout])
        direct = layout_of(file["kspace"]) is not None
    assert direct == (layout in ("contiguous", "chunk a slice", "double"))
    reader = files.Files()
    for i in (3, 0, 4):
        assert np.array_equal(reader.read(path, "kspace", i), KSPACE[i])


def test_numbers_padded_in_the_file_are_left_to_hdf5(tmp_path: Path) -> None:
    path = str(tmp_path / "a.t5")
    kind = h5py.h5t.create(h5py.h5t.COMPOUND, 16)
    kind.insert(b"r", 0, h5py.h5t.IEEE_F32LE)
    kind.insert(b"i", 8, h5py.h5t.IEEE_F32LE)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(KSPACE.shape)
        data = h5py.h5d.create(file.id, b"kspace", kind, space)
        data.write(h5py.h5s.ALL, h5py.h5s.ALL, KSPACE)
    assert np.array_equal(files.Files().read(path, "kspace", 2), KSPACE[2])
    with pytest.raises(UserError, match="slice 0 of `none` cannot be read"):
        files.Files().read(path, "none", 0)


def test_slices_never_written_are_zero_as_in_hdf5(tmp_path: Path) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", (3, 4, 4), "c8", chunks=(1, 4, 4))[1] = 1
        file.create_dataset("empty", (3, 4, 4), "c8")
    reader = files.Files()
    assert [reader.read(path, "kspace", i).sum() for i in range(3)] == [0, 16, 0]
    assert not reader.read(path, "empty", 2).any()


def test_threads_read_alike_through_few_handles_that_do_not_travel(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.t5") for i in range(6)]
    for number, path in enumerate(paths):
        with h5py.File(path, "w") as file:
            file.create_dataset("kspace", data=number * KSPACE, compression="gzip" if number % 2 else None)
    reader = files.Files(most=2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: reader.read(paths[i % 6], "kspace", i % 5), range(60)))
    assert all(np.array_equal(x, i % 6 * KSPACE[i % 5]) for i, x in enumerate(read))
    assert len(reader._open) == 2
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy.read(paths[1], "kspace", 0), KSPACE[0])


def test_what_a_description_knows_of_a_file_is_read_without_hdf5(tmp_path: Path) -> None:
    path = str(write_scan(tmp_path / "a.t5", slices=4))
    reader = pickle.loads(pickle.dumps(files.Files({(path, name): lie for name, lie in hdf5.describe(path).layouts})))
    for name in ("kspace", "reconstruction_rss"):
        assert np.array_equal(reader.read(path, name, 2), hdf5.read(path, name)[2])
    assert not reader._open


def test_a_file_cut_short_while_training_is_named(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.t5", slices=4)
    reader = files.Files()
    assert np.array_equal(reader.read(str(path), "kspace", 3), hdf5.read(str(path), "kspace")[3])
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"a\.t5: slice 3 of `kspace` cannot be read"):
        reader.read(str(path), "kspace", 3)
