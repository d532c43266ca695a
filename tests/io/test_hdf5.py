"""The .t5 file: every HDF5 layout reads as h5py reads it, whole or not at all."""

import concurrent.futures
import functools
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, read_array, to_kspace, write_scan

from mrjax.errors import UserError
from mrjax.io import hdf5, readers

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


def test_describe_tells_layout_shape_target_and_contrast(tmp_path: Path) -> None:
    volume = readers.describe(str(write_scan(tmp_path / "1_T201.h5", 3, 4, (32, 48))))
    assert (volume.layout, volume.shape, volume.target) == ("kspace", (3, 4, 32, 48), "reconstruction_rss")
    assert (volume.contrast, volume.image_shape, volume.undersampled) == ("T1", (32, 48), False)


def test_single_coil_kspace_gains_a_coil_axis(tmp_path: Path) -> None:
    hdf5.write(tmp_path / "x_GRE01.t5", {"kspace": to_kspace(coil_images(2, 1, 16, 16))[:, 0]})
    volume = readers.describe(str(tmp_path / "x_GRE01.t5"))
    assert volume.shape == (2, 1, 16, 16)
    assert volume.contrast == "GRE"


def test_write_is_chunked_by_slice_and_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.t5")
    with h5py.File(path) as file:
        assert file["kspace"].chunks == (1, *file["kspace"].shape[1:])
        assert file["kspace"].compression is None
    before = path.read_bytes()
    with pytest.raises(TypeError):
        hdf5.write(path, {"kspace": np.zeros((2, 4, 4)), "broken": object()})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.t5"]


def test_a_damaged_attribute_is_a_fault_and_no_traceback(tmp_path: Path) -> None:
    for number, value in enumerate(("high", np.zeros(0))):
        path = write_scan(tmp_path / f"{number}.t5")
        with h5py.File(path, "a") as file:
            file.attrs["max"] = value
        with pytest.raises(UserError, match=rf"{number}\.t5: is damaged"):
            readers.describe(str(path))


@pytest.mark.peer
def test_fastmri_reads_our_files(tmp_path: Path) -> None:
    from fastmri import data

    path = write_scan(tmp_path / "scan.t5", 3, 4, (32, 48))
    dataset = data.SliceDataset(root=tmp_path, challenge="multicoil")
    kspace, mask, target, attributes, name, number = dataset[2]
    assert len(dataset) == 3
    assert np.array_equal(kspace, read_array(path, "kspace")[2])
    assert np.array_equal(target, read_array(path, "reconstruction_rss")[2])
    assert (mask, name, number) == (None, "scan.t5", 2)
    assert attributes["encoding_size"] == (32, 48, 1)
    assert (attributes["padding_left"], attributes["padding_right"]) == (0, 48)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_every_hdf5_layout_are_read_as_by_h5py(tmp_path: Path, layout: str) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file.create_dataset("before", data=np.arange(7, dtype=np.int8))
        file.create_dataset("kspace", data=KSPACE, **LAYOUTS[layout])
        direct = hdf5.find_chunks(file["kspace"], path, 0) is not None
    assert direct == (layout not in ("two slices a chunk", "checksummed"))
    reader = hdf5.Hdf5Reader()
    for i in (3, 0, 4):
        assert np.array_equal(reader.read_slice(path, "kspace", i), KSPACE[i])


def test_compound_types_padded_in_the_file_are_read_by_hdf5(tmp_path: Path) -> None:
    path = str(tmp_path / "a.t5")
    kind = h5py.h5t.create(h5py.h5t.COMPOUND, 16)
    kind.insert(b"r", 0, h5py.h5t.IEEE_F32LE)
    kind.insert(b"i", 8, h5py.h5t.IEEE_F32LE)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(KSPACE.shape)
        data = h5py.h5d.create(file.id, b"kspace", kind, space)
        data.write(h5py.h5s.ALL, h5py.h5s.ALL, KSPACE)
    assert np.array_equal(hdf5.Hdf5Reader().read_slice(path, "kspace", 2), KSPACE[2])
    with pytest.raises(UserError, match="slice 0 of `none` cannot be read"):
        hdf5.Hdf5Reader().read_slice(path, "none", 0)


def write_as(path: str, stored: h5py.h5t.TypeID, data: np.ndarray) -> None:
    """Write the data set `kspace` as a type of HDF5's own."""
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(data.shape)
        h5py.h5d.create(file.id, b"kspace", stored, space).write(h5py.h5s.ALL, h5py.h5s.ALL, data)


def test_an_imaginary_part_stored_first_and_integers_of_few_bits_are_read_by_hdf5(tmp_path: Path) -> None:
    swapped = h5py.h5t.create(h5py.h5t.COMPOUND, 8)
    swapped.insert(b"r", 4, h5py.h5t.IEEE_F32LE)
    swapped.insert(b"i", 0, h5py.h5t.IEEE_F32LE)
    write_as(str(tmp_path / "swapped.t5"), swapped, KSPACE)
    assert np.array_equal(hdf5.Hdf5Reader().read_slice(str(tmp_path / "swapped.t5"), "kspace", 2), KSPACE[2])
    twelve_bits = h5py.h5t.STD_U16LE.copy()
    twelve_bits.set_precision(12)
    twelve_bits.set_offset(4)
    numbers = np.arange(5 * 6, dtype=np.uint16).reshape(5, 2, 3)
    write_as(str(tmp_path / "bits.t5"), twelve_bits, numbers)
    assert np.array_equal(hdf5.Hdf5Reader().read_slice(str(tmp_path / "bits.t5"), "kspace", 4), numbers[4])


