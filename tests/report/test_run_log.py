"""What a run logs: one interval late, without waiting for the device, and never a state that is not finite."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mrjax.errors import UserError
from mrjax.report.run_log import Meter, RunLog, read_rows


class Rows:
    """Stands for a RunLog."""

    class bar:
        @staticmethod
        def update() -> None: ...

    def __init__(self):
        self.rows = []

    def open_board(self) -> None: ...

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step} | values)


def metrics(loss: float) -> dict[str, jax.Array]:
    return {name: jax.numpy.float32(loss) for name in ("loss", "grad_norm", "param_norm", "learning_rate")}


def meter(log: Rows, **changes) -> Meter:
    return Meter(log, **({"start": 0, "steps": 7, "batch_size": 8, "log_every": 3} | changes))


def test_intervals_are_logged_one_late_and_the_rest_at_the_end() -> None:
    log = Rows()
    timer = meter(log)
    for step in range(1, 8):
        timer.add(step, metrics(step))
        assert [row["step"] for row in log.rows] == ([3] if step >= 6 else [])
    timer.flush(last=True)
    assert [(row["step"], row["loss"]) for row in log.rows] == [(3, 2.0), (6, 5.0), (7, 7.0)]
    assert all(row["images_per_second"] > 0 for row in log.rows)


def test_metrics_that_are_not_finite_stop_the_run() -> None:
    timer = meter(Rows(), log_every=1)
    timer.add(1, metrics(1.0))
    timer.add(2, metrics(np.inf))
    with pytest.raises(UserError, match=r"the \w+ is inf at step 2, expected a finite one"):
        timer.flush(last=False)


def test_a_run_that_waits_for_its_data_says_which_fields_to_change(caplog) -> None:
    values = [{name: np.float32(1) for name in ("loss", "grad_norm", "param_norm", "learning_rate")}]
    for share, warned in ((0.04, False), (0.12, True)):
        caplog.clear()
        log = Rows()
        timer = meter(log)
        timer._unreported = (1, values, {"images_per_second": 10.0, "data_wait": share})
        # Nothing is computed for it on the device: that would wait for all steps in flight.
        with caplog.at_level("INFO", "mrjax"), jax.transfer_guard("disallow"):
            timer._report()
        assert log.rows[0]["data_wait"] == share
        assert any("waited for data 12 %" in text and "config.data.cache" in text for text in caplog.messages) == warned


def test_rows_newer_than_the_step_a_run_resumes_from_are_cut_off(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    with RunLog(str(tmp_path), start=4, steps=10) as log:
        log.open_board()
        log.write_scalars(5, {"loss": 0.5})
        log.write_images(5, "x", {name: np.ones((4, 4)) for name in ("corrupted", "reconstruction", "target")})
    assert [row["step"] for row in read_rows(str(tmp_path))] == [2, 4, 5]
    assert list((tmp_path / "tensorboard").iterdir())
