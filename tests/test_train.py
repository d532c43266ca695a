"""The commands, end to end on small files: train, stop, kill, go on, evaluate, reconstruct."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import coil_images, rss, to_kspace, write_pair, write_scan

from mrjax import checkpoint, evaluate, experiment, reconstruct, train
from mrjax.data import checks, hdf5, readers
from mrjax.errors import UserError
from mrjax.parallel import sharding


def parameters(workdir: Path) -> list[np.ndarray]:
    manager = checkpoint.open_checkpoints(str(workdir), "newest")
    args = ocp.args.Composite(params=ocp.args.StandardRestore())
    params = manager.restore(manager.latest_step(), args=args).params
    manager.close()
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_leaves_all_that_watching_and_inference_need(scans: Path, tiny, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    train.train(tiny(scans), str(workdir))
    logged = rows(workdir)
    assert [row["step"] for row in logged if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in logged if "val/ssim" in row] == [3, 6]
    assert all(row["images_per_second"] > 0 for row in logged if "loss" in row)
    assert (workdir / "curves.png").exists()
    assert list((workdir / "tensorboard").iterdir())
    assert os.listdir(workdir / "checkpoints" / "newest") == ["6"]
    assert os.listdir(workdir / "checkpoints" / "best")[0] in ("3", "6")


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(scans: Path, tiny, tmp_path: Path) -> None:
    fields = {"schedule": "constant", "data__image_size": (32, 32)}
    train.train(tiny(scans, **fields), str(tmp_path / "whole"))
    for steps in (4, 6):
        train.train(tiny(scans, steps=steps, **fields), str(tmp_path / "parts"))
    assert same(parameters(tmp_path / "whole"), parameters(tmp_path / "parts"))
    whole, parts = ([(r["step"], r.get("loss")) for r in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert set(whole) - {(3, None)} <= set(parts)


def test_wherever_the_data_are_kept_the_run_is_the_same_bit_for_bit(scans: Path, tiny, tmp_path: Path) -> None:
    for cache in ("none", "host", "device"):
        train.train(tiny(scans, steps=4, eval_every=4, data__cache=cache), str(tmp_path / cache))
        assert same(parameters(tmp_path / "none"), parameters(tmp_path / cache)), cache
    losses = {cache: [row.get("loss") for row in rows(tmp_path / cache)] for cache in ("none", "host", "device")}
    assert losses["none"] == losses["host"] == losses["device"]


@pytest.mark.slow
def test_a_run_goes_on_at_the_same_example_on_another_mesh(scans: Path, tiny, tmp_path: Path) -> None:
    fields = {"schedule": "constant", "warmup": 0.0, "log_every": 1, "eval_every": 100}
    train.train(tiny(scans, steps=4, **fields), str(tmp_path / "whole"))
    for steps, mesh in ((2, (2, 2, 2)), (3, (8, 1, 1)), (4, (1, 4, 2))):
        train.train(tiny(scans, steps=steps, mesh=mesh, **fields), str(tmp_path / "parts"))
    whole, parts = (
        {row["step"]: row["loss"] for row in rows(tmp_path / name) if "loss" in row} for name in ("whole", "parts")
    )
    assert sorted(whole) == sorted(parts) == [2, 3, 4]
    np.testing.assert_allclose([whole[n] for n in (2, 3, 4)], [parts[n] for n in (2, 3, 4)], rtol=1e-4)


def test_a_run_that_waits_for_its_data_says_so_with_the_fields_to_change(scans: Path, tiny, caplog) -> None:
    class Silent:
        def scalars(self, step: int, values: dict[str, float]) -> None:
            self.values = values

    watch = Silent()
    values = [dict.fromkeys(("loss", "grad_norm", "param_norm", "learning_rate"), np.float32(1))]
    for share, said in ((0.04, False), (0.12, True)):
        caplog.clear()
        # Nothing is computed for it: that would wait for all steps that are under way.
        with caplog.at_level("INFO", "mrjax"), jax.transfer_guard("disallow"):
            train.report(watch, train.Interval(1, values, 10.0, share), tiny(scans))
        assert watch.values["data_wait"] == share
        assert (
            any("waited for data 12 %" in text and "config.data.cache='host'" in text for text in caplog.messages)
            == said
        )


def test_a_workdir_of_another_run_is_refused_with_the_fields_named(scans: Path, tiny, tmp_path: Path) -> None:
    workdir = str(tmp_path / "run")
    train.train(tiny(scans, steps=2), workdir)
    with pytest.raises(UserError, match=r"config\.model\.channels was 4 and is 8.*config\.seed was 0 and is 1"):
        train.train(tiny(scans, steps=4, seed=1, model__channels=8), workdir)
    (scans / "train" / "0_T101.t5").unlink()
    with pytest.raises(UserError, match=r"was trained on 3 files, 12 slices.*found 2 files"):
        train.train(tiny(scans, steps=4), workdir)
    with pytest.raises(UserError, match="holds files but no run"):
        train.train(tiny(scans), str(scans))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds files but no run"):
        train.train(tiny(scans), str(tmp_path / "theirs"))


def test_what_cannot_work_is_said_before_the_first_step(scans: Path, tiny, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    for fields, words in (
        ({"batch_size": 7}, "multiple of the 8 devices"),
        ({"model__levels": 5}, "at least 64 a side"),
        ({"task": "paired"}, "no data set `input`"),
        ({"data__train": str(tmp_path / "nowhere")}, "no such file or folder"),
    ):
        with pytest.raises(UserError, match=words):
            train.train(tiny(scans, **fields), str(workdir))
    assert not workdir.exists()


def test_a_state_that_is_not_finite_stops_the_run_and_is_never_saved(scans: Path, tiny, tmp_path: Path) -> None:
    fields = {"learning_rate": 1e30, "schedule": "constant", "warmup": 0.0, "checkpoint_every": 1}
    with pytest.raises(UserError, match="param_norm is inf at step 1"):
        train.train(tiny(scans, **fields), str(tmp_path / "run"))
    assert os.listdir(tmp_path / "run" / "checkpoints" / "newest") == []


def command(workdir: Path, data: Path, steps: int, config: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "mrjax.main", f"--config={config}", f"--workdir={workdir}"),
        *(f"--config.data.dir={data}", f"--config.steps={steps}"),
    ]


@pytest.fixture
def small_config(tmp_path: Path) -> Path:
    file = tmp_path / "small.py"
    file.write_text(
        "from mrjax.config import defaults\n\n\ndef get_config():\n    config = defaults()\n"
        "    config.model.channels, config.model.levels = 4, 2\n"
        "    config.log_every, config.eval_every, config.checkpoint_every = 5, 20, 5\n    return config\n"
    )
    return file


def test_sigterm_saves_and_exits_cleanly(scans: Path, tmp_path: Path, small_config: Path) -> None:
    workdir = tmp_path / "run"
    process = subprocess.Popen(command(workdir, scans, 100_000, small_config), stderr=subprocess.PIPE, text=True)
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    step = int(os.listdir(workdir / "checkpoints" / "newest")[0])
    assert f"stopped; step {step} of 100000 is saved" in log
    assert rows(workdir)[-1]["step"] == step


@pytest.mark.slow
def test_killed_at_random_moments_and_restarted_it_ends_bit_identical(
    scans: Path, tmp_path: Path, small_config: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, scans, 120, small_config), check=True, capture_output=True)
    moments = random.Random(0)
    for number in range(7):
        process = subprocess.Popen(command(killed, scans, 120, small_config), stderr=subprocess.DEVNULL)
        if number < 2:  # somewhere in the start: imports, the check of the files, compilation
            time.sleep(moments.uniform(1, 5))
        else:  # somewhere in the steps, and in the saves and evaluations between them
            further = newest_step(killed) + moments.randint(1, 15)
            while process.poll() is None and newest_step(killed) < further:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 10 <= newest_step(killed) < 120
    subprocess.run(command(killed, scans, 120, small_config), check=True, capture_output=True)
    assert same(parameters(whole), parameters(killed))
    losses = [{row["step"]: row["loss"] for row in rows(workdir) if "loss" in row} for workdir in (whole, killed)]
    assert losses[0] == losses[1]
    assert os.listdir(whole / "checkpoints" / "best") == os.listdir(killed / "checkpoints" / "best")


def newest_step(workdir: Path) -> int:
    return max((int(path.name) for path in workdir.glob("checkpoints/newest/*") if path.name.isdigit()), default=0)


def test_a_perfect_volume_and_a_damaged_checkpoint_end_no_run_in_a_traceback(tiny, tmp_path: Path) -> None:
    for split in ("train", "val"):
        truth = rss(coil_images(2, 1, 32, 32))
        hdf5.write(tmp_path / "data" / split / "clean.t5", {"input": truth, "target": truth})
    config = tiny(tmp_path / "data", task="paired", steps=2)
    train.train(config, str(tmp_path / "run"))
    assert rows(tmp_path / "run")[-1]["val/corrupted/psnr"] == np.inf
    for file in (tmp_path / "run" / "checkpoints" / "newest" / "2" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    config.steps = 4
    with pytest.raises(UserError, match="this checkpoint is damaged"):
        train.train(config, str(tmp_path / "run"))


def test_results_never_replace_what_they_were_made_from(scans: Path, tiny, tmp_path: Path) -> None:
    train.train(tiny(scans, steps=2), str(tmp_path / "run"))
    write_scan(tmp_path / "in" / "sub" / "x.t5", 1)
    write_scan(tmp_path / "in" / "y.t5", 1)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mrjax.reconstruct", f"--workdir={tmp_path / 'run'}"),
            *(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'in' / 'sub'}"),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "would replace" in result.stderr
    assert readers.describe(str(tmp_path / "in" / "sub" / "x.t5")).layout == "kspace"


def trained(data: Path, tiny, workdir: Path, **fields) -> experiment.Inference:
    train.train(tiny(data, steps=2, **fields), str(workdir))
    return experiment.restore(str(workdir), sharding.make_mesh())


@pytest.mark.parametrize("rule", ["kspace", "image"])
def test_scans_of_any_size_and_coils_are_reconstructed_on_their_own_grid(
    scans: Path, tiny, tmp_path: Path, rule: str
) -> None:
    inference = trained(scans, tiny, tmp_path / "run", data__resize=rule)
    for slices, coils, size in ((1, 1, (32, 32)), (2, 16, (31, 45)), (9, 3, (64, 40))):
        volume, faults = checks.check(readers.describe(str(write_scan(tmp_path / "in" / "x.t5", slices, coils, size))))
        images = reconstruct.reconstruct(inference, volume)
        assert faults == []
        assert {image.shape for image in images.values()} == {(slices, *size)}
        assert {image.dtype for image in images.values()} == {np.dtype("float32")}
        assert np.allclose(images["target"], hdf5.read(volume.path, "reconstruction_rss"), atol=1e-5)
        # Nothing is lost but resolution or the edge of the field of view: the input still looks like the truth.
        assert np.corrcoef(images["corrupted"].ravel(), images["target"].ravel())[0, 1] > 0.7


def test_undersampled_scans_are_taken_as_they_are(scans: Path, tiny, tmp_path: Path) -> None:
    inference = trained(scans, tiny, tmp_path / "run")
    images = coil_images(3, 2, 32, 32)
    mask = np.arange(32) % 2 == 0
    mask[12:20] = True
    zero_filled = rss(
        np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(to_kspace(images) * mask, (-2, -1)), norm="ortho"), (-2, -1))
    )
    for name, arrays in {
        "stored": {"kspace": to_kspace(images), "mask": mask.astype(np.float32)},
        "found": {"kspace": to_kspace(images) * mask},
        "truth": {"kspace": to_kspace(images) * mask, "mask": mask, "reconstruction_rss": rss(images)},
    }.items():
        hdf5.write(tmp_path / f"{name}.t5", arrays)
        result = reconstruct.reconstruct(inference, checks.check(readers.describe(str(tmp_path / f"{name}.t5")))[0])
        assert np.allclose(result["corrupted"], zero_filled, atol=1e-5), name
        assert ("target" in result) == (name == "truth")


def test_reconstruct_command_writes_a_file_and_a_picture_and_goes_past_bad_files(
    scans: Path, tiny, tmp_path: Path
) -> None:
    train.train(tiny(scans, steps=2), str(tmp_path / "run"))
    (scans / "test" / "bad.t5").write_text("nothing")
    output = tmp_path / "out"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mrjax.reconstruct", f"--workdir={tmp_path / 'run'}"),
            *(f"--input={scans / 'test'}", f"--output={output}"),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "bad.t5: is not an HDF5 file" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(output)) == ["9_FLAIR01.png", "9_FLAIR01.t5"]
    volume = readers.describe(str(output / "9_FLAIR01.t5"))
    assert (volume.layout, volume.shape, volume.dtype) == ("result", (3, 32, 32), "float32")
    assert "PSNR" in result.stdout
    write_scan(scans / "test" / "sub" / "9_FLAIR01.t5")
    again = subprocess.run(result.args, capture_output=True, text=True)
    assert again.returncode == 2
    assert "2 files named 9_FLAIR01" in again.stderr


def test_evaluate_command_prints_a_table_and_writes_a_row_for_every_volume(scans: Path, tiny, tmp_path: Path) -> None:
    train.train(tiny(scans, steps=2), str(tmp_path / "run"))
    result = subprocess.run(
        [sys.executable, "-m", "mrjax.evaluate", f"--workdir={tmp_path / 'run'}", "--split=train"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "zero-filled" in result.stdout
    found = json.loads((tmp_path / "run" / "metrics-train.json").read_text())
    assert [row["volume"] for row in found["volumes"]] == ["0_T101", "1_T101", "2_T101"]
    mean = np.mean([row["reconstruction"]["psnr"] for row in found["volumes"]])
    assert found["summary"]["all"]["reconstruction"]["psnr"]["mean"] == pytest.approx(mean)
    # The same numbers from the streamed evaluation of the training loop: here the network's size is the files'.
    logged = [row for row in rows(tmp_path / "run") if "val/psnr" in row][-1]
    subprocess.run([*result.args[:-1], "--split=val"], check=True, capture_output=True)
    found = json.loads((tmp_path / "run" / "metrics-val.json").read_text())
    assert found["volumes"][0]["reconstruction"]["psnr"] == pytest.approx(logged["val/psnr"], rel=1e-5)
    assert found["volumes"][0]["corrupted"]["ssim"] == pytest.approx(logged["val/corrupted/ssim"], rel=1e-5)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.best(str(tmp_path / "nothing"))


def test_paired_images_train_and_come_back_in_their_own_shape(tiny, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            write_pair(tmp_path / "data" / split / f"{number}.h5", 3, (40, 33), number, dtype="f8")
    inference = trained(tmp_path / "data", tiny, tmp_path / "run", task="paired", data__image_size=(32, 32))
    arrays = {"input": np.full((2, 50, 30), 7, np.uint8) + np.arange(30, dtype=np.uint8)}
    hdf5.write(tmp_path / "new.t5", arrays)
    images = reconstruct.reconstruct(inference, readers.describe(str(tmp_path / "new.t5"), "paired"))
    assert set(images) == {"corrupted", "reconstruction"}
    assert images["reconstruction"].shape == (2, 50, 30)
    volumes = [readers.describe(str(tmp_path / "data" / "val" / "0.h5"), "paired")]
    images = reconstruct.reconstruct(inference, volumes[0])
    assert np.allclose(images["target"], hdf5.read(volumes[0].path, "target"), atol=1e-6)
    assert evaluate.labels("paired", "unet") == ("input", "U-Net")


def test_normalising_by_volume_needs_its_maximum(scans: Path, tiny, tmp_path: Path) -> None:
    trained(scans, tiny, tmp_path / "run", normalise="volume")
    hdf5.write(scans / "train" / "plain.t5", {"kspace": to_kspace(coil_images(2, 2, 32, 32))})
    with pytest.raises(UserError, match=r"plain\.t5: has no attribute `max` in the units"):
        train.train(tiny(scans, normalise="volume"), str(tmp_path / "other"))
