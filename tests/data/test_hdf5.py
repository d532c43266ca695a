import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace, write_pair, write_scan

from mrjax import check
from mrjax.data import hdf5
from mrjax.errors import UserError


def test_describe_reads_what_a_scan_holds(tmp_path: Path) -> None:
    volume = hdf5.describe(str(write_scan(tmp_path / "1_T201.h5", 3, 4, (32, 48))))
    assert (volume.layout, volume.shape, volume.target) == ("kspace", (3, 4, 32, 48), "reconstruction_rss")
    assert (volume.contrast, volume.image_shape, volume.undersampled) == ("T1", (32, 48), False)


def test_single_coil_kspace_gains_a_coil_axis(tmp_path: Path) -> None:
    hdf5.write(tmp_path / "x_GRE01.t5", {"kspace": to_kspace(coil_images(2, 1, 16, 16))[:, 0]})
    volume = hdf5.describe(str(tmp_path / "x_GRE01.t5"))
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


def bad_files(folder: Path) -> dict[str, str]:
    """Faulty files, with a word that their fault must name."""
    good = write_scan(folder / "good.t5")
    images = coil_images(3, 2, 32, 32)
    kspace, image = to_kspace(images), rss(images)
    (folder / "text.t5").write_text("not an HDF5 file " * 50)
    (folder / "truncated.t5").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "empty.t5").write_bytes(b"")
    broken, holes = kspace.copy(), kspace.copy()
    broken[1, 0, 5, 5], holes[2] = np.nan, 0
    arrays = {
        "without": {"reconstruction_rss": image},
        "nan": {"kspace": broken, "reconstruction_rss": image},
        "zeros": {"kspace": holes},
        "integer": {"kspace": np.ones((3, 2, 32, 32), np.int16)},
        "flat": {"kspace": kspace[0, 0]},
        "fewer": {"kspace": kspace, "reconstruction_rss": image[:2]},
        "other": {"kspace": kspace, "reconstruction_rss": np.random.default_rng(0).random(image.shape)},
        "pair": {"input": image, "target": image[:, :16]},
        "infinite": {"input": image, "target": np.where(image > 1, np.inf, image)},
    }
    for name, data in arrays.items():
        hdf5.write(folder / f"{name}.t5", data)
    words = {"text": "not an HDF5 file", "truncated": "truncated", "empty": "empty", "without": "no data set `kspace`"}
    words |= {"nan": "NaN or Inf in slice 1", "zeros": "zeros in slice 2", "integer": "int16", "flat": "(32, 32)"}
    words |= {
        "fewer": "(2, 32, 32)",
        "other": "not an image of `kspace`",
        "pair": "(3, 16, 32)",
        "infinite": "NaN or Inf",
    }
    return words


def test_check_names_every_fault_in_one_sentence_and_passes_good_files(tmp_path: Path) -> None:
    for name, word in bad_files(tmp_path).items():
        _, faults = check.check([str(tmp_path / f"{name}.t5")])
        assert len(faults) == 1, (name, faults)
        assert faults[0].startswith(str(tmp_path / f"{name}.t5"))
        assert word in faults[0]
        assert "\n" not in faults[0]
    pair = write_pair(tmp_path / "pair64.t5", dtype="f8")
    assert check.check([str(tmp_path / "good.t5"), str(pair)])[1] == []


def test_a_maximum_in_other_units_than_the_kspace_is_not_known(tmp_path: Path) -> None:
    images = coil_images(3, 2, 32, 32)
    for scale in (1, 1000):
        image = scale * rss(images)
        arrays = {"kspace": to_kspace(images), "reconstruction_rss": image}
        hdf5.write(tmp_path / "a.t5", arrays, {"max": image.max()})
        volume, faults = hdf5.check(hdf5.describe(str(tmp_path / "a.t5")))
        assert faults == []
        assert volume.maximum == (pytest.approx(image.max()) if scale == 1 else None)


def test_a_damaged_attribute_is_a_fault_and_no_traceback(tmp_path: Path) -> None:
    for number, value in enumerate(("high", np.zeros(0))):
        path = write_scan(tmp_path / f"{number}.t5")
        with h5py.File(path, "a") as file:
            file.attrs["max"] = value
        with pytest.raises(UserError, match=rf"{number}\.t5: is damaged"):
            hdf5.describe(str(path))


def test_check_command_ends_with_1_and_no_traceback_when_a_file_is_faulty(tmp_path: Path) -> None:
    bad_files(tmp_path)
    command = [sys.executable, "-m", "mrjax.check"]
    bad = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    good = subprocess.run([*command, str(tmp_path / "good.t5")], capture_output=True, text=True)
    assert (bad.returncode, good.returncode) == (1, 0)
    assert "Traceback" not in bad.stderr
    assert "reconstruction_rss" in good.stdout


def test_kspace_with_columns_left_out_is_undersampled_but_unmeasured_edges_are_not(tmp_path: Path) -> None:
    kspace = to_kspace(coil_images(2, 2, 32, 32))
    edges, gaps = kspace.copy(), kspace.copy()
    edges[..., :4], gaps[..., 3::4] = 0, 0
    for name, data in {"edges": edges, "gaps": gaps}.items():
        hdf5.write(tmp_path / f"{name}.t5", {"kspace": data})
        volume, faults = hdf5.check(hdf5.describe(str(tmp_path / f"{name}.t5")))
        assert faults == []
        assert volume.undersampled == (name == "gaps")


def test_find_takes_a_folder_a_glob_a_file_or_a_list(tmp_path: Path) -> None:
    paths = [str(write_scan(tmp_path / name)) for name in ("a.t5", "sub/b.h5", "sub/c.hdf5")]
    (tmp_path / "notes.txt").write_text("no volume")
    assert hdf5.find(str(tmp_path)) == paths
    assert hdf5.find(str(tmp_path / "sub" / "*.h*")) == paths[1:]
    assert hdf5.find([paths[2], str(tmp_path / "a.t5")]) == [paths[0], paths[2]]
    for nothing in (tmp_path / "nowhere", tmp_path / "*.x"):
        with pytest.raises(UserError, match="no such file or folder"):
            hdf5.find(str(nothing))


def test_fastmri_reads_our_files(tmp_path: Path) -> None:
    data = pytest.importorskip("fastmri.data")
    path = write_scan(tmp_path / "scan.t5", 3, 4, (32, 48))
    dataset = data.SliceDataset(root=tmp_path, challenge="multicoil")
    kspace, mask, target, attributes, name, number = dataset[2]
    assert len(dataset) == 3
    assert np.array_equal(kspace, hdf5.read(str(path), "kspace")[2])
    assert np.array_equal(target, hdf5.read(str(path), "reconstruction_rss")[2])
    assert (mask, name, number) == (None, "scan.t5", 2)
    assert attributes["encoding_size"] == (32, 48, 1)
    assert (attributes["padding_left"], attributes["padding_right"]) == (0, 48)
