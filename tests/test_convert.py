"""Volumes of any format are converted, each by itself, and nothing but results is ever replaced."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, read_array, rss, to_kspace, write_pair, write_scan, write_volume
from raw_files import make_header, make_lines, write_raw
from test_readers import NpyFolderReader

from mrjax import convert
from mrjax.config import defaults
from mrjax.io import readers

KSPACE = to_kspace(coil_images(3, 2, 16, 12))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path: Path):
    """Convert inputs into tmp_path/out; return the exit status, and what was printed without the folder's name."""

    def run(*inputs: Path, form: str = "t5", keep_identity: bool = False, config: object = None) -> tuple[int, str]:
        monkeypatch.setitem(readers.READERS, "npy", NpyFolderReader())
        values = argparse.Namespace(output=str(tmp_path / "out"), format=form, keep_identity=keep_identity)
        monkeypatch.setattr("absl.flags.FLAGS", values)
        status = convert.main(["convert", *map(str, inputs)], config)
        return status, capsys.readouterr().out.replace(f"{tmp_path}/", "")

    return run


def test_raw_data_become_k_space_with_mask_affine_and_a_header_that_names_nobody(run, tmp_path: Path) -> None:
    lines = [0, 2, 4, 5, 6, 7, 8, 10]
    readouts = [line for z in range(3) for line in make_lines(KSPACE[z], lines, slice=z, position=(0, 0, 5 * z))]
    raw = write_raw(tmp_path / "in" / "sub" / "scan.h5", make_header((16, 12, 1)), readouts)
    status, printed = run(tmp_path / "in")
    assert (status, printed) == (0, "in/sub/scan.h5 -> out/sub/scan.t5\nwritten: 1, not converted: 0\n")
    source, result = readers.describe(str(raw)), readers.describe(str(tmp_path / "out" / "sub" / "scan.t5"))
    assert np.array_equal(read_array(result.path, "kspace"), np.where(np.isin(np.arange(12), lines), KSPACE, 0))
    assert np.array_equal(result.stored_mask, source.stored_mask)
    assert np.array_equal(result.affine, source.affine)
    assert (result.contrast, result.undersampled) == ("T1 tse", True)
    header = read_array(result.path, "ismrmrd_header")
    assert b"<encodedSpace>" in header
    assert b"Doe" not in Path(result.path).read_bytes()
    assert run(tmp_path / "in", keep_identity=True)[0] == 0
    assert b"Doe^Jane" in read_array(result.path, "ismrmrd_header")


def test_k_space_becomes_its_image_in_a_format_of_images_and_pairs_two_files(run, tmp_path: Path) -> None:
    mask = np.arange(12) % 3 > 0
    write_volume(tmp_path / "in" / "scan.t5", {"kspace": KSPACE, "mask": mask})
    write_pair(tmp_path / "in" / "pair.t5")
    write_volume(tmp_path / "in" / "image.t5", {"reconstruction": np.ones((2, 8, 8), "f4")})
    status, _ = run(tmp_path / "in", form="npy")
    assert status == 0
    found = [str(path.relative_to(tmp_path / "out")) for path in sorted((tmp_path / "out").rglob("*.npy"))]
    names = ["image.npyd", "input/pair.npyd", "scan.npyd", "target/pair.npyd"]
    assert found == [f"{name}/.reconstruction.npy" for name in names]
    images = np.fft.ifft2(np.fft.ifftshift(KSPACE * mask, (-2, -1)), norm="ortho")
    expected = rss(np.fft.fftshift(images, (-2, -1)))
    assert np.allclose(np.load(tmp_path / "out" / found[2]), expected, atol=1e-6)
    for name in ("input", "target"):
        image = np.load(tmp_path / "out" / name / "pair.npyd" / ".reconstruction.npy")
        assert np.array_equal(image, read_array(tmp_path / "in" / "pair.t5", name))
    # And back.
    status, printed = run(tmp_path / "out" / "scan.npyd")
    assert (status, printed.splitlines()[0]) == (0, "out/scan.npyd -> out/scan.t5")
    assert np.allclose(read_array(tmp_path / "out" / "scan.t5", "reconstruction"), expected, atol=1e-6)


def test_masks_that_differ_between_slices_are_kept(run, tmp_path: Path) -> None:
    """As many slices as rows, so that columns for each slice could be taken for single samples."""
    readouts = [line for z in range(16) for line in make_lines(KSPACE[0], range(z % 2, 12, 2), slice=z)]
    raw = write_raw(tmp_path / "scan.h5", make_header((16, 12, 1)), readouts)
    assert run(raw)[0] == 0
    source, result = readers.describe(str(raw)), readers.describe(str(tmp_path / "out" / "scan.t5"))
    assert source.stored_mask.shape == (16, 1, 12)
    assert np.array_equal(result.stored_mask, np.broadcast_to(source.stored_mask, (16, 16, 12)))


