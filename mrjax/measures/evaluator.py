"""Volume metrics of batches on the devices, their summary over volumes, and the table of it.

Definitions are fastMRI's (evaluate.py): over whole volumes, with the volume's maximum as data range.
"""

import math
import operator
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
    """

    def __init__(self, score: Callable[..., Any], volumes: list[Volume], mesh: Mesh):
        self._score, self._volumes, self._mesh = score, volumes, mesh
        self._peak = np.zeros(len(volumes), np.float32)
        self._unseen = np.array([volume.slices - len(volume.empty) for volume in volumes])
        self._values: list[list[Any]] = [[] for _ in volumes]
        self._waiting: list[tuple[np.ndarray, np.ndarray, dict[str, jax.Array]]] = []

    def add(self, number: np.ndarray, valid: np.ndarray, images: dict[str, jax.Array], peaks: np.ndarray) -> None:
        """Add a batch: the number of each slice's volume, whether it counts, and what `train_step.predict` returns."""
        np.maximum.at(self._peak, number[valid], peaks[valid])
        np.subtract.at(self._unseen, number[valid], 1)
        self._waiting.append((number, valid, images))
        while self._waiting and not self._unseen[self._waiting[0][0]].any():
            number, valid, images = self._waiting.pop(0)
            data_range = jax.device_put(self._peak[number], sharding.by_example(self._mesh))
            values = jax.device_get(self._score(images, data_range))
            for i in np.flatnonzero(valid):
                self._values[number[i]].append(jax.tree.map(operator.itemgetter(i), values))

    def rows(self) -> list[Row]:
        """Return each volume's name, contrast, slices, and the metrics of its corrupted input and reconstruction."""
        rows = []
        for volume, slices, peak in zip(self._volumes, self._values, self._peak, strict=True):
            values = jax.tree.map(lambda *slices: np.stack(slices), *slices)
            scores = {method: metrics.volume_values(values[method], float(peak)) for method in METHODS}
            rows.append(describe(volume) | scores)
        return rows


def evaluate(
    predict: Callable[..., Any],
    score: Callable[..., Any],
    batches: Iterator[dict[str, np.ndarray]],
    volumes: list[Volume],
    mesh: Mesh,
) -> tuple[list[Row], dict[str, Images]]:
    """Compute the metrics of every volume with `train_step.predict` of a batch and `train_step.score`, both jitted.

    Batches are this process's part of each, in order; their `volume` counts `volumes`. Return a row for each volume
    (`VolumeMetrics.rows`), and by the names of the first volumes the images of their middle slice.
    """
    measured = VolumeMetrics(score, volumes, mesh)
    middle = {number: volume.slices // 2 for number, volume in enumerate(volumes[:PREVIEWS])}
    previews = {}
    for batch in sharding.to_devices(batches, mesh):
        images, peaks = predict(batch)
        number, position, valid = (sharding.on_host(batch[name], mesh) for name in ("volume", "slice", "valid"))
        for i in np.flatnonzero(valid):
            if middle.get(number[i]) == position[i]:
                shown = {name: sharding.on_host(image, mesh)[i] for name, image in images.items()}
                previews[volumes[number[i]].name] = shown
        measured.add(number, valid, images, np.asarray(peaks))
    return measured.rows(), previews


def describe(volume: Volume) -> Row:
    """Return what a row says of its volume: name, contrast, and how many slices count."""
    return {"volume": volume.name, "contrast": volume.contrast, "slices": volume.slices - len(volume.empty)}


def summarise(rows: list[Row]) -> dict[str, Scores]:
    """Return mean and standard deviation over volumes, by group ('all' and each contrast), method and metric."""

    def summary(group: str, method: str, name: str) -> dict[str, float]:
        values = [row[method][name] for row in rows if group in ("all", row["contrast"])]
        # A perfect volume has an infinite PSNR, and with it the deviation is no number.
        deviation = float(np.std(values)) if np.isfinite(values).all() else math.nan
        return {"mean": float(np.mean(values)), "std": deviation}

    return {
        group: {method: {name: summary(group, method, name) for name in METRICS} for method in METHODS}
        for group in ["all", *sorted({row["contrast"] for row in rows})]
    }


def table(rows: list[Row], labels: tuple[str, str]) -> str:
    """Format the summary, mean +- deviation over volumes; the labels are those of input and reconstruction."""
    head = "".join(f"{metric.label:>18}" for metric in METRICS.values())
    lines = [f"{'contrast':<10}{'volumes':>8}  {'method':<12}{head}"]
    for group, methods in summarise(rows).items():
        count = sum(group in ("all", row["contrast"]) for row in rows)
        for method, label in zip(METHODS, labels, strict=True):
            scores = methods[method].items()
            cells = (" \u00b1 ".join(_format(name, value) for value in score.values()) for name, score in scores)
            lines.append(f"{group:<10}{count:>8}  {label:<12}" + "".join(f"{cell:>18}" for cell in cells))
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
