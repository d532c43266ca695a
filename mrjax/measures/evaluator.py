"""Volume metrics of batches on the devices, their summary over volumes, and the table of it.

Definitions are fastMRI's (evaluate.py): over whole volumes, with the volume's maximum as data range.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mrjax.data.volume import Volume
from mrjax.measures import metrics
from mrjax.measures.metrics import METRICS
from mrjax.parallel import sharding

METHODS = ("corrupted", "reconstruction")
PREVIEWS = 3  # volumes of which images are kept
Row = dict[str, Any]
Images = dict[str, np.ndarray]
Scores = dict[str, dict[str, dict[str, float]]]


class VolumeMetrics:
    """The metrics of volumes whose slices come in batches, in order.

    SSIM needs the maximum of a whole volume, so the images of a batch wait on the device until the last slice of every
    volume in it has been seen: a volume's worth at most.

    Args:
      score: `train_step.score`, jitted.
      volumes: what `volume` of the batches counts.
      mesh: of the devices.
    """

    def __init__(self, score: Callable[..., Any], volumes: list[Volume], mesh: Mesh):
        self._score, self._volumes, self._mesh = score, volumes, mesh
        self._peak = np.zeros(len(volumes), np.float32)
        self._unseen = np.array([volume.slices - len(volume.empty) for volume in volumes])
        self._values: list[dict[str, list[dict[str, Any]]]] = [{method: [] for method in METHODS} for _ in volumes]
        self._waiting: list[tuple[np.ndarray, np.ndarray, dict[str, jax.Array]]] = []

    def add(self, number: np.ndarray, valid: np.ndarray, images: dict[str, jax.Array], peaks: np.ndarray) -> None:
        """Add a batch.

        Args:
          number: (batch,) int32, of the volume of each slice.
          valid: (batch,) bool, False for slices that fill up a batch.
          images: from `train_step.predict`, on the devices.
          peaks: (batch,) float32, maximum of each target.
        """
        np.maximum.at(self._peak, number[valid], peaks[valid])
        np.subtract.at(self._unseen, number[valid], 1)
        self._waiting.append((number, valid, images))
        while self._waiting and not self._unseen[self._waiting[0][0]].any():
            number, valid, images = self._waiting.pop(0)
            data_range = jax.device_put(self._peak[number], sharding.by_example(self._mesh))
            for method, values in jax.device_get(self._score(images, data_range)).items():
                for i in np.flatnonzero(valid):
                    self._values[number[i]][method].append({name: value[i] for name, value in values.items()})

    def rows(self) -> list[Row]:
        """Return each volume's name, contrast, slices, and the metrics of its corrupted input and reconstruction."""
        rows = []
        for volume, of_volume, peak in zip(self._volumes, self._values, self._peak, strict=True):
            row = describe(volume)
            for method, slices in of_volume.items():
                values = {name: np.stack([one[name] for one in slices]) for name in METRICS}
                row[method] = metrics.volume_values(values, float(peak))
            rows.append(row)
        return rows


def evaluate(
    predict: Callable[..., Any],
    score: Callable[..., Any],
    batches: Iterator[dict[str, np.ndarray]],
    volumes: list[Volume],
    mesh: Mesh,
) -> tuple[list[Row], dict[str, Images]]:
    """Compute the metrics of every volume.

    Args:
      predict: `train_step.predict` of a batch, jitted.
      score: `train_step.score`, jitted.
      batches: this process's part of each, in order, with `valid`.
      volumes: what `volume` of the batches counts.
      mesh: of the devices.

    Returns:
      A row for each volume (`VolumeMetrics.rows`), and by the names of the first volumes the images of their middle
      slice: corrupted, reconstruction, target.
    """
    measured = VolumeMetrics(score, volumes, mesh)
    middle = {number: volume.slices // 2 for number, volume in enumerate(volumes[:PREVIEWS])}
    previews = {}
    for batch in sharding.to_devices(batches, mesh):
        images, peaks = predict(batch)
        number, position, valid = (sharding.on_host(batch[name], mesh) for name in ("volume", "slice", "valid"))
        for i in np.flatnonzero(valid):
            if middle.get(number[i]) == position[i]:
                previews[volumes[number[i]].name] = {
                    name: sharding.on_host(images[name], mesh)[i] for name in (*METHODS, "target")
                }
        measured.add(number, valid, images, np.asarray(peaks))
    return measured.rows(), previews


def describe(volume: Volume) -> Row:
    """Return what a row says of its volume: name, contrast, and how many slices count."""
    return {"volume": volume.name, "contrast": volume.contrast, "slices": volume.slices - len(volume.empty)}


def summarise(rows: list[Row]) -> dict[str, Scores]:
    """Return mean and standard deviation over volumes, by group ('all' and each contrast), method and metric."""
    contrasts = sorted({row["contrast"] for row in rows})
    return {
        group: {
            method: {
                name: _mean_and_deviation([row[method][name] for row in rows if group in ("all", row["contrast"])])
                for name in METRICS
            }
            for method in METHODS
        }
        for group in ["all", *contrasts]
    }


def _mean_and_deviation(values: list[float]) -> dict[str, float]:
    # A perfect volume has an infinite PSNR, and with it the deviation is no number.
    deviation = float(np.std(values)) if np.isfinite(values).all() else math.nan
    return {"mean": float(np.mean(values)), "std": deviation}


def table(rows: list[Row], labels: tuple[str, str]) -> str:
    """Format the summary, a line for each contrast and method: mean +- standard deviation over volumes.

    Args:
      rows: from `evaluate`.
      labels: of the corrupted input and of the reconstruction.
    """
    head = "".join(f"{metric.label:>18}" for metric in METRICS.values())
    lines = [f"{'contrast':<10}{'volumes':>8}  {'method':<12}{head}"]
    for group, methods in summarise(rows).items():
        count = sum(group in ("all", row["contrast"]) for row in rows)
        for method, label in zip(METHODS, labels, strict=True):
            scores = methods[method]
            cells = "".join(
                f"{_format(name, scores[name]['mean'])} \u00b1 {_format(name, scores[name]['std'])}".rjust(18)
                for name in METRICS
            )
            lines.append(f"{group:<10}{count:>8}  {label:<12}{cells}")
    return "\n".join(lines)


def one_line(scores: Scores) -> str:
    """Format the PSNR and SSIM of a summary, after and before."""
    after, before = scores["reconstruction"], scores["corrupted"]
    return ", ".join(
        f"{name.upper()} {_format(name, after[name]['mean'])} (corrupted {_format(name, before[name]['mean'])})"
        for name in ("psnr", "ssim")
    )


def _format(name: str, value: float) -> str:
    return f"{value:.{METRICS[name].decimals}f}"
