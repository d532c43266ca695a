"""A checkpoint applied to new files: by the class, and by the commands evaluate and reconstruct."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, rss, run_command, to_kspace, write_pair, write_scan, write_volume

from configs import paired
from mrjax import reconstruct, train
from mrjax.baselines import METHODS
from mrjax.config import defaults
from mrjax.data import checks
from mrjax.errors import UserError
from mrjax.inference import Inference, from_flags
from mrjax.io import hdf5, readers
from mrjax.report.run_log import read_rows


@pytest.fixture(scope="session")
def inference(trained: Path) -> Inference:
    return Inference.restore(str(trained))


@pytest.mark.slow
def test_scans_of_any_size_and_coils_are_reconstructed_on_their_own_grid(inference: Inference, tmp_path: Path) -> None:
    for slices, coils, size in ((1, 5, (31, 45)), (9, 1, (40, 28))):  # a batch has 8
        path = str(write_scan(tmp_path / "in" / f"{slices}.t5", slices, coils, size))
        volume, faults = checks.check(readers.describe(path))
        images = inference.reconstruct(volume)
        assert faults == []
        assert {image.shape for image in images.values()} == {(slices, *size)}
        assert {image.dtype for image in images.values()} == {np.dtype("float32")}
        assert np.allclose(images["target"], readers.read_slices(path, "reconstruction_rss", slices), atol=1e-5)
        assert np.corrcoef(images["corrupted"].ravel(), images["target"].ravel())[0, 1] > 0.7


def test_undersampled_scans_are_taken_as_they_were_measured(inference: Inference, tmp_path: Path) -> None:
    images = coil_images(3, 2, 32, 32)
    mask = np.arange(32) % 2 == 0
    mask[12:20] = True
    zero_filled = rss(
        np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(to_kspace(images) * mask, (-2, -1)), norm="ortho"), (-2, -1))
    )
    for name, arrays in {
        "stored": {"kspace": to_kspace(images), "mask": mask.astype(np.float32)},
        "found": {"kspace": to_kspace(images) * mask},
        "target": {"kspace": to_kspace(images) * mask, "mask": mask, "reconstruction_rss": rss(images)},
    }.items():
        path = str(write_volume(tmp_path / f"{name}.t5", arrays))
        result = inference.reconstruct(checks.check(readers.describe(path))[0])
        assert np.allclose(result["corrupted"], zero_filled, atol=1e-5), name
        assert ("target" in result) == (name == "target")


def test_oversampled_readouts_without_a_target_are_cropped_as_in_training(inference: Inference, tmp_path: Path) -> None:
    kspace, config = to_kspace(coil_images(3, 2, 32, 32)), inference.config.copy_and_resolve_references()
    config.data.resize, config.data.image_size = "image", (16, 24)
    arrays = {"kspace": kspace, "mask": np.arange(32) % 2 == 0}
    for attributes, shape in (({}, (3, 16, 24)), ({"affine": np.eye(4)}, (3, 32, 32))):  # an affine is of all pixels
        path = tmp_path / "a.t5"
        hdf5.write(path, arrays, attributes)
        result = dataclasses.replace(inference, config=config).reconstruct(readers.describe(str(path)))
        assert result["reconstruction"].shape == shape


@pytest.fixture(scope="module")
def trained_on_pairs(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run on paired images, one of whose validation volumes is perfect."""
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "val"):
        for number in range(2):
            write_pair(folder / "data" / split / f"{number}.h5", 3, (40, 33), number, dtype="f8")
    perfect = rss(coil_images(2, 1, 40, 33))
    write_volume(folder / "data" / "val" / "2.h5", {"input": perfect, "target": perfect})
    config = tiny(folder / "data", task="paired", steps=2, data__image_size=(32, 32))
    train.train(config, str(folder / "run"))
    return folder / "run"


