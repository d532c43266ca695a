"""Faulty files are named in one sentence each, and what only the samples tell is found."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, coil_images, read_example, rss, to_kspace, write_pair, write_scan

from mrjax import check
from mrjax.data import checks
from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.io import hdf5, readers
from mrjax.io.storage import Storage

MEASURED = ROOT.parent / "shared" / "data"


def bad_files(folder: Path) -> dict[str, str]:
    """Faulty files, with a word that their fault must name."""
    good = write_scan(folder / "good.t5")
    images = coil_images(3, 2, 32, 32)
    kspace, image = to_kspace(images), rss(images)
    (folder / "text.t5").write_text("not an HDF5 file " * 50)
    (folder / "truncated.t5").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "empty.t5").write_bytes(b"")
    broken = kspace.copy()
    broken[1, 0, 5, 5] = np.nan
    arrays = {
        "without": {"reconstruction_rss": image},
        "nan": {"kspace": broken, "reconstruction_rss": image},
        "zeros": {"kspace": 0 * kspace},
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
    words |= {
        "nan": "NaN or Inf in slice 1",
        "zeros": "zeros in slices 0",
        "integer": "int16",
        "flat": "(32, 32)",
    }
    words |= {
        "fewer": "(2, 32, 32)",
        "other": "not an image of `kspace`",
        "pair": "(3, 16, 32)",
        "infinite": "NaN or Inf",
    }
    return words


def test_check_names_every_fault_in_one_sentence_and_passes_good_files(tmp_path: Path) -> None:
    for name, word in bad_files(tmp_path).items():
        _, faults, _ = check.check([str(tmp_path / f"{name}.t5")])
        assert len(faults) == 1, (name, faults)
        assert faults[0].startswith(str(tmp_path / f"{name}.t5"))
        assert word in faults[0]
        assert "\n" not in faults[0]
    pair = write_pair(tmp_path / "pair64.t5", dtype="f8")
    assert check.check([str(tmp_path / "good.t5"), str(pair)])[1:] == ([], [])


def test_a_maximum_in_other_units_than_the_kspace_is_not_known(tmp_path: Path) -> None:
    images = coil_images(3, 2, 32, 32)
    for scale in (1, 1000):
        image = scale * rss(images)
        arrays = {"kspace": to_kspace(images), "reconstruction_rss": image}
        hdf5.write(tmp_path / "a.t5", arrays, {"max": image.max()})
        volume, faults = checks.check(readers.describe(str(tmp_path / "a.t5")))
        assert faults == []
        assert volume.maximum == (pytest.approx(image.max()) if scale == 1 else None)


def columns_left_out(measured: np.ndarray) -> None:
    measured[:, 3::4] = False


def rows_left_out(measured: np.ndarray) -> None:
    measured[3::4] = False


def samples_left_out(measured: np.ndarray) -> None:
    measured &= np.random.default_rng(0).random(measured.shape) < 0.12
    measured[12:20, 12:20] = True


def partial_fourier(measured: np.ndarray) -> None:
    measured[:, :10] = False


def partial_echo(measured: np.ndarray) -> None:
    measured[:8] = False


def padding(measured: np.ndarray) -> None:
    measured[:, :3] = measured[:, -2:] = measured[:2] = False


def corners(measured: np.ndarray) -> None:
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    measured &= y**2 + x**2 <= 1


LEFT_OUT = (columns_left_out, rows_left_out, samples_left_out, partial_fourier, partial_echo)


@pytest.mark.parametrize("leave_out", [*LEFT_OUT, padding, corners])
def test_kspace_with_samples_left_out_is_recognised_and_what_a_scanner_never_measures_is_not(
    tmp_path: Path, leave_out
) -> None:
    measured = np.ones((32, 32), bool)
    leave_out(measured)
    hdf5.write(tmp_path / "a.t5", {"kspace": to_kspace(coil_images(3, 2, 32, 32)) * measured})
    volume, faults = checks.check(readers.describe(str(tmp_path / "a.t5")))
    assert (volume.undersampled, faults) == (leave_out in LEFT_OUT, [])
    table = check.format_table([volume])
    assert ("undersampled" in table) == volume.undersampled


@pytest.mark.parametrize("shape", [(32,), (1, 32), (28, 32), (3, 32), (3, 28, 32)])
def test_stored_masks_of_every_shape_are_applied_slice_by_slice(tmp_path: Path, shape: tuple[int, ...]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.5
    kspace = to_kspace(coil_images(3, 2, 28, 32))
    hdf5.write(tmp_path / "a.t5", {"kspace": kspace, "mask": mask.astype(np.float32)})
    dataset = SliceDataset([readers.describe(str(tmp_path / "a.t5"))], (28, 32))
    by_slice = {(3, 32): mask[:, None]}.get(shape, mask if len(shape) == 3 else [mask] * 3)
    for i in range(3):
        assert np.array_equal(read_example(dataset, i)["kspace"], np.where(by_slice[i], kspace[i], 0))
    hdf5.write(tmp_path / "b.t5", {"kspace": kspace, "mask": np.ones((3, 7))})
    with pytest.raises(
        UserError, match=r"`mask` has shape \(3, 7\), expected \(32,\), a value per column, or \(28, 32\)"
    ):
        readers.describe(str(tmp_path / "b.t5"))


@pytest.mark.skipif(not (MEASURED / "brain_8coils_poisson8x.npy").exists(), reason="the real measurement is not here")
def test_a_real_poisson_disc_scan_is_no_ground_truth() -> None:
    path, storage = str(MEASURED / "brain_8coils_poisson8x.npy"), Storage(axes="coils,height,width")
    volume, faults = checks.check(readers.describe(path, storage=storage))
    assert (volume.coils, volume.undersampled, faults) == (8, True, [])


def test_a_slice_that_cannot_be_read_is_a_fault_and_other_files_are_checked(tmp_path: Path, capsys) -> None:
    np.savez_compressed(tmp_path / "a.npz", kspace=to_kspace(coil_images(3, 2, 28, 32)))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    write_scan(tmp_path / "b.t5")
    assert check.main(["check", str(tmp_path)]) == 1
    *table, fault, count = capsys.readouterr().out.splitlines()
    assert [Path(line.split()[0]).name for line in table] == ["file", "a.npz", "b.t5"]
    assert "a.npz: slice 0 of `kspace` cannot be read (" in fault
    assert count == "2 files read, 1 fault"


def test_check_command_exits_with_1_and_no_traceback_if_a_file_is_faulty(tmp_path: Path, capsys) -> None:
    bad_files(tmp_path)
    command = [sys.executable, "-m", "mrjax.check"]
    bad = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr
    assert check.main(["check", str(tmp_path / "good.t5")]) == 0
    assert "reconstruction_rss" in capsys.readouterr().out
