"""What an HDF5 file claims is not believed: no file out of its folder is opened, no memory taken for nothing."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, to_kspace

from mrjax import check
from mrjax.errors import UserError
from mrjax.io import hdf5_contents, readers

KSPACE = to_kspace(coil_images(3, 2, 16, 12))


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    """A file beside the folder of the scan; who opens it waits for ever."""
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "scans").mkdir()
    return "../pipe.h5"


def link_directly(file: h5py.File, pipe: str) -> None:
    file["kspace"] = h5py.ExternalLink(pipe, "kspace")


def link_a_group(file: h5py.File, pipe: str) -> None:
    file["away"] = h5py.ExternalLink(pipe, "/")
    file["kspace"] = h5py.SoftLink("/away/kspace")


def link_by_a_neighbour(file: h5py.File, pipe: str) -> None:
    with h5py.File(Path(file.filename).with_name("b.t5"), "w") as other:
        other["kspace"] = h5py.ExternalLink(pipe, "kspace")
    file["kspace"] = h5py.ExternalLink("b.t5", "kspace")


def link_by_the_file_system(file: h5py.File, pipe: str) -> None:
    Path(file.filename).with_name("b.t5").symlink_to(pipe)
    file["kspace"] = h5py.ExternalLink("b.t5", "kspace")


def store_outside(file: h5py.File, pipe: str) -> None:
    file.create_dataset("kspace", KSPACE.shape, "c8", external=[(str(Path(file.filename).parent / pipe), 0, 10**6)])


def compose_from_outside(file: h5py.File, pipe: str) -> None:
    layout = h5py.VirtualLayout(KSPACE.shape, "c8")
    layout[:] = h5py.VirtualSource(pipe, "kspace", KSPACE.shape, "c8")
    file.create_virtual_dataset("kspace", layout)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (link_directly, r"links to `kspace` of \.\./pipe\.h5, expected links to files in its own folder alone"),
        (link_a_group, r"has no data set `kspace`"),
        (link_by_a_neighbour, r"b\.t5: has no data set `kspace`, expected the one that another file links to"),
        (link_by_the_file_system, r"links to `kspace` of b\.t5, expected"),
        (store_outside, r"`kspace` has its samples in other files"),
        (compose_from_outside, r"`kspace` has its samples in other files"),
    ],
)
def test_no_file_outside_the_folder_is_opened(
    tmp_path: Path, pipe: str, write: Callable[[h5py.File, str], None], sentence: str
) -> None:
    path = str(tmp_path / "scans" / "a.t5")
    with h5py.File(path, "w", libver="latest") as file:
        write(file, pipe)
    with pytest.raises(UserError, match=sentence):
        readers.describe(path, "kspace")
    with pytest.raises(UserError):
        readers.reader_for(path).read_slice(path, "kspace", 0)


def test_a_soft_link_within_the_file_is_followed(tmp_path: Path) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file["scan/raw"] = KSPACE
        file["kspace"] = h5py.SoftLink("/scan/raw")
        file["loop"] = h5py.SoftLink("/loop")
    readers.describe(path)
    assert np.array_equal(readers.read_slices(path, "kspace", 3), KSPACE)


def test_circles_of_groups_end_and_neither_depth_nor_number_is_unlimited(tmp_path: Path, monkeypatch) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file["group/kspace"] = KSPACE
        file["group/self"], file["group/up"] = file["group"], file["/"]
        assert hdf5_contents.find_data_sets(file, path).keys() == {"group/kspace"}
        group = file
        for _ in range(2000):  # HDF5's own visit of these is a recursion
            group = group.create_group("g")
        with pytest.raises(UserError, match="nests more than 32 groups"):
            hdf5_contents.find_data_sets(file, path)
        monkeypatch.setattr(hdf5_contents, "MAX_OBJECTS", 3)
        with pytest.raises(UserError, match="holds more than 3 objects"):
            hdf5_contents.find_data_sets(file, path)


@pytest.mark.parametrize(
    ("shape", "chunks", "sentence"),
    [
        ((3, 2, 2**20, 2**20), (1, 1, 16, 16), "claims .* bytes a slice or chunk in a file of"),
        ((2**40, 1, 16, 16), (1, 1, 16, 16), "takes .* bytes to be read from a file of"),
        ((64, 1, 2048, 2048), (64, 1, 2048, 2048), "claims .* bytes a slice or chunk in a file of"),
        ((20, 1, 1024, 1024), (1, 1, 1, 1), "takes .* bytes to be read from a file of"),
        ((2**30, 1, 1, 1), None, "takes .* bytes to be read from a file of"),
    ],
)
def test_claims_beyond_what_a_file_can_hold_are_refused(tmp_path: Path, shape, chunks, sentence: str) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", shape, "c8", chunks=chunks)
    assert check.check([path])[0] == []
    with pytest.raises(UserError, match=f"`kspace` {sentence}"):
        readers.describe(path)


def test_a_slice_beyond_the_memory_there_is_gets_a_sentence(tmp_path: Path, monkeypatch) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file["kspace"] = KSPACE
    monkeypatch.setattr(hdf5_contents, "available_memory", lambda: 8 * KSPACE[0].nbytes)
    readers.describe(path)
    monkeypatch.setattr(hdf5_contents, "available_memory", lambda: 8 * KSPACE[0].nbytes - 1)
    with pytest.raises(
        UserError, match="claims 3,072 bytes a slice or chunk, expected at most 3,071, for want of memory"
    ):
        readers.describe(path)


def test_memory_that_runs_out_is_a_fault_of_the_file(tmp_path: Path, monkeypatch) -> None:
    path = str(tmp_path / "a.t5")
    with h5py.File(path, "w") as file:
        file["kspace"] = KSPACE
    monkeypatch.setattr(check.checks, "check", lambda volume: np.empty(2**50))
    assert "takes more memory than there is" in check.check([path])[1][0]


def test_a_chunk_that_inflates_beyond_itself_is_refused_and_one_left_uncompressed_read(tmp_path: Path) -> None:
    honest, bomb = str(tmp_path / "honest.t5"), str(tmp_path / "bomb.t5")
    large = np.random.default_rng(0).normal(size=(2, 1, 512, 512)).astype(np.complex64)
    for path, packed in ((honest, zlib.compress(large[1])), (bomb, zlib.compress(bytes(2**26), 1))):
        with h5py.File(path, "w") as file:
            data = file.create_dataset("kspace", large.shape, "c8", chunks=(1, *large.shape[1:]), compression="gzip")
            data.id.write_direct_chunk((0, 0, 0, 0), large[0].tobytes(), filter_mask=1)
            data.id.write_direct_chunk((1, 0, 0, 0), packed)
    readers.describe(honest)
    assert np.array_equal(readers.read_slices(honest, "kspace", 2), large)
    with pytest.raises(UserError, match="`kspace` has a chunk whose gzip stream holds more than the chunk"):
        readers.describe(bomb)


def test_a_filter_that_is_not_installed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.t5"
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=KSPACE, compression="gzip")
    data = path.read_bytes()
    place = data.index(b"deflate") - 8
    path.write_bytes(data[:place] + (32015).to_bytes(2, "little") + data[place + 2 :])
    with pytest.raises(UserError, match=r"compressed by the HDF5 filter 32015 \(deflate\), which is not installed"):
        readers.describe(str(path))
