"""What a run logs: one interval late, without waiting for the device, and which steps were skipped."""

import errno
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mrjax.config import defaults
from mrjax.report.run_log import NotFiniteError, RunLog, read_rows

NAMES = ("loss", "grad_norm", "param_norm", "learning_rate")


def metrics(loss: float, skipped: bool = False) -> dict[str, jax.Array]:
    return {name: jax.numpy.float32(loss) for name in NAMES} | {"skipped": jax.numpy.float32(skipped)}


def run_log(workdir: Path, start: int = 0, log_every: int = 3) -> RunLog:
    config = defaults()
    config.steps, config.batch_size, config.log_every, config.max_skipped_steps = 7, 8, log_every, 3
    return RunLog(str(workdir), config, start)


def test_intervals_are_logged_one_late_and_the_rest_at_the_end(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        for step in range(1, 8):
            log.add(step, metrics(step))
            assert [row["step"] for row in read_rows(str(tmp_path))] == ([3] if step >= 6 else [])
        log.flush(last=True)
    rows = read_rows(str(tmp_path))
    assert [(row["step"], row["loss"]) for row in rows] == [(3, 2.0), (6, 5.0), (7, 7.0)]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_skipped_steps_are_counted_left_out_of_the_means_and_too_many_in_a_row_end_it(tmp_path: Path, caplog) -> None:
    with run_log(tmp_path, log_every=2) as log:
        for step in range(1, 4):
            log.add(step, metrics(step, skipped=step == 2))
        log.flush(last=True)
        assert [(row["loss"], row["skipped"]) for row in read_rows(str(tmp_path))] == [(1.0, 1), (3.0, 0)]
        assert "skipped 1 of 2 steps" in caplog.text
        for step in range(4, 7):
            log.add(step, metrics(np.nan, skipped=True))
        with pytest.raises(NotFiniteError, match="in 3 steps in a row, up to step 6"):
            log.flush(last=True)


def test_a_run_that_waits_for_its_data_says_which_fields_to_change(tmp_path: Path, caplog) -> None:
    values = [{name: np.float32(1) for name in NAMES} | {"skipped": np.float32(0)}]
    with run_log(tmp_path) as log:
        log.add(1, metrics(1.0))
        for share, warned in ((0.04, False), (0.12, True)):
            caplog.clear()
            log._unreported = (2, values, {"images_per_second": 10.0, "data_wait": share})
            # Nothing is computed for it on the device: that would wait for all steps in flight.
            with caplog.at_level("INFO", "mrjax"), jax.transfer_guard("disallow"):
                log._report()
            assert read_rows(str(tmp_path))[-1]["data_wait"] == share
            told = any("waited for data 12 %" in text and "config.data.cache" in text for text in caplog.messages)
            assert told == warned


def test_rows_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch, caplog) -> None:
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def write(self, text: str) -> None:
            (tmp_path / "metrics.jsonl").write_text(text[:9])

    with run_log(tmp_path) as log:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", lambda *_: Full())
            log.write_scalars(1, {"loss": 0.5})
        assert "the log of step 1 cannot be written" in caplog.text
        assert (tmp_path / "metrics.jsonl").read_text() == ""
        log.write_scalars(2, {"loss": 0.4})
    assert [row["step"] for row in read_rows(str(tmp_path))] == [1, 2]


def test_rows_newer_than_the_step_a_run_resumes_from_are_cut_off(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(["[1", "3", *lines]) + '\n{"step": 8, "lo')
    with run_log(tmp_path, start=4) as log:
        log.add(5, metrics(1.0))
        log.write_scalars(5, {"loss": 0.5})
        log.write_images(5, "x", {name: np.ones((4, 4)) for name in ("corrupted", "reconstruction", "target")})
    assert [row["step"] for row in read_rows(str(tmp_path))] == [2, 4, 5]
    assert list((tmp_path / "tensorboard").iterdir())