def test_a_perfect_volume_is_validated(trained_on_pairs: Path) -> None:
    last = (trained_on_pairs / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["val/corrupted/psnr"] is None  # infinite, which JSON cannot say
    assert np.isnan(read_rows(str(trained_on_pairs))[-1]["val/corrupted/psnr"])


def test_paired_images_come_back_in_their_own_shape(trained_on_pairs: Path, tmp_path: Path) -> None:
    inference = Inference.restore(str(trained_on_pairs))
    arrays = {"input": np.full((2, 50, 30), 7, np.uint8) + np.arange(30, dtype=np.uint8)}
    images = inference.reconstruct(readers.describe(str(write_volume(tmp_path / "new.t5", arrays)), "paired"))
    assert set(images) == {"corrupted", "reconstruction"}
    assert images["reconstruction"].shape == (2, 50, 30)
    volume = readers.describe(str(trained_on_pairs.parent / "data" / "val" / "0.h5"), "paired")
    assert np.allclose(
        inference.reconstruct(volume)["target"], readers.read_slices(volume.path, "target", volume.slices), atol=1e-6
    )


@pytest.mark.slow
def test_reconstruct_writes_a_file_and_a_picture_and_passes_over_bad_files(
    trained: Path, scans: Path, tmp_path: Path
) -> None:
    (scans / "test" / "bad.t5").write_text("nothing")
    output = tmp_path / "out"
    flags = f"--workdir={trained}", f"--input={scans / 'test'}", f"--output={output}"
    result = run_command("reconstruct", *flags)
    assert result.returncode == 1
    assert "bad.t5: is not an HDF5 file" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(output)) == ["9_FLAIR01.png", "9_FLAIR01.t5", "report.html"]
    assert result.stderr.splitlines()[-1].endswith(f"{output / 'report.html'}")
    assert "9_FLAIR01" in (output / "report.html").read_text()
    volume = readers.describe(str(output / "9_FLAIR01.t5"))
    assert (volume.layout, volume.shape, volume.dtype) == ("image", (3, 32, 32), "float32")
    assert volume.contrast == "T1"  # the attribute of the file it came from
    assert "PSNR" in result.stdout


def test_results_never_replace_an_input_nor_one_another(tmp_path: Path) -> None:
    paths = [str(tmp_path / "sub" / "x.t5"), str(tmp_path / "y.t5")]
    with pytest.raises(UserError, match=r"a result would replace .*x\.t5"):
        reconstruct.require_free_names(paths, tmp_path / "sub")
    with pytest.raises(UserError, match="2 files named y"):
        reconstruct.require_free_names([*paths, str(tmp_path / "sub" / "y.t5")], tmp_path / "out")
    reconstruct.require_free_names(paths, tmp_path / "out")
    write_volume(tmp_path / "out" / "x.t5", {"reconstruction": np.ones((2, 8, 8), np.float32)})
    reconstruct.require_free_names(paths, tmp_path / "out")
    write_scan(tmp_path / "out" / "x.t5")
    with pytest.raises(UserError, match=r"x\.t5 is no result"):
        reconstruct.require_free_names(paths, tmp_path / "out")
    (tmp_path / "own" / "report.html").parent.mkdir()
    (tmp_path / "own" / "report.html").write_text("<title>My own notes</title>")
    with pytest.raises(UserError, match=r"report\.html is no report of mrjax"):
        reconstruct.require_free_names(paths, tmp_path / "own")


def test_volumes_of_zeros_are_reconstructed_without_metrics(inference: Inference, tmp_path: Path) -> None:
    arrays = {"kspace": np.zeros((2, 2, 32, 32), np.complex64), "reconstruction_rss": np.zeros((2, 32, 32), "f4")}
    path = str(write_volume(tmp_path / "zeros $x.t5", arrays))
    assert "PSNR" not in reconstruct.reconstruct_file(inference, path, tmp_path / "out")
    assert (tmp_path / "out" / "zeros $x.png").exists()


def test_a_scan_without_the_mask_that_the_run_undersamples_by_is_refused(inference: Inference, tmp_path: Path) -> None:
    config = inference.config.copy_and_resolve_references()
    config.acquisition.mask = "stored"
    path = str(write_scan(tmp_path / "x.t5"))
    with pytest.raises(UserError, match=r"x\.t5: has no data set `mask`, expected one for config\.acquisition\.mask"):
        reconstruct.reconstruct_file(dataclasses.replace(inference, config=config), path, tmp_path / "out")


