"""Watching a run: a progress bar, metrics.jsonl and TensorBoard files."""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm


class Watch:
    """Writes what a run reports, on the first process only; what is newer than the step it starts from is cut off."""

    def __init__(self, workdir: str, start: int, steps: int):
        self._file = Path(workdir) / "metrics.jsonl"
        self._start = start
        self._active = jax.process_index() == 0
        if self._active:
            rows = [row for row in read_rows(workdir) if row["step"] <= start]
            part = self._file.with_name(".metrics.jsonl.part")
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(part, self._file)
        # A bar needs a terminal; elsewhere the log's lines say the same.
        visible = self._active and sys.stderr.isatty()
        self.bar = tqdm.tqdm(total=steps, initial=start, unit="step", disable=not visible, dynamic_ncols=True)

    @functools.cached_property
    def _board(self) -> Any:
        import tensorboardX  # which imports PyTorch where there is one: the first step need not wait for that

        return tensorboardX.SummaryWriter(str(self._file.with_name("tensorboard")), purge_step=self._start + 1)

    def open_board(self) -> None:
        """Opens the TensorBoard file now, which takes seconds, rather than in the middle of a timed interval."""
        if self._active:
            _ = self._board

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A row of metrics.jsonl and a point of each curve."""
        if self._active:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def image(self, step: int, name: str, images: dict[str, np.ndarray]) -> None:
        """Corrupted input, reconstruction, truth and error x 4, (height, width) each, side by side."""
        if self._active:
            white = float(images["target"].max()) or 1.0
            error = 4 * np.abs(images["reconstruction"] - images["target"])
            row = np.hstack([images["corrupted"], images["reconstruction"], images["target"], error])
            self._board.add_image(name, np.clip(row / white, 0, 1)[None], step)

    def close(self) -> None:
        """Writes out what is left."""
        self.bar.close()
        if self._active:
            self._board.close()


def read_rows(workdir: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    file = Path(workdir) / "metrics.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
