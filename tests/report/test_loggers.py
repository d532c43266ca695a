"""Where a run is logged: what a resumed run adds, and that no logger ends a run."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mrjax.config import check, defaults
from mrjax.errors import UserError
from mrjax.experiment import Experiment
from mrjax.report.loggers import LOGGERS, SentRows
from mrjax.report.run_log import RunLog, read_rows
from mrjax.train import train

IMAGES = {name: np.full((4, 6), 0.5, np.float32) for name in ("corrupted", "reconstruction", "target")}


class Failing:
    """A logger whose service is away: from the start, or once it is written to."""

    package = "json"
    calls = 0

    def __init__(self, workdir: Path, config: object, start: int) -> None:
        pass

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        type(self).calls += 1
        raise ConnectionError("no route to host")

    write_image = write_scalars  # type: ignore[assignment]

    def close(self, *, failed: bool) -> None:
        raise ConnectionError("no route to host")


class Refusing(Failing):
    def __init__(self, workdir: Path, config: object, start: int) -> None:
        raise ConnectionError("refused")


def run_log(workdir: Path, *names: str, start: int = 0) -> RunLog:
    config = defaults()
    config.steps, config.log_every, config.loggers = 7, 1, names
    return RunLog(str(workdir), config, start)


def write(log: RunLog, *steps: int) -> None:
    for step in steps:
        log.write_scalars(step, {"loss": step / 10, "grad_norm": float("nan")})


def interrupted_and_resumed(workdir: Path, name: str) -> None:
    """Log steps 1 to 4, stop in the validation of step 4, go back to step 2 and log to step 6, with validations."""
    with run_log(workdir, name) as log:
        write(log, 1, 2, 3, 4)
    with run_log(workdir, name, start=2) as log:
        write(log, 3, 4)
        for _ in range(2):  # the second as a run does that was killed after this
            log.write_scalars(4, {"val/ssim": 0.5})
            log.write_images(4, "val/1", IMAGES)
        write(log, 5, 6)


def read_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, position, record = file.read_bytes(), 7, b""
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:  # the end of a block, too short for a chunk
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last chunk
            yield record
            record = b""


def test_a_logger_that_fails_is_dropped_with_one_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(LOGGERS, "failing", Failing)
    monkeypatch.setitem(LOGGERS, "refusing", Refusing)
    monkeypatch.setattr(Failing, "calls", 0)
    with run_log(tmp_path, "failing", "refusing", "tensorboard") as log:
        write(log, 1, 2)
        log.write_images(2, "val/1", IMAGES)
    assert [row["step"] for row in read_rows(str(tmp_path))] == [1, 2]
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("failing fails" in text and "no route to host" in text for text in warnings) == 1
    assert sum("refusing fails" in text and "refused" in text for text in warnings) == 1
    assert Failing.calls == 1
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_package_that_is_missing_is_said_before_files_are_read(monkeypatch) -> None:
    monkeypatch.setattr(LOGGERS["wandb"], "package", "no_such_package")
    config = defaults()
    config.loggers, config.data.dir = ("wandb",), "nowhere"
    with pytest.raises(UserError, match=r"config\.loggers has 'wandb', which is not installed, .*mrjax\[wandb\]"):
        Experiment.from_config(config)


def test_names_of_loggers_are_checked() -> None:
    config = defaults()
    config.loggers = ("wandb", "tensorbord")
    with pytest.raises(UserError, match=r"config\.loggers is .*, expected any of tensorboard, wandb, mlflow"):
        check(config)


def test_other_processes_open_no_logger(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(LOGGERS, "failing", Failing)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with run_log(tmp_path, "failing") as log:
        write(log, 1)
        log.write_images(1, "val/1", IMAGES)
    assert not list(tmp_path.iterdir())


def test_a_row_is_sent_once_whichever_start_sends_it(tmp_path: Path) -> None:
    sent = SentRows(tmp_path / "x.json", lambda: "1")
    assert sent.select_unsent(3, {"loss": 1.0}) == {"loss": 1.0}
    resumed = SentRows(tmp_path / "x.json", lambda: "2")
    assert (resumed.id, resumed.is_new) == ("1", False)
    assert resumed.select_unsent(3, {"loss": 1.0, "val/ssim": 0.5}) == {"val/ssim": 0.5}
    assert resumed.select_unsent(2, {"loss": 1.0}) == {}
    (tmp_path / "x.json").write_text("{")  # damaged: another run at the service
    assert SentRows(tmp_path / "x.json", lambda: "2").id == "2"


@pytest.mark.watch
def test_mlflow_has_every_step_of_an_interrupted_run_once(tmp_path: Path, monkeypatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    interrupted_and_resumed(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mrjax").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["model.name"]) == ("run", "FINISHED", "unet")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, step / 10) for step in range(1, 7)]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/ssim")] == [4]
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert len([path for path in images if path.endswith(".png") and "val~1+step+4" in path]) == 1


@pytest.mark.watch
def test_wandb_has_every_step_of_an_interrupted_run_once(tmp_path: Path, monkeypatch) -> None:
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted_and_resumed(tmp_path / "run", "wandb")
    wandb.teardown()  # its files are whole when its service has ended, as at the end of a process
    ids, rows = set(), []
    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in read_records(file):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.display_name))
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert len(ids) == 1
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(step, step / 10) for step in range(1, 7)]
    assert [(row["step"], row["val/ssim"]) for row in rows if "val/ssim" in row] == [(4, 0.5)]
    assert [row["val/1/height"] for row in rows if "val/1/height" in row] == [4]


def test_the_last_lines_say_where_to_look_and_no_logger_is_told_a_files_name(
    trained_on: Callable[..., ConfigDict], tmp_path: Path, monkeypatch, caplog
) -> None:
    logged = []

    class Recording(Failing):
        def write_scalars(self, step: int, values: dict[str, float]) -> None:
            logged.extend(values)

        def write_image(self, step: int, name: str, image: np.ndarray) -> None:
            assert image.min() >= 0
            assert image.max() <= 1
            logged.append(name)

    monkeypatch.setitem(LOGGERS, "recording", Recording)
    workdir = tmp_path / "run"
    with caplog.at_level("INFO", "mrjax"):
        train(trained_on(loggers=("recording", "tensorboard"), steps=3), str(workdir))
    assert caplog.messages[-2].endswith(f"tensorboard --logdir={workdir}")
    assert str(workdir / "report-val.html") in caplog.messages[-1]
    assert {"loss", "val/ssim", "val/1"} <= set(logged)
    assert not any("8_T201" in name for name in logged)