def test_targets_and_attributes_are_kept(run, tmp_path: Path) -> None:
    target = rss(coil_images(3, 2, 16, 12))
    write_volume(tmp_path / "scan.h5", {"kspace": KSPACE, "target": target}, {"acquisition": "T2"})
    assert run(tmp_path / "scan.h5")[0] == 0
    result = readers.describe(str(tmp_path / "out" / "scan.t5"))
    assert np.array_equal(read_array(result.path, "target"), target)
    assert result.contrast == "T2"


def test_arrays_are_read_as_the_config_says_that_they_are_stored(run, tmp_path: Path) -> None:
    np.save(tmp_path / "coils.npy", KSPACE[0])
    config = defaults()
    config.data.axes = "coils,height,width"
    assert run(tmp_path / "coils.npy", config=config)[0] == 0
    assert np.array_equal(read_array(tmp_path / "out" / "coils.t5", "kspace"), KSPACE[:1])


def test_arrays_of_other_names_are_written_by_those_of_a_t5(run, tmp_path: Path) -> None:
    target = rss(coil_images(3, 2, 16, 12))
    write_volume(tmp_path / "scan.h5", {"raw": KSPACE, "clean": target})
    config = defaults()
    config.data.names.kspace, config.data.names.target = "raw", "clean"
    assert run(tmp_path / "scan.h5", config=config)[0] == 0
    result = readers.describe(str(tmp_path / "out" / "scan.t5"))
    assert (result.data, result.target) == ("kspace", "target")
    assert np.array_equal(read_array(result.path, "target"), target)


def test_one_bad_file_is_listed_and_stops_nothing(run, tmp_path: Path) -> None:
    write_scan(tmp_path / "in" / "a.h5")
    (tmp_path / "in" / "b.h5").write_text("nothing")
    write_scan(tmp_path / "in" / "c.h5")
    (tmp_path / "out").mkdir()
    status, printed = run(tmp_path / "in", tmp_path / "nowhere", tmp_path / "in" / "c.*")
    assert status == 1
    lines = printed.splitlines()
    assert lines[:2] == ["in/a.h5 -> out/a.t5", "in/c.h5 -> out/c.t5"]
    assert lines[2].startswith("NOT CONVERTED  nowhere: no such file or folder")
    assert lines[3].startswith("NOT CONVERTED  in/b.h5: is not an HDF5 file")
    assert lines[4:] == ["written: 2, not converted: 2"]


def test_results_alone_are_replaced(run, tmp_path: Path) -> None:
    scan, out = write_scan(tmp_path / "in" / "a.h5"), tmp_path / "out"
    write_volume(out / "a.t5", {"kspace": KSPACE})
    assert "which this command did not write" in run(scan)[1]
    (out / "a.t5").unlink()
    for _ in range(2):
        assert run(scan)[0] == 0
    with h5py.File(out / "a.t5", "a") as file:
        file.attrs["note"] = "by hand"
    os.utime(out / "a.t5", (1, 1))
    assert "or which was changed since" in run(scan)[1]
    assert np.array_equal(read_array(out / "a.t5", "kspace"), read_array(scan, "kspace"))


def test_names_that_collide_and_inputs_are_refused(run, tmp_path: Path) -> None:
    for name in ("a.h5", "a.hdf5"):
        write_scan(tmp_path / "in" / name)
    assert (
        "in/a.hdf5: would be written to out/a.t5, as in/a.h5 is, expected names that differ" in run(tmp_path / "in")[1]
    )
    write_scan(tmp_path / "out" / "b.t5")
    assert "out/b.t5: would be written to out/b.t5, which is an input" in run(tmp_path / "out" / "b.t5")[1]


def test_results_in_the_folder_of_the_inputs_are_no_inputs(run, tmp_path: Path) -> None:
    write_scan(tmp_path / "out" / "a.h5")
    for _ in range(2):
        assert run(tmp_path / "out") == (0, "out/a.h5 -> out/a.t5\nwritten: 1, not converted: 0\n")


@pytest.mark.slow
def test_the_command_knows_the_formats_of_the_registry(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "a.h5")
    command = [sys.executable, "-m", "mrjax.convert", str(scan), f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "out" / "a.t5").exists()) == (0, True), done.stderr
    done = subprocess.run([*command, "--format=tiff"], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "t5" in done.stderr