def test_a_link_into_another_file_reads_that_file(tmp_path: Path) -> None:
    write_scan(tmp_path / "raw.t5", seed=1)
    path = str(write_scan(tmp_path / "a.t5", seed=2))
    with h5py.File(path, "a") as file:
        del file["kspace"]
        file["kspace"] = h5py.ExternalLink("raw.t5", "kspace")
    readers.describe(path)
    read = readers.reader_for(path).read_slice(path, "kspace", 1)
    assert np.array_equal(read, read_array(tmp_path / "raw.t5", "kspace")[1])


def test_a_file_replaced_since_it_was_described_is_named(tmp_path: Path) -> None:
    path = str(write_scan(tmp_path / "a.t5", seed=1))
    reader = hdf5.Hdf5Reader()
    reader.describe(path)
    write_scan(tmp_path / "a.t5", seed=2)
    with pytest.raises(UserError, match=r"a\.t5: slice 1 of `kspace` cannot be read \(the file was replaced"):
        reader.read_slice(path, "kspace", 1)
    reader.describe(path)
    assert np.array_equal(reader.read_slice(path, "kspace", 1), read_array(path, "kspace")[1])


def test_slices_never_written_are_zero_as_in_hdf5(tmp_path: Path) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", (3, 4, 4), "c8", chunks=(1, 4, 4))[1] = 1
        file.create_dataset("empty", (3, 4, 4), "c8")
    reader = hdf5.Hdf5Reader()
    assert [reader.read_slice(path, "kspace", i).sum() for i in range(3)] == [0, 16, 0]
    assert not reader.read_slice(path, "empty", 2).any()


def test_threads_read_through_few_open_files_which_are_not_pickled(tmp_path: Path, monkeypatch) -> None:
    paths = [str(tmp_path / f"{i}.t5") for i in range(6)]
    for number, path in enumerate(paths):
        with h5py.File(path, "w") as file:
            file.create_dataset("kspace", data=number * KSPACE, fletcher32=bool(number % 2))
    few = functools.lru_cache(maxsize=2)(hdf5.open_file)
    monkeypatch.setattr(hdf5, "_open", few)
    reader = hdf5.Hdf5Reader()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: reader.read_slice(paths[i % 6], "kspace", i % 5), range(60)))
    assert all(np.array_equal(x, i % 6 * KSPACE[i % 5]) for i, x in enumerate(read))
    assert few.cache_info().currsize == 2
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy.read_slice(paths[1], "kspace", 0), KSPACE[0])


def test_slices_of_a_described_file_are_read_without_hdf5(tmp_path: Path, monkeypatch) -> None:
    path = str(write_scan(tmp_path / "a.t5", slices=4))
    described = hdf5.Hdf5Reader()
    described.describe(path)
    reader = pickle.loads(pickle.dumps(described))
    monkeypatch.setattr(hdf5, "open_file", lambda path: pytest.fail("opened with HDF5"))
    slices = {name: reader.read_slice(path, name, 2) for name in ("kspace", "reconstruction_rss")}
    monkeypatch.undo()
    assert all(np.array_equal(data, read_array(path, name)[2]) for name, data in slices.items())


def test_a_file_truncated_while_training_is_named(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.t5", slices=4)
    reader = hdf5.Hdf5Reader()
    assert np.array_equal(reader.read_slice(str(path), "kspace", 3), read_array(path, "kspace")[3])
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"a\.t5: slice 3 of `kspace` cannot be read"):
        reader.read_slice(str(path), "kspace", 3)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_file_written_anew_is_read_anew_after_it_is_described(tmp_path: Path, compression) -> None:
    path, reader = str(tmp_path / "a.t5"), hdf5.Hdf5Reader()
    for factor, title in ((1, "x"), (2, "x" * 5000)):
        (tmp_path / "a.t5").unlink(missing_ok=True)
        with h5py.File(path, "w") as file:
            file.attrs["title"] = title
            file.create_dataset("kspace", data=factor * KSPACE, chunks=(1, 2, 24, 17), compression=compression)
        reader.describe(path)
        assert np.array_equal(reader.read_slice(path, "kspace", 1), factor * KSPACE[1])


def test_write_keeps_the_header_and_the_other_attributes(tmp_path: Path) -> None:
    source = write_scan(tmp_path / "a.t5")
    result = {"reconstruction": np.ones((3, 4, 4))}
    hdf5.Hdf5Reader().write(tmp_path / "b.t5", result, {"max": 1.0}, readers.describe(str(source)))
    with h5py.File(source) as old, h5py.File(tmp_path / "b.t5") as new:
        assert sorted(new) == ["ismrmrd_header", "reconstruction"]
        assert new["ismrmrd_header"][()] == old["ismrmrd_header"][()]
        assert dict(new.attrs) == {**old.attrs, "max": 1.0}
