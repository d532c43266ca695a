"""Loggers by name: TensorBoard, Weights & Biases, MLflow; a new one is a class and a line in `LOGGERS`."""

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mrjax.errors import expect
from mrjax.io.files import write_json

T = TypeVar("T")


class Logger(Protocol):
    """Where process 0 logs a run; RunLog drops a logger that raises, and training goes on.

    Attributes:
      package: the module it imports, late, as that takes seconds.
    """

    package: str

    def __init__(self, workdir: Path, config: ConfigDict, start: int) -> None:
        """Open the log of the run in `workdir`, to go on after step `start`."""

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Log finite values of a step."""

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log an image (height, width), float32 from 0 to 1."""

    def close(self, *, failed: bool) -> None:
        """Write what is left, and say whether an error ended the run."""


class TensorBoard:
    """Event files in <workdir>/tensorboard; TensorBoard hides points after `start` that earlier files hold."""

    package = "tensorboardX"

    def __init__(self, workdir: Path, config: ConfigDict, start: int) -> None:
        import tensorboardX  # takes seconds, as it imports PyTorch where there is one

        # A queue without an end: on a full disk the thread that empties it dies, and would be waited for.
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1, max_queue=0)

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an image."""
        self._writer.add_image(name, image[None], step)

    def close(self, *, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()


class SentRows:
    """A run's id at a service and the last step sent of each name, in a file of the workdir.

    A resumed run repeats the steps after its checkpoint. A service cannot take back what it has of them, so they are
    not sent again.
    """

    def __init__(self, file: Path, new_id: Callable[[], str]) -> None:
        self._file = file
        try:
            self._values: dict[str, Any] = json.loads(file.read_text())
            self.is_new = False
        except (OSError, ValueError):
            self._values, self.is_new = {"id": new_id(), "last_step": {}}, True
            write_json(file, self._values)

    @property
    def id(self) -> str:
        """The id of the run."""
        return self._values["id"]

    def select_unsent(self, step: int, values: dict[str, T]) -> dict[str, T]:
        """Return the values that were not sent for this or a later step, and note that they are."""
        last = self._values["last_step"]
        unsent = {name: value for name, value in values.items() if step > last.get(name, -1)}
        if unsent:
            last.update(dict.fromkeys(unsent, step))
            write_json(self._file, self._values)
        return unsent


class WandB:
    """A run of Weights & Biases, in the project WANDB_PROJECT or `mrjax`; its id is in <workdir>/wandb.json."""

    package = "wandb"

    def __init__(self, workdir: Path, config: ConfigDict, start: int) -> None:
        import wandb

        self._to_image = wandb.Image
        self._sent = SentRows(workdir / "wandb.json", lambda: uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mrjax"),
            name=workdir.name,
            dir=workdir,
            id=self._sent.id,
            resume="allow",
            config=config.to_dict(),
            allow_val_change=True,  # of resumable fields
            # The console names files of patients. At the end, without a network, W&B would wait for it for ever.
            settings=wandb.Settings(console="off", finish_timeout=60),
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own step numbers the rows, two of which share a step

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Send a row."""
        if unsent := self._sent.select_unsent(step, values):
            self._run.log({"step": step, **unsent})

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Send an image."""
        if self._sent.select_unsent(step, {name: image}):
            self._run.log({"step": step, name: self._to_image((255 * image).astype(np.uint8), mode="L")})

    def close(self, *, failed: bool) -> None:
        """Wait until all is uploaded, a minute at most."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, in the experiment MLFLOW_EXPERIMENT_NAME or `mrjax`; its id is in <workdir>/mlflow.json."""

    package = "mlflow"

    def __init__(self, workdir: Path, config: ConfigDict, start: int) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # by default 7: minutes in which training waits
        import mlflow
        from mlflow import entities

        self._entities, self._client = entities, mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mrjax")

        def create_run() -> str:
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            return self._client.create_run(experiment_id, run_name=workdir.name).info.run_id

        self._sent = SentRows(workdir / "mlflow.json", create_run)
        if self._sent.is_new:  # parameters of MLflow never change
            fields = flatten_dict(config.to_dict(), sep=".")
            params = [entities.Param(name, str(value)) for name, value in fields.items()]
            for first in range(0, len(params), 100):  # as many as MLflow takes at once
                self._client.log_batch(self._sent.id, params=params[first : first + 100])
        self._client.update_run(self._sent.id, status="RUNNING")

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Send a row."""
        now, unsent = int(1000 * time.time()), self._sent.select_unsent(step, values)
        if unsent:
            metrics = [self._entities.Metric(name, value, now, step) for name, value in unsent.items()]
            self._client.log_batch(self._sent.id, metrics=metrics)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Send an image."""
        if self._sent.select_unsent(step, {name: image}):
            self._client.log_image(self._sent.id, (255 * image).astype(np.uint8), key=name, step=step)

    def close(self, *, failed: bool) -> None:
        """Note how the run ended."""
        self._client.set_terminated(self._sent.id, "FAILED" if failed else "FINISHED")


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def require_installed(names: Iterable[str]) -> None:
    """Raise a `UserError` if the package of a logger in config.loggers is not installed."""
    for name in names:
        found = f"config.loggers has {name!r}, which is not installed"
        expect(importlib.util.find_spec(LOGGERS[name].package), found, f"pip install 'mrjax[{name}]'")
