"""Volume metrics of batches on the devices, their summary over volumes, and the table of it.

Definitions are fastMRI's (evaluate.py): over whole volumes, with the volume's maximum as data range.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mrjax.io.volume import Volume
from mrjax.measures import metrics
from mrjax.measures.metrics import METRICS
from mrjax.parallel import sharding

METHODS = ("corrupted", "reconstruction")
# What the corrupted image is, by task.
INPUT_LABELS = {"kspace": "zero-filled", "paired": "input", "denoise": "one scan", "noise2noise": "one scan"}
PREVIEWS = 3  # volumes of which images are kept
Row = dict[str, Any]
Images = dict[str, np.ndarray]
Scores = dict[str, dict[str, dict[str, float]]]


def evaluate(
    predict: Callable[..., Any],
    batches: Iterator[dict[str, np.ndarray]],
    volumes: list[Volume],
    mesh: Mesh,
) -> tuple[list[Row], dict[str, Images]]:
    """Compute the metrics of every volume with the jitted `train_step.predict` of a batch.

    Batches are this process's part of each, in order; their `volume` counts `volumes`. Return a row for each volume
    (`describe`, and metrics by method), and by the names of the first volumes the images of their middle slice.

    SSIM needs the maximum of a whole volume, so the images of a batch wait on the device until the last slice of every
    volume in it has been seen: a volume's worth at most.
    """
    previews, numbers, scores = {}, [], []
    peaks = np.zeros(len(volumes), np.float32)
    unseen = np.array([len(volume.full_slices) for volume in volumes])
    waiting: collections.deque[tuple[np.ndarray, np.ndarray, dict[str, jax.Array]]] = collections.deque()
    for batch in sharding.to_devices(batches, mesh):
        images, slice_peaks = predict(batch)
        number, position, valid = (sharding.on_host(batch[name], mesh) for name in ("volume", "slice", "valid"))
        for i in np.flatnonzero(valid):
            volume = volumes[number[i]]
            if number[i] < PREVIEWS and position[i] == volume.slices // 2:
                previews[volume.name] = {name: sharding.on_host(image, mesh)[i] for name, image in images.items()}
        np.maximum.at(peaks, number[valid], np.asarray(slice_peaks)[valid])
        np.subtract.at(unseen, number[valid], 1)
        waiting.append((number, valid, images))
        while waiting and not unseen[waiting[0][0]].any():
            number, valid, images = waiting.popleft()
            data_range = jax.device_put(peaks[number], sharding.by_example(mesh))
            values = jax.device_put(score_slices(images, data_range), sharding.replicated(mesh))
            scores.append(jax.device_get(values))
            numbers.append(np.where(valid, number, -1))
    of_slice, values = np.concatenate(numbers), jax.tree.map(lambda *parts: np.concatenate(parts), *scores)
    rows = []
    for index, volume in enumerate(volumes):
        of_volume = jax.tree.map(lambda x, rows=of_slice == index: x[rows], values)
        rows.append(describe(volume) | combine_slices(of_volume, float(peaks[index])))
    return rows, previews


def score_volume(images: Images, volume: Volume) -> dict[str, dict[str, float]]:
    """Compute the metrics of a volume by method, over the slices that are not empty in the file.

    Images are the corrupted ones, the reconstruction and the target, (slices, height, width); the result is empty
    without a target, or without a slice that counts.
    """
    if "target" not in images or not volume.full_slices:
        return {}
    return combine_slices(*_score(images, volume))


def score_each_slice(images: Images, volume: Volume) -> dict[int, dict[str, dict[str, float]]]:
    """Compute the metrics of each slice by its number, as `score_volume` with the data range of the volume."""
    if "target" not in images or not volume.full_slices:
        return {}
    values, peak = _score(images, volume)
    return {
        number: combine_slices(jax.tree.map(lambda x, i=i: x[i : i + 1], values), peak)
        for i, number in enumerate(volume.full_slices)
    }


def _score(images: Images, volume: Volume) -> tuple[dict[str, dict[str, np.ndarray]], float]:
    """Return the `score_slices` of the slices that are not empty, and the maximum of the volume."""
    images = {name: image[volume.full_slices] for name, image in images.items()}
    peak = float(images["target"].max())
    return jax.device_get(score_slices(images, peak)), peak


@jax.jit
def score_slices(images: dict[str, jax.Array], data_range: jax.Array | float) -> dict[str, dict[str, jax.Array]]:
    """Compute `metrics.slice_values` of the corrupted slices and of the reconstructed ones."""
    return {method: metrics.slice_values(images["target"], images[method], data_range) for method in METHODS}


def combine_slices(values: dict[str, dict[str, np.ndarray]], peak: float) -> dict[str, dict[str, float]]:
    """Combine the `score_slices` of a volume, whose maximum is `peak`, to its metrics."""
    return {method: metrics.volume_values(values[method], peak) for method in METHODS}


def describe(volume: Volume) -> Row:
    """Return what a row says of its volume: name, contrast, how many slices count, whether k-space is simulated."""
    slices = len(volume.full_slices)
    return {"volume": volume.name, "contrast": volume.contrast, "slices": slices, "simulated": volume.simulated}


def summarise(rows: list[Row]) -> dict[str, Scores]:
    """Return mean and standard deviation over volumes, by group ('all' and each contrast), method and metric."""

    def summary(group: str, method: str, name: str) -> dict[str, float]:
        values = [row[method][name] for row in rows if group in ("all", row["contrast"])]
        with np.errstate(invalid="ignore"):  # a perfect volume has an infinite PSNR, and with it the deviation is NaN
            return {"mean": float(np.mean(values)), "std": float(np.std(values))}

    return {
        group: {method: {name: summary(group, method, name) for name in METRICS} for method in METHODS}
        for group in ["all", *sorted({row["contrast"] for row in rows})]
    }


def table(rows: list[Row], labels: tuple[str, str]) -> str:
    """Format the summary, mean +- deviation over volumes; the labels are those of input and reconstruction."""
    head = "".join(f"{metric.label:>18}" for metric in METRICS.values())
    width, groups = max(12, *map(len, labels)), summarise(rows)
    counts = {group: _count([row for row in rows if group in ("all", row["contrast"])]) for group in groups}
    space = max(7, *map(len, counts.values())) + 1
    lines = [f"{'contrast':<10}{'volumes':>{space}}  {'method':<{width}}{head}"]
    for group, methods in groups.items():
        for method, label in zip(METHODS, labels, strict=True):
            scores = methods[method].items()
            cells = (" \u00b1 ".join(METRICS[name].format(value) for value in score.values()) for name, score in scores)
            lines.append(
                f"{group:<10}{counts[group]:>{space}}  {label:<{width}}" + "".join(f"{cell:>18}" for cell in cells)
            )
    return "\n".join(lines)


def _count(rows: list[Row]) -> str:
    simulated = sum(row["simulated"] for row in rows)
    total = "" if simulated == len(rows) else f"{len(rows)}"
    return ", ".join(filter(None, (total, f"{simulated} simulated" * bool(simulated))))


def one_line(scores: Scores) -> str:
    """Format the PSNR and SSIM of a summary, after and before."""
    parts = []
    for name in ("psnr", "ssim"):
        before, after = (METRICS[name].format(scores[method][name]["mean"]) for method in METHODS)
        parts.append(f"{name.upper()} {after} (corrupted {before})")
    return ", ".join(parts)
