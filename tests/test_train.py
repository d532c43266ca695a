"""The training program, end to end on small files: train, stop, kill, resume."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import coil_images, to_kspace, write_scan, write_volume

from mrjax import train
from mrjax.checkpoint import store
from mrjax.errors import UserError


def parameters(workdir: Path) -> list[np.ndarray]:
    manager = store.open_checkpoints(str(workdir), read_only=True)
    args = ocp.args.Composite(params=ocp.args.StandardRestore())
    params = manager.restore(manager.latest_step(), args=args).params
    manager.close()
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


def checkpoint_steps(workdir: Path) -> set[int]:
    return {int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()}


def newest_step(workdir: Path) -> int:
    return max(checkpoint_steps(workdir), default=0)


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_leaves_logs_curves_and_checkpoints(trained: Path) -> None:
    logged = rows(trained)
    assert [row["step"] for row in logged if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in logged if "val/ssim" in row] == [3, 6]
    assert all(row["images_per_second"] > 0 for row in logged if "loss" in row)
    assert (trained / "curves.png").exists()
    assert list((trained / "tensorboard").iterdir())
    best = json.loads((trained / "checkpoints" / "best.json").read_text())
    assert best["step"] in (3, 6)
    assert best["validated"] == 6
    assert {4, 6, best["step"]} <= checkpoint_steps(trained)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit_from_any_cache(
    trained: Path, trained_on, tmp_path: Path
) -> None:
    for steps, cache in ((4, "host"), (6, "device")):
        train.train(trained_on(steps=steps, data__cache=cache), str(tmp_path / "parts"))
    assert equal(parameters(trained), parameters(tmp_path / "parts"))
    whole, parts = ({(row["step"], row.get("loss")) for row in rows(run)} for run in (trained, tmp_path / "parts"))
    assert whole - {(3, None)} <= parts


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("varnet", {"data__cache": "device", "model__cascades": 1, "model__sens_channels": 4, "model__sens_levels": 1}),
        ("unet_dc", {"data__cache": "host"}),
    ],
)
@pytest.mark.slow
def test_files_of_mixed_sizes_train_every_network(model: str, fields, tiny, tmp_path: Path, caplog) -> None:
    for number, (coils, size) in enumerate(((2, (32, 32)), (3, (32, 32)), (2, (28, 37)))):
        write_scan(tmp_path / "data" / "train" / f"{number}_T101.t5", 3, coils, size, seed=number)
    write_scan(tmp_path / "data" / "val" / "8_T101.t5", 2, 4, (40, 30))
    fields = fields | {"model__levels": 1, "log_every": 1, "eval_every": 6, "checkpoint_every": 6}
    config = tiny(tmp_path / "data", model__name=model, **fields)
    with caplog.at_level("INFO", "mrjax"):
        train.train(config, str(tmp_path / "run"))
    assert any("training: 2 shapes" in message for message in caplog.messages)
    assert sorted(losses(tmp_path / "run")) == [2, 3, 4, 5, 6]
    assert np.isfinite(list(losses(tmp_path / "run").values())).all()
    config.data.max_shapes = 1
    with pytest.raises(UserError, match=r"config\.data\.max_shapes is 1.*config\.data\.image_size"):
        train.train(config, str(tmp_path / "other"))


@pytest.mark.slow
def test_a_run_resumes_at_the_same_example_on_another_mesh(trained: Path, trained_on, tmp_path: Path) -> None:
    for steps, mesh in ((2, (8, 1, 1)), (4, (2, 2, 2)), (6, (8, 1, 1))):
        train.train(trained_on(steps=steps, mesh=mesh, eval_every=100), str(tmp_path / "parts"))
    whole, parts = losses(trained), losses(tmp_path / "parts")
    assert sorted(whole) == sorted(parts) == [2, 4, 6]
    np.testing.assert_allclose([whole[n] for n in (2, 4, 6)], [parts[n] for n in (2, 4, 6)], rtol=1e-4)


def test_user_errors_come_before_the_first_step_and_make_no_workdir(scans: Path, tiny, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    for fields, words in (
        ({"batch_size": 7}, "multiple of the 8 devices"),
        ({"model__levels": 5}, "at least 64 a side"),
        ({"task": "paired"}, "no data set `input`"),
        ({"data__train": str(tmp_path / "nowhere")}, "no such file or folder"),
        ({"data__image_size": (34, 34), "mesh": (1, 2, 4)}, "a height that is a multiple of 4"),
    ):
        with pytest.raises(UserError, match=words):
            train.train(tiny(scans, **fields), str(workdir))
    assert not workdir.exists()


def test_normalising_by_volume_needs_its_maximum(scans: Path, tiny, tmp_path: Path) -> None:
    write_volume(scans / "train" / "plain.t5", {"kspace": to_kspace(coil_images(2, 2, 32, 32))})
    with pytest.raises(UserError, match=r"plain\.t5: has no attribute `max` in the units"):
        train.train(tiny(scans, normalise="volume"), str(tmp_path / "other"))
    for maximum in (np.nan, np.inf, -1.0):
        arrays = {"kspace": to_kspace(coil_images(2, 2, 32, 32))}
        write_volume(scans / "train" / "plain.t5", arrays, {"max": maximum})
        with pytest.raises(UserError, match=r"plain\.t5: has no attribute `max` .*, expected a positive one"):
            train.train(tiny(scans, normalise="volume", data__check="headers"), str(tmp_path / "other"))


def test_a_workdir_of_another_run_is_refused_with_the_fields_named(
    trained: Path, trained_on, scans: Path, tiny, tmp_path: Path, caplog
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    with pytest.raises(UserError, match=r"config\.model\.channels was 4 and is 8.*config\.seed was 0 and is 1"):
        train.train(trained_on(steps=8, seed=1, model__channels=8), str(workdir))
    (scans / "train" / "0_T101.t5").unlink()
    with pytest.raises(UserError, match=r"was trained on 3 files, 12 slices.*found 2 files"):
        train.train(trained_on(steps=8, data__dir=str(scans)), str(workdir))
    train.train(trained_on(steps=7, data__dir=str(scans), data__on_bad_file="skip"), str(workdir))
    assert re.search(r"was trained on 3 files, 12 slices.*found 2 files.*going on with these", caplog.text)
    with pytest.raises(UserError, match="holds files but no run"):
        train.train(tiny(scans), str(scans))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds files but no run"):
        train.train(tiny(scans), str(tmp_path / "theirs"))


def command(workdir: Path, data: Path, steps: int, config: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "mrjax.main", f"--config={config}", f"--workdir={workdir}"),
        *(f"--config.data.dir={data}", f"--config.steps={steps}"),
    ]


def test_sigterm_saves_and_exits_with_status_0_sent_twice_too(scans: Path, tmp_path: Path, small_config: Path) -> None:
    workdir = tmp_path / "run"
    process = subprocess.Popen(command(workdir, scans, 100_000, small_config), stderr=subprocess.PIPE, text=True)
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    step = newest_step(workdir)
    assert f"stopped; step {step} of 100000 is saved" in log
    assert rows(workdir)[-1]["step"] == step


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_identical(
    scans: Path, tmp_path: Path, small_config: Path, tiny
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fields = {"schedule": "constant", "warmup": 0.0, "log_every": 5, "eval_every": 20, "checkpoint_every": 5}
    config = tiny(scans, steps=60, **fields)  # that of `small_config`
    train.train(config, str(whole))
    moments = random.Random(0)
    for number in range(3):
        process = subprocess.Popen(command(killed, scans, 60, small_config), stderr=subprocess.DEVNULL)
        if number == 0:  # during the start: imports, the check of the files, compilation
            time.sleep(moments.uniform(1, 5))
        else:  # during the steps, and the saves and evaluations between them
            further = newest_step(killed) + moments.randint(1, 15)
            while process.poll() is None and newest_step(killed) < further:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 10 <= newest_step(killed) < 60
    train.train(config, str(killed))
    assert equal(parameters(whole), parameters(killed))
    assert losses(whole) == losses(killed)
    one, other = ((run / "checkpoints" / "best.json").read_text() for run in (whole, killed))
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_loop_ends_the_process_within_10_seconds(
    workers: int, scans: Path, tmp_path: Path, small_config: Path
) -> None:
    """Threads and worker processes that read ahead do not keep it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import runpy\nfrom mrjax.report.run_log import RunLog\n"
        "def fail(self, step, metrics):\n    if step == 3:\n"
        "        print('failing', flush=True)\n        raise KeyError('a fault')\n"
        "if __name__ == '__main__':\n"
        "    RunLog.add = fail\n    runpy.run_module('mrjax.main', run_name='__main__')\n"
    )
    python, _, _, *flags = command(tmp_path / "run", scans, 100, small_config)
    process = subprocess.Popen(
        [python, str(program), *flags, f"--config.data.workers={workers}"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "failing\n"
    started = time.monotonic()
    _, log = process.communicate(timeout=60)  # up to the end of the workers, which hold the pipes as well
    assert time.monotonic() - started < 10
    assert process.returncode == 1
    assert "KeyError: 'a fault'" in log
