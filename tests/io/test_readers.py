"""Files are found in every registered format, and a format from outside the package trains like HDF5."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import coil_images, read_array, to_kspace, write_scan
from test_loader import describe

from mrjax.data import checks, loader
from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.io import hdf5, readers
from mrjax.io.storage import NATIVE, Storage
from mrjax.io.volume import Volume, describe_arrays


def test_find_takes_a_folder_a_glob_a_file_or_a_list(tmp_path: Path) -> None:
    paths = [str(write_scan(tmp_path / name)) for name in ("a.t5", "sub/b.h5", "sub/c.hdf5")]
    (tmp_path / "notes.txt").write_text("no volume")
    assert readers.find(str(tmp_path)) == paths
    assert readers.find(str(tmp_path / "sub" / "*.h*")) == paths[1:]
    assert readers.find([paths[2], str(tmp_path / "a.t5")]) == [paths[0], paths[2]]
    for nothing in (tmp_path / "nowhere", tmp_path / "*.x"):
        with pytest.raises(UserError, match="no such file or folder"):
            readers.find(str(nothing))


class NpyFolderReader:
    """A format from outside the package: a folder `<name>.npyd` with a .npy file for each array, hidden."""

    suffixes: tuple[str, ...] = (".npyd",)
    image_suffix = ".npyd"

    def recognises(self, path: str, start: bytes) -> bool:
        return path.endswith(".npyd")

    def group(self, paths: list[str]) -> list[str]:
        return paths

    def describe(self, path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
        arrays = {file.stem[1:]: np.load(file, mmap_mode="r") for file in Path(path).glob(".*.npy")}
        return describe_arrays(path, arrays, {}, layout, storage)

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        return np.load(Path(path) / f".{name}.npy", mmap_mode="r")[index]

    def write(
        self,
        path: Path,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, Any],
        source: Volume,
        keep_identity: bool = False,
    ) -> None:
        path.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(path / f".{name}.npy", array)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_reader_from_outside_the_package_gives_the_batches_of_hdf5(scans: Path, monkeypatch, workers: int) -> None:
    monkeypatch.setitem(readers.READERS, "npy", NpyFolderReader())
    (scans / "npy").mkdir()
    for path in readers.find(str(scans / "train")):
        arrays = {name: read_array(path, name) for name in ("kspace", "reconstruction_rss")}
        reader = readers.READERS["npy"]
        reader.write(scans / "npy" / f"{Path(path).stem}.npyd", arrays, {}, readers.describe(path))
    streams = []
    for folder, count in (("train", 0), ("npy", workers)):
        volumes = describe(scans / folder)
        options = loader.LoaderOptions(4, count)
        with loader.training_batches([SliceDataset(volumes, (32, 32))], options, seed=0, start=0) as batches:
            streams.append([next(batches) for _ in range(4)])
    assert [volume.name for volume in volumes] == ["0_T101", "1_T101", "2_T101"]
    for one, other in zip(*streams, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    folder = readers.find(str(scans / "npy"))[0]
    assert readers.find(folder) == [folder]
    broken = read_array(scans / "train" / "0_T101.t5", "kspace")
    broken[1, 0, 5, 5] = np.nan
    np.save(Path(folder) / ".kspace.npy", broken)
    assert "NaN or Inf in slice 1" in checks.check(readers.describe(folder))[1][0]


def test_files_in_linked_folders_are_found(tmp_path: Path) -> None:
    file = write_scan(tmp_path / "elsewhere" / "a.t5")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "site1").symlink_to(file.parent, target_is_directory=True)
    (tmp_path / "data" / ".hidden.t5").touch()
    assert readers.find(str(tmp_path / "data")) == [str(tmp_path / "data" / "site1" / "a.t5")]


def test_a_file_of_an_unknown_suffix_is_read_as_hdf5(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "scan.dat")
    assert readers.find(str(path)) == [str(path)]
    assert readers.describe(str(path)).layout == "kspace"
    (tmp_path / "notes.txt").write_text("no volume" * 100)
    with pytest.raises(UserError, match="is not an HDF5 file"):
        readers.describe(str(tmp_path / "notes.txt"))


def test_all_slices_of_an_array_are_stacked(tmp_path: Path) -> None:
    kspace = to_kspace(coil_images(3, 2, 16, 16))
    hdf5.write(tmp_path / "a.t5", {"kspace": kspace})
    assert np.array_equal(readers.read_slices(str(tmp_path / "a.t5"), "kspace", 3), kspace)


def test_linked_folders_are_found_once_and_circles_of_links_end(tmp_path: Path) -> None:
    write_scan(tmp_path / "elsewhere" / "b.t5")
    scan = write_scan(tmp_path / "scans" / "a.t5")
    for name in ("again", "another", "third"):
        (scan.parent / name).symlink_to(scan.parent)
    (scan.parent / "linked").symlink_to(tmp_path / "elsewhere")
    assert readers.find(str(scan.parent)) == [str(scan), str(scan.parent / "linked" / "b.t5")]


def test_files_count_by_their_contents_and_not_their_names(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scans" / "a.t5")
    scan.rename(tmp_path / "scans" / "IM0001")
    (tmp_path / "scans" / "notes").write_text("no volume")
    os.mkfifo(tmp_path / "scans" / "pipe")
    assert readers.find(str(tmp_path / "scans")) == [str(tmp_path / "scans" / "IM0001")]


def test_the_affine_of_a_file_is_read_and_checked(tmp_path: Path) -> None:
    affine = np.diag([0.5, 0.5, 4, 1])
    hdf5.write(tmp_path / "a.t5", {"reconstruction": np.ones((2, 8, 8))}, {"affine": affine})
    source = readers.describe(str(tmp_path / "a.t5"))
    readers.READERS["hdf5"].write(tmp_path / "b.t5", {"reconstruction": np.ones((2, 8, 8))}, {}, source)
    found = readers.describe(str(tmp_path / "b.t5")).affine
    assert found is not None
    assert np.array_equal(found, affine)
    hdf5.write(tmp_path / "c.t5", {"reconstruction": np.ones((2, 8, 8))}, {"affine": affine[0]})
    with pytest.raises(UserError, match=r"attribute affine is float64 of shape \(4,\), expected finite numbers"):
        readers.describe(str(tmp_path / "c.t5"))
