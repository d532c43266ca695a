"""One screen says what would end or spoil a run, and nothing is written."""

import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import run_command, write_repetitions, write_scan

from mrjax.checkpoint import run
from mrjax.errors import UserError
from mrjax.experiment import CompiledTrainStep, Experiment
from mrjax.parallel import memory
from mrjax.preflight import preflight
from mrjax.train_step import Batch, Metrics, TrainState


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_run_that_would_go_well_has_facts_and_no_problem_and_leaves_nothing(
    trained_on, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = trained_on()
    data = Path(config.data.dir)
    before = files(data)
    assert preflight(config, str(tmp_path / "runs" / "new")) == 0
    screen = capsys.readouterr().out
    assert "train    3 files of 3 subjects, 12 slices of 2x32x32; maximum" in screen
    assert "test     1 file of 1 subject, 3 slices" in screen
    assert "masks    random, 4x with 8 % in the centre, 3 columns" in screen
    assert "a step takes" in screen
    assert "to finish: 6 steps 0:" in screen
    assert "2 validations 0:" in screen
    assert "checkpoints of 1." in screen
    assert screen.endswith("no problems found; nothing was trained, nothing written\n")
    assert len(screen.splitlines()) <= 24
    assert (files(data), files(tmp_path)) == (before, set())


def test_problems_of_data_come_first_all_of_them_and_the_rest_is_still_measured(
    scans: Path, trained_on, tmp_path: Path, capsys
) -> None:
    (scans / "train" / "bad.t5").write_text("nothing")
    (scans / "val" / "worse.t5").write_text("nothing")
    write_scan(scans / "val" / "0_FLAIR01.t5", seed=3)  # of the subject of train/0_T101.t5
    assert preflight(trained_on(data__dir=str(scans)), str(tmp_path / "run")) == 1
    lines = capsys.readouterr().out.splitlines()
    problems = [line for line in lines if line.startswith("PROBLEM")]
    assert lines[:3] == problems
    for line, words in zip(
        problems,
        (
            (f"{scans}/train/bad.t5", "is not an HDF5 file"),
            (f"{scans}/val/worse.t5", "is not an HDF5 file"),
            (f"{scans}/val/0_FLAIR01.t5", f"{scans}/train/0_T101.t5", "the same subject"),
        ),
        strict=True,
    ):
        assert all(word in line for word in words)
    assert any(line.startswith("time ") for line in lines)
    assert lines[-1].startswith("3 problems found")


def test_problems_of_the_machine_are_said(trained_on, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run, "_free", lambda workdir: 500_000)
    monkeypatch.setattr(memory, "available_bytes", lambda mesh: 1000)
    assert preflight(trained_on(), str(tmp_path / "run")) == 1
    screen = capsys.readouterr().out
    assert "run has 0.5 MB free, checkpoints of 1." in screen
    assert "PROBLEM  config.batch_size is 8, for which a step needs" in screen
    assert "2 problems found" in screen


def test_a_workdir_of_another_run_a_config_that_cannot_be_and_no_data_are_problems(
    trained: Path, trained_on, scans: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    workdir = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for fields, words in (
        ({"batch_size": 7}, "multiple of the 8 devices"),
        ({"data__dir": ""}, "config.data.dir is not set, and data/demo is not there"),
    ):
        assert preflight(trained_on(**fields), str(workdir)) == 1
        assert words in capsys.readouterr().out
    monkeypatch.setattr(Experiment, "compile_train_step", Mock(side_effect=UserError("it goes no further")))
    assert preflight(trained_on(), str(workdir)) == 1
    assert "1 problem found" in capsys.readouterr().out
    write_scan(scans / "train" / "7_T101.t5")
    assert preflight(trained_on(seed=1, data__dir=str(scans)), str(workdir)) == 1
    screen = capsys.readouterr().out
    assert "holds another run: config.seed was 0 and is 1" in screen
    assert "was trained on 3 files, 12 slices" in screen
    assert "3 problems found" in screen


def test_a_loss_that_is_not_finite_is_a_problem(trained_on, tmp_path: Path, capsys, monkeypatch) -> None:
    step = CompiledTrainStep.__call__

    def skip(self: CompiledTrainStep, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = step(self, state, batch)
        return state, metrics | {"skipped": 1.0}

    monkeypatch.setattr(CompiledTrainStep, "__call__", skip)
    assert preflight(trained_on(), str(tmp_path / "run")) == 1
    assert "PROBLEM  the loss or its gradient is not finite in 4 of the first 4 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_says_by_its_status_whether_there_is_a_problem(
    scans: Path, tmp_path: Path, small_config: Path
) -> None:
    flags = [f"--config={small_config}", f"--workdir={tmp_path / 'run'}", f"--config.data.dir={scans}", "--preflight"]
    result = run_command("main", *flags)
    assert (result.returncode, "no problems found" in result.stdout) == (0, True)
    result = run_command("main", *flags, "--config.batch_size=7")
    assert (result.returncode, "PROBLEM  config.batch_size is 7" in result.stdout) == (1, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_denoising_is_inspected_with_its_moved_repetitions_as_facts(tiny, tmp_path: Path, capsys) -> None:
    for split in ("train", "val"):
        write_repetitions(tmp_path / split, f"{split}_T1", moved={2: 5}, size=(32, 32), count=3)
    assert preflight(tiny(tmp_path, task="denoise", batch_size=8), str(tmp_path / "run")) in (0, 1)
    screen = capsys.readouterr().out
    assert "WARNING  left out: " in screen
    assert os.path.join("train", "train_T102.h5") in screen
