"""Log a run: the means over an interval of steps, a progress bar, metrics.jsonl and loggers."""

import collections
import contextlib
import datetime
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict

from mrjax.io.files import replacing, to_json
from mrjax.report.loggers import LOGGERS, Logger

logger = logging.getLogger("mrjax.train")
FIRST_STEP = "the first step is done"
Metrics = dict[str, jax.Array]


class NotFiniteError(Exception):
    """Too many steps in a row were skipped, for a loss or gradient that is not finite; `step` is the last of them."""

    def __init__(self, step: int, skipped: int):
        super().__init__(f"the loss or its gradient was not finite in {skipped} steps in a row, up to step {step}")
        self.step = step


class RunLog(contextlib.AbstractContextManager["RunLog"]):
    """Times the steps from `start` + 1 to `steps`, and logs them one interval of `log_every` steps late.

    So the device never waits for the log. A step has `batch_size` slices, over all devices. The first process alone
    writes metrics.jsonl, to `config.loggers` and a progress bar; rows newer than `start` are cut off. A logger that
    fails is dropped with a warning. After `config.max_skipped_steps` skipped steps in a row, all processes raise a
    `NotFiniteError`.
    """

    def __init__(self, workdir: str, config: ConfigDict, start: int):
        self._file = Path(workdir) / "metrics.jsonl"
        self._config, self._loggers = config, dict[str, Logger]()
        self._start, self._steps, self._batch_size = start, config.steps, config.batch_size
        self._log_every, self._max_skipped = config.log_every, config.max_skipped_steps
        self._step, self._skipped_in_a_row, self._unwritten = start, 0, ""
        self._metrics: list[Metrics] = []
        self._in_flight: collections.deque[Metrics] = collections.deque(maxlen=3)
        self._unreported: tuple[int, list[Metrics], dict[str, float]] | None = None
        self._active = jax.process_index() == 0
        self._unopened = list(config.loggers) if self._active else []
        if self._active:
            rows = [row for row in read_rows(workdir) if row["step"] <= start]
            with replacing(self._file) as part:
                part.write_text("".join(map(to_json, rows)))
        # None: a bar needs a terminal; elsewhere the log's lines say the same.
        disable = None if self._active else True
        self._bar = tqdm.tqdm(total=self._steps, initial=start, unit="step", disable=disable, dynamic_ncols=True)
        self.restart_clock()

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
        self._to_loggers(lambda logger: logger.close(failed=exception[0] is not None))

    def wait_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches, timing how long the device had nothing left to do while one was awaited."""
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            if self._in_flight and self._in_flight[-1]["loss"].is_ready():  # type: ignore[attr-defined]
                self._waited += time.perf_counter() - asked
            yield batch

    def add(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step just dispatched.

        At most two steps are in flight when this returns: more would only fill the device's memory with batches.
        """
        self._step = step
        self._metrics.append(metrics)
        self._in_flight.append(metrics)
        jax.block_until_ready(self._in_flight[0])
        if step == self._start + 1:
            jax.block_until_ready(metrics)
            logger.info(FIRST_STEP)
            self._open_loggers()
            self.restart_clock()  # the first step is slower than all others
        elif step % self._log_every == 0:
            self._close_interval()
        self._bar.update()

    def flush(self, *, last: bool) -> None:
        """Log complete intervals, all if `last`."""
        if last and self._metrics:
            self._close_interval()
        self._report()

    def restart_clock(self) -> None:
        """Leave out of the timing what was done since the last step."""
        self._timed_from, self._clock, self._waited = self._step, time.perf_counter(), 0.0

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a row of metrics.jsonl and a point of each curve; rows wait while the disk is full."""
        if not self._active:
            return
        self._unwritten += to_json({"step": step, **values})
        size = self._file.stat().st_size
        try:
            with self._file.open("a") as file:
                file.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:
            os.truncate(self._file, size)
            logger.warning("the log of step %d cannot be written: %s", step, error)
            return
        self._open_loggers()
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._to_loggers(lambda logger: logger.write_scalars(step, finite))

    def write_images(self, step: int, name: str, images: dict[str, np.ndarray]) -> None:
        """Draw corrupted input, reconstruction, target and error x 4, (height, width) each, side by side."""
        if not self._active:
            return
        white = float(images["target"].max()) or 1.0
        error = 4 * np.abs(images["reconstruction"] - images["target"])
        row = np.hstack([images["corrupted"], images["reconstruction"], images["target"], error])
        self._to_loggers(lambda logger: logger.write_image(step, name, np.clip(row / white, 0, 1)))

    def _open_loggers(self) -> None:
        """Open the loggers, once; not before the first step, as their imports take seconds."""
        while self._unopened:
            name = self._unopened.pop(0)
            with self._dropped_on_failure(name):
                self._loggers[name] = LOGGERS[name](self._file.parent.absolute(), self._config, self._start)

    def _to_loggers(self, write: Callable[[Logger], None]) -> None:
        for name, opened in list(self._loggers.items()):
            with self._dropped_on_failure(name):
                write(opened)

    @contextlib.contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a package or a network: none is worth a run
            self._loggers.pop(name, None)
            logger.warning("%s fails, and the run goes on without it until it is started again: %s", name, error)

    def _close_interval(self) -> None:
        self._report()
        seconds = time.perf_counter() - self._clock
        speed = (self._step - self._timed_from) * self._batch_size / seconds
        # data_wait: the share of the time in which the device had nothing to do but wait for data, at most
        timing = {"images_per_second": speed, "data_wait": self._waited / seconds}
        self._unreported, self._metrics = (self._step, self._metrics, timing), []
        self.restart_clock()

    def _report(self) -> None:
        if self._unreported is None:
            return
        (step, on_device, timing), self._unreported = self._unreported, None
        metrics = jax.device_get(on_device)
        skipped = int(sum(values["skipped"] for values in metrics))
        done = [values for values in metrics if not values["skipped"]] or metrics
        means = {name: statistics.fmean(float(values[name]) for values in done) for name in metrics[0]}
        last = {"learning_rate": float(metrics[-1]["learning_rate"]), "skipped": skipped}
        self.write_scalars(step, means | last | timing)
        if skipped:
            logger.warning("skipped %d of %d steps: their loss or gradient was not finite", skipped, len(metrics))
        for number, values in enumerate(metrics, step - len(metrics) + 1):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if values["skipped"] else 0
            if self._skipped_in_a_row == self._max_skipped:
                raise NotFiniteError(number, self._max_skipped)
        speed, left = timing["images_per_second"], (self._steps - step) * self._batch_size
        logger.info(
            "step %d/%d  loss %.5f  %.1f images/s  %s left",
            *(step, self._steps, means["loss"], speed, datetime.timedelta(seconds=round(left / max(speed, 1e-3)))),
        )
        if timing["data_wait"] > 0.05:
            logger.warning(
                "waited for data %.0f %% of the time: set config.data.cache to 'host' or 'device', or raise "
                "config.data.workers or config.data.prefetch",
                100 * timing["data_wait"],
            )


def read_rows(workdir: str) -> list[dict[str, Any]]:
    """Read the rows of a run's metrics.jsonl: null is NaN; a damaged line, as one cut short by a kill, is left out."""
    rows, file = [], Path(workdir) / "metrics.jsonl"
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            values = json.loads(line)
            rows.append({name: math.nan if value is None else value for name, value in values.items()})
    return [row for row in rows if "step" in row]
