"""What reading files told is not read again, unless a file or the way it is read has changed."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace, write_repetitions, write_scan
from ml_collections import ConfigDict

from mrjax.config import defaults
from mrjax.data import findings, splits
from mrjax.errors import UserError
from mrjax.io import hdf5, readers
from mrjax.io.hdf5 import Hdf5Reader
from mrjax.io.volume import Volume


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def slices_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of all slices that are read from now on."""
    paths: list[str] = []
    read = Hdf5Reader.read_slice

    def note(self: Hdf5Reader, path: str, *arguments: object) -> np.ndarray:
        paths.append(path)
        return read(self, path, *arguments)

    monkeypatch.setattr(Hdf5Reader, "read_slice", note)
    return paths


def describe(folder: Path, config: ConfigDict | None = None, **fields: object) -> list[Volume]:
    config = config or defaults()
    config.data.update(fields)
    return splits.describe_split(config, readers.find(str(folder)))


def test_a_second_start_reads_only_the_files_that_changed(tmp_path: Path, slices_read: list[str]) -> None:
    kspace = to_kspace(coil_images(3, 2, 32, 32))
    kspace[0] = 0
    hdf5.write(tmp_path / "edge.t5", {"kspace": kspace})
    for number in range(2):
        write_scan(tmp_path / f"{number}_T101.t5", seed=number)
    first = describe(tmp_path)
    assert {Path(path).name for path in slices_read} == {"edge.t5", "0_T101.t5", "1_T101.t5"}
    slices_read.clear()
    assert describe(tmp_path) == first
    assert first[2].empty == (0,)
    assert slices_read == []
    write_scan(tmp_path / "1_T101.t5", seed=5)
    assert describe(tmp_path)[1].maximum != first[1].maximum
    assert {Path(path).name for path in slices_read} == {"1_T101.t5"}


def test_a_target_of_a_parallel_folder_that_changed_is_read_again(tmp_path: Path) -> None:
    kspace = to_kspace(coil_images(3, 2, 32, 32))
    image = rss(coil_images(3, 2, 32, 32))
    for folder, array in (("kspace", kspace), ("image", image)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "0.npy", array)
    (first,) = describe(tmp_path / "kspace")
    np.save(tmp_path / "image" / "0.npy", 2 * image)
    (second,) = describe(tmp_path / "kspace")
    assert second.maximum != first.maximum


@pytest.mark.parametrize("changed", ["mtime", "shifted", "code"])
def test_what_a_finding_depends_on_makes_files_be_read_again(
    changed: str, tmp_path: Path, slices_read: list[str], monkeypatch
) -> None:
    path = write_scan(tmp_path / "0_T101.t5")
    describe(tmp_path)
    slices_read.clear()
    if changed == "mtime":
        os.utime(path, ns=(0, 0))
    if changed == "code":
        monkeypatch.setattr(findings, "_hash_of_sources", lambda: "another")
    if changed == "shifted":
        with pytest.raises(UserError):  # not an image of what is now another k-space
            describe(tmp_path, shifted=True)
    else:
        describe(tmp_path)
    assert slices_read


def test_a_fault_is_looked_for_again_and_the_files_before_it_are_not(tmp_path: Path, slices_read: list[str]) -> None:
    good = write_scan(tmp_path / "0.t5")
    broken = to_kspace(coil_images(3, 2, 32, 32))
    broken[1] = np.nan
    hdf5.write(tmp_path / "1.t5", {"kspace": broken})
    for _ in range(2):
        slices_read.clear()
        with pytest.raises(UserError, match=r"1\.t5: .*NaN"):
            describe(tmp_path)
        assert str(tmp_path / "1.t5") in slices_read
    assert str(good) not in slices_read


def test_repetitions_that_moved_are_known_at_the_second_start(tmp_path: Path, slices_read: list[str], caplog) -> None:
    write_repetitions(tmp_path, size=(64, 64), moved={2: 5})
    config = defaults()
    config.task = "denoise"
    first = describe(tmp_path, config)
    slices_read.clear()
    caplog.clear()
    assert describe(tmp_path, config) == first
    assert [volume.name for volume in first] == ["1_T101", "1_T103"]
    assert "1_T102.h5: moved by about" in caplog.text
    assert slices_read == []


@pytest.mark.parametrize("damage", ["", '{"samples 0.t5": [', "[1, 2]", '{"samples 0.t5": 5, "doubts 0.t5": [1]}'])
def test_a_damaged_cache_is_made_anew(damage: str, tmp_path: Path, slices_read: list[str]) -> None:
    write_scan(tmp_path / "0.t5")
    first = describe(tmp_path)
    (cache,) = Path(os.environ["XDG_CACHE_HOME"]).glob("mrjax/findings/*.json")
    cache.write_text(damage)
    assert describe(tmp_path) == first
    slices_read.clear()
    assert describe(tmp_path) == first
    assert slices_read == []


def test_a_cache_that_cannot_be_written_is_warned_of_and_files_are_read(tmp_path: Path, monkeypatch, caplog) -> None:
    write_scan(tmp_path / "0.t5")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(describe(tmp_path)) == 1
    assert "the next start reads all files again" in caplog.text


def test_many_that_write_at_the_same_time_leave_a_whole_cache(tmp_path: Path, slices_read: list[str]) -> None:
    def describe_often(name: str) -> None:
        for number in range(20):
            write_scan(tmp_path / f"{name}{number}.t5", 1, 1, (16, 16))
            describe(tmp_path / f"{name}{number}.t5")

    with ThreadPoolExecutor() as pool:
        list(pool.map(describe_often, "ab"))
    assert len(describe(tmp_path)) == 40
    slices_read.clear()
    assert len(describe(tmp_path)) == 40
    assert slices_read == []
    assert len(list(Path(os.environ["XDG_CACHE_HOME"]).glob("mrjax/findings/*"))) == 1