def test_evaluate_prints_a_table_and_writes_a_row_for_every_volume(trained: Path) -> None:
    result = run_command("evaluate", f"--workdir={trained}", "--split=val", "--data_consistency=false")
    assert result.returncode == 0, result.stderr
    assert "zero-filled" in result.stdout
    assert "U-Net" in result.stdout
    found = json.loads((trained / "metrics-val.json").read_text())
    page = (trained / "report-val.html").read_text()
    assert result.stderr.splitlines()[-1].endswith("report-val.html")
    assert f"{found['volumes'][0]['reconstruction']['ssim']:.4f}" in page
    assert "training loss" in page
    assert [row["volume"] for row in found["volumes"]] == ["8_T201"]
    # The validation in the training loop gives the same numbers: here the network's size is the files'.
    best = json.loads((trained / "checkpoints" / "best.json").read_text())["step"]
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in logged if "val/psnr" in row and row["step"] == best)
    for name in ("nmse", "psnr", "ssim"):
        assert found["volumes"][0]["reconstruction"][name] == pytest.approx(row[f"val/{name}"], rel=1e-5)
        assert found["volumes"][0]["corrupted"][name] == pytest.approx(row[f"val/corrupted/{name}"], rel=1e-5)
        assert found["summary"]["all"]["reconstruction"][name]["mean"] == pytest.approx(row[f"val/{name}"], rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_methods_without_a_checkpoint_take_columns_samples_and_one_coil(name: str, tmp_path: Path) -> None:
    """An off-size grid of the file's own; the reconstruction is nearer to the target than the zero-filled image."""
    method = Inference.from_method(name, defaults())
    images, samples = coil_images(2, 1, 40, 31), np.random.default_rng(0).random((40, 31)) < 0.5
    samples[14:26, 10:21] = True
    for mask in (samples, samples[20]):
        arrays = {"kspace": to_kspace(images) * mask, "reconstruction_rss": rss(images)}
        path = write_volume(tmp_path / "scan.t5", arrays)
        result = method.reconstruct(checks.check(readers.describe(str(path)))[0])
        assert {image.shape for image in result.values()} == {(2, 40, 31)}
        error, before = (np.linalg.norm(result[key] - result["target"]) for key in ("reconstruction", "corrupted"))
        if name == "zero_filled":
            assert error == pytest.approx(before, rel=1e-5)
        else:
            assert error < (0.8 if name == "cs" else 1.05) * before


def test_another_acceleration_than_in_training_is_said_of_networks_alone(inference, tmp_path: Path, caplog) -> None:
    kspace = to_kspace(coil_images(2, 2, 32, 32))
    kspace[..., np.arange(32) % 8 > 0] = 0
    path = write_volume(tmp_path / "scan.t5", {"kspace": kspace, "mask": np.arange(32) % 8 == 0})
    reconstruct.reconstruct_file(Inference.from_method("zero_filled", defaults()), str(path), tmp_path / "method")
    assert "accelerated" not in caplog.text
    reconstruct.reconstruct_file(inference, str(path), tmp_path / "network")
    assert "`kspace` is accelerated" in caplog.text


def test_commands_run_a_method_with_and_without_a_run(trained: Path, scans: Path, tmp_path: Path) -> None:
    before = set(os.listdir(trained))
    result = run_command("evaluate", f"--workdir={trained}", "--method=cs", f"--data={scans / 'test'}", "--weight=0.01")
    assert result.returncode == 0, result.stderr
    assert "compressed sensing" in result.stdout
    written, page = sorted(set(os.listdir(trained)) - before)
    assert written.startswith("metrics-cs-test-")
    assert page == written.replace("metrics", "report").replace(".json", ".html")
    found = json.loads((trained / written).read_text())
    assert (found["method"], found["volumes"][0]["volume"]) == ("cs", "9_FLAIR01")
    # Of the same shape as above, whose compiled program serves here too.
    kspace = to_kspace(coil_images(2, 1, 40, 31)) * (np.arange(31) % 2 == 0)
    scan = write_volume(tmp_path / "9_FLAIR01.t5", {"kspace": kspace})
    result = run_command("reconstruct", "--method=sense", f"--input={scan}", f"--output={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["9_FLAIR01.png", "9_FLAIR01.t5", "report.html"]
    with h5py.File(tmp_path / "out" / "9_FLAIR01.t5") as file:
        assert file.attrs["mrjax_method"] == "sense"
        assert "mrjax_step" not in file.attrs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither --workdir nor --method is given"),
        ({"workdir": "runs/unet", "weight": 0.1}, "--weight is given without --method"),
        ({"workdir": "runs/unet", "method": "cs", "config": defaults()}, "--config is given beside --workdir"),
        ({"method": "zero_filled", "weight": 0.1}, "--weight is given with --method=zero_filled"),
        ({"method": "cs", "config": paired.get_config()}, "--method=cs with config.task = 'paired'"),
    ],
)
def test_flags_that_do_not_fit_one_another_are_one_sentence(given, message, monkeypatch) -> None:
    values = {"workdir": None, "method": None, "weight": None, "config": None, "data_consistency": True} | given
    monkeypatch.setattr("absl.flags.FLAGS", argparse.Namespace(**values))
    with pytest.raises(UserError, match=message):
        from_flags()


def test_a_workdir_without_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        Inference.restore(str(tmp_path / "nothing"))
