"""Checkpoints: which are kept, how damage is found, a full disk, two runs in one workdir, and where a run goes on."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, to_kspace, write_volume
from test_train import checkpoint_steps, equal, losses, parameters, rows

from mrjax import train
from mrjax.checkpoint import run, store
from mrjax.errors import UserError
from mrjax.experiment import Experiment
from mrjax.inference import Inference
from mrjax.io.files import lock
from mrjax.measures import evaluator
from mrjax.parallel import processes

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw none: it takes a third of so short a run, and `test_train.py` looks at them."""
    monkeypatch.setattr("mrjax.report.figures.draw_curves", lambda *_: None)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def files_of(workdir: Path, step: int) -> list[Path]:
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def largest_of(workdir: Path, step: int) -> Path:
    return max(files_of(workdir, step), key=lambda path: path.stat().st_size)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


def truncate(workdir: Path) -> None:
    largest = largest_of(workdir, 6)
    os.truncate(largest, largest.stat().st_size // 2)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "a flipped byte": lambda workdir: flip(largest_of(workdir, 6), 1000),
    "a missing file": lambda workdir: largest_of(workdir, 6).unlink(),
    "emptied": lambda workdir: [file.write_bytes(b"") for file in files_of(workdir, 6)],
    "an empty folder": lambda workdir: [file.unlink() for file in files_of(workdir, 6)],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(damage: str, copied: Path, caplog) -> None:
    assert store.find_whole(str(copied)) == 6
    DAMAGE[damage](copied)
    assert store.find_whole(str(copied)) == 4
    assert f"{copied}/checkpoints/6 is damaged" in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_as_if_nothing_had_been(
    copied: Path, trained: Path, trained_on
) -> None:
    truncate(copied)
    train.train(trained_on(), str(copied))
    assert equal(parameters(copied), parameters(trained))
    assert [row["step"] for row in rows(copied)] == [2, 3, 4, 6, 6]
    assert {4, 6} <= checkpoint_steps(copied)
    assert store.find_whole(str(copied)) == 6


def test_damaged_checkpoints_do_not_count_among_the_newest_two(copied: Path, trained_on) -> None:
    truncate(copied)
    train.train(trained_on(steps=5, eval_every=100), str(copied))
    assert {4, 5} <= checkpoint_steps(copied)
    assert 6 not in checkpoint_steps(copied)


def test_no_flipped_bytes_are_read_as_other_parameters(copied: Path, trained: Path) -> None:
    chance, before = random.Random(0), parameters(trained)
    originals = {file: file.read_bytes() for file in files_of(copied, 6)}
    for _ in range(24):
        for file in chance.choices([file for file in originals if originals[file]], k=4):
            flip(file, chance.randrange(len(originals[file])))
        assert store.find_whole(str(copied)) == 4 or equal(parameters(copied), before)
        for file, data in originals.items():
            file.write_bytes(data)


def test_a_run_never_starts_anew_over_damaged_checkpoints(copied: Path, trained_on) -> None:
    for step in checkpoint_steps(copied):
        largest_of(copied, step).unlink()
    before = (copied / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="all its checkpoints are damaged, expected a whole one"):
        train.train(trained_on(steps=8), str(copied))
    assert (copied / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[6]", '{"step": "6"}'])
def test_a_damaged_note_of_the_best_checkpoint_is_none(text: str, copied: Path) -> None:
    (copied / "checkpoints" / "best.json").write_text(text)
    assert Inference.restore(str(copied)).source == {"step": 6}


def test_a_damaged_config_is_read_from_a_checkpoint(copied: Path, trained_on) -> None:
    (copied / "config.json").write_text('{"model": {')
    with pytest.raises(UserError, match=r"config\.seed was 0 and is 1"):
        train.train(trained_on(seed=1), str(copied))
    train.train(trained_on(steps=7), str(copied))
    assert max(checkpoint_steps(copied)) == 7


def test_inference_takes_another_checkpoint_than_a_damaged_best_one(copied: Path, caplog) -> None:
    best = json.loads((copied / "checkpoints" / "best.json").read_text())["step"]
    assert Inference.restore(str(copied)).source == {"step": best}
    flip(largest_of(copied, best), 1000)
    assert Inference.restore(str(copied)).source == {"step": max(checkpoint_steps(copied) - {best})}
    assert f"checkpoints/{best} is damaged" in caplog.text


def test_the_newest_two_and_the_best_are_kept(trained_on, tmp_path: Path, monkeypatch) -> None:
    values = iter([0.1, 0.9, 0.3, 0.2])
    summarise = evaluator.summarise

    def summary(found: list) -> dict:
        result = summarise(found)
        result["all"]["reconstruction"]["ssim"]["mean"] = next(values)
        return result

    monkeypatch.setattr(evaluator, "summarise", summary)
    train.train(trained_on(steps=4, eval_every=1, checkpoint_every=1), str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"] == 2
    assert checkpoint_steps(tmp_path / "run") == {2, 3, 4}


@pytest.mark.parametrize(
    "error", [UserError("8_T101.t5: is truncated"), pytest.param(RuntimeError("a fault"), marks=pytest.mark.slow)]
)
def test_a_fault_during_validation_costs_no_step(
    error: Exception, trained: Path, trained_on, tmp_path: Path, monkeypatch
) -> None:
    workdir, config = tmp_path / "run", trained_on(eval_every=5, checkpoint_every=100)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(evaluator, "evaluate", fail)
        with pytest.raises(type(error), match=str(error)):
            train.train(config, str(workdir))
    assert checkpoint_steps(workdir) == {5}
    train.train(config, str(workdir))
    assert equal(parameters(workdir), parameters(trained))
    assert [row["step"] for row in rows(workdir) if "val/ssim" in row] == [5, 6]


def test_a_fault_of_the_data_costs_no_step(trained: Path, trained_on, tmp_path: Path, monkeypatch) -> None:
    workdir, config = tmp_path / "run", trained_on(eval_every=100, checkpoint_every=100)
    reading = Experiment.training_batches

    def break_off(self: Experiment, start: int, order: int = 0) -> Iterator:
        with reading(self, start, order) as batches:
            for _ in range(3):
                yield next(batches)
            raise UserError("1_T101.t5: is truncated")

    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "training_batches", lambda *given: contextlib.nullcontext(break_off(*given)))
        with pytest.raises(UserError, match="is truncated"):
            train.train(config, str(workdir))
    assert checkpoint_steps(workdir) == {3}
    train.train(config, str(workdir))
    assert equal(parameters(workdir), parameters(trained))


def test_a_stop_between_validation_batches_is_obeyed_and_the_validation_made_up_for(
    trained: Path, trained_on, tmp_path: Path, monkeypatch
) -> None:
    workdir, config = tmp_path / "run", trained_on(checkpoint_every=100)
    until_stopped = processes.until_stopped

    def interrupted(batches: Iterator, should_stop: Callable[[], bool]) -> Iterator:
        os.kill(os.getpid(), signal.SIGTERM)
        return until_stopped(batches, should_stop)

    with monkeypatch.context() as patched:
        patched.setattr(processes, "until_stopped", interrupted)
        train.train(config, str(workdir))
    assert checkpoint_steps(workdir) == {3}
    assert not [row for row in rows(workdir) if "val/ssim" in row]
    train.train(config, str(workdir))
    assert equal(parameters(workdir), parameters(trained))
    assert [row["step"] for row in rows(workdir) if "val/ssim" in row] == [3, 6]


def test_a_save_that_fails_is_tried_again_and_the_last_checkpoints_stay(
    trained: Path, trained_on, tmp_path: Path, monkeypatch, caplog
) -> None:
    """The disk is full when the save of step 3 writes its last file, in Orbax's thread, and when that of 4 begins."""
    workdir, saved = tmp_path / "run", []
    write_checksums, begin, save = store.write_checksums, store.save, run.Run.save
    close, failures = store._Manager.close, iter([FULL])

    def fill(folder: Path) -> None:
        if folder.name[0] == "3":
            raise FULL
        write_checksums(folder)

    def fill_before(manager: object, state: object, progress: dict, config: object) -> None:
        if progress["step"] == 4:
            raise FULL
        begin(manager, state, progress, config)

    def close_and_fail(self: store._Manager) -> None:
        close(self)
        if failure := next(failures, None):
            raise failure

    def record(self: run.Run, *arguments: object) -> None:
        save(self, *arguments)
        self._finish()
        saved.append(checkpoint_steps(workdir))

    monkeypatch.setattr(store, "write_checksums", fill)
    monkeypatch.setattr(store, "save", fill_before)
    monkeypatch.setattr(store._Manager, "close", close_and_fail)
    monkeypatch.setattr(run.Run, "save", record)
    train.train(trained_on(checkpoint_every=1, eval_every=100), str(workdir))
    assert saved == [{1}, {1, 2}, {1, 2}, {1, 2}, {2, 5}, {5, 6}]
    assert not list(workdir.glob("checkpoints/*tmp*"))
    assert caplog.text.count("a checkpoint could not be written") == 2
    assert equal(parameters(workdir), parameters(trained))


def test_a_full_disk_at_a_validation_does_not_end_the_run(trained_on, tmp_path: Path, monkeypatch, caplog) -> None:
    workdir, failures, write_json = tmp_path / "run", iter([FULL]), run.write_json

    def fill(path: Path, values: object) -> None:
        if path.name == "best.json" and (failure := next(failures, None)):
            raise failure
        write_json(path, values)

    monkeypatch.setattr(run, "write_json", fill)
    train.train(trained_on(), str(workdir))
    assert "best.json is not written before the next validation" in caplog.text
    assert json.loads((workdir / "checkpoints" / "best.json").read_text())["validated"] == 6


def test_a_full_disk_is_said_with_the_bytes_needed_and_free(trained_on, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(run, "_free", lambda workdir: 500_000)
    with pytest.raises(UserError, match=r"step 6 is not saved: it takes 1\.\d MB, .* has 0\.5 MB free"):
        train.train(trained_on(), str(tmp_path / "run"))
    assert "checkpoints of 1.1 MB each take up to 4.5 MB more" in caplog.text
    assert len([line for line in caplog.messages if "tries again at the next checkpoint" in line]) == 4


def test_a_second_run_in_a_workdir_is_refused_until_the_first_has_ended(trained_on, copied: Path) -> None:
    statement = "import sys; from mrjax.io.files import lock; held = lock(sys.argv[1]); print('held'); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", statement, str(copied)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is in use by process {first.pid} on .*, expected its end"):
        train.train(trained_on(steps=8), str(copied))
    first.kill()
    first.wait()
    with lock(str(copied)):
        pass


def test_steps_that_are_not_finite_are_skipped_and_counted(trained_on, scans: Path, tmp_path: Path) -> None:
    kspace = to_kspace(coil_images(40, 2, 32, 32))
    kspace[7] *= 1e25  # finite, but its squares are not
    write_volume(scans / "train" / "0_T101.t5", {"kspace": kspace.astype(np.complex64)})
    train.train(trained_on(data__dir=str(scans), data__check="headers", max_skipped_steps=3), str(tmp_path / "run"))
    skipped = sum(row.get("skipped", 0) for row in rows(tmp_path / "run"))
    assert 1 <= skipped < 6
    assert all(np.isfinite(x).all() for x in parameters(tmp_path / "run"))


def test_skipped_steps_in_a_row_bring_another_order(trained_on, tmp_path: Path, monkeypatch, caplog) -> None:
    reading = Experiment.training_batches

    @contextlib.contextmanager
    def faulty(self: Experiment, start: int, order: int = 0) -> Iterator:
        with reading(self, start, order) as batches:
            scale = np.float32(1 if order else np.nan)
            yield (
                batch | ({"kspace": batch["kspace"] * scale} if step > 2 else {})
                for step, batch in enumerate(batches, start + 1)
            )

    monkeypatch.setattr(Experiment, "training_batches", faulty)
    train.train(trained_on(max_skipped_steps=2), str(tmp_path / "run"))
    assert "2 steps in a row, up to step 4: going back to the last checkpoint" in caplog.text
    assert checkpoint_steps(tmp_path / "run") >= {6}
    assert all(np.isfinite(x).all() for x in parameters(tmp_path / "run"))
    assert losses(tmp_path / "run").keys() == {2, 6}  # the checkpoint of step 3 holds the state of step 2


def test_a_run_that_stays_not_finite_ends_and_leaves_the_batch(scans: Path, trained_on, tmp_path: Path) -> None:
    kspace = 1e25 * to_kspace(coil_images(5, 2, 32, 32))
    write_volume(scans / "train" / "0_T101.t5", {"kspace": kspace.astype(np.complex64)})
    fields = {"data__dir": str(scans), "data__check": "headers", "checkpoint_every": 1, "max_skipped_steps": 2}
    with pytest.raises(UserError, match=r"2 steps in a row.*bad_batch\.t5 holds the batch of that step"):
        train.train(trained_on(**fields), str(tmp_path / "run"))
    with h5py.File(tmp_path / "run" / "bad_batch.t5") as file:
        assert np.abs(file["kspace"][()]).max() > 1e20
        assert len(file["kspace"]) == len(file.attrs["files"]) == 8
        assert str(scans / "train" / "0_T101.t5") in file.attrs["files"]
    assert all(np.isfinite(x).all() for x in parameters(tmp_path / "run"))
