"""Volume metrics of a checkpoint over a split, beside those of its corrupted (zero-filled) input.

    python -m mrjax.evaluate --workdir=runs/unet --split=test [--data=FOLDER]

Definitions are fastMRI's (evaluate.py): over whole volumes, with the volume's maximum as data range, on each file's own
grid and in its units, whatever size the network works at. (Validation while training is the same at the network's size,
all on the device.) The table is printed, and written with a row for every volume to <workdir>/metrics.json, or
metrics-<split or data>.json where it is not about the test split.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import Mesh
from jax.stages import Wrapped

from mrjax import checkpoint, cli, experiment, train_step
from mrjax.data import hdf5, splits
from mrjax.measures import metrics
from mrjax.parallel import processes, sharding
from mrjax.reconstruct import METHODS, reconstruct, scores

logger = logging.getLogger("mrjax.evaluate")
PREVIEWS = 3
_NETWORKS = {"unet": "U-Net", "unet_dc": "U-Net + DC", "varnet": "VarNet"}
Row = dict[str, Any]
Scores = dict[str, dict[str, dict[str, float]]]


def evaluate(
    predict: Wrapped,
    score: Wrapped,
    params: Any,
    batches: Iterator[dict[str, np.ndarray]],
    volumes: list[hdf5.Volume],
    mesh: Mesh,
) -> tuple[list[Row], dict[str, dict[str, np.ndarray]]]:
    """Metrics of every volume.

    SSIM needs the maximum of a whole volume, so the images of a batch wait on the device until the last slice of every
    volume in it has been seen; slices come in order, so that is a volume's worth at most.

    Args:
      predict: from `train_step.compile_predict`.
      score: from `train_step.compile_score`.
      params: of the network.
      batches: this process's part of each, in order, with `valid`.
      volumes: what the batches' `volume` counts.
      mesh: of the devices.

    Returns:
      For each volume: its name, contrast, slices, and nmse, psnr and ssim of its corrupted input and reconstruction.
      Images of the middle slice of the first volumes, by name: corrupted, reconstruction, target.
    """
    peak = np.zeros(len(volumes), np.float32)
    unseen = np.array([volume.slices - len(volume.empty) for volume in volumes])
    middle = {v: volume.slices // 2 for v, volume in enumerate(volumes[:PREVIEWS])}
    sums: list[dict[str, list[Any]]] = [{method: [] for method in METHODS} for _ in volumes]
    previews = {}
    waiting: list[tuple[np.ndarray, np.ndarray, train_step.Batch]] = []
    for batch in sharding.to_devices(batches, mesh):
        images, peaks = predict(params, batch)
        number, position, valid = (sharding.on_host(batch[name], mesh) for name in ("volume", "slice", "valid"))
        size = images["target"].shape[1:]
        sizes = sharding.on_host(images["size"], mesh) if "size" in images else np.tile(size, (len(number), 1))
        np.maximum.at(peak, number[valid], np.asarray(peaks)[valid])
        np.subtract.at(unseen, number[valid], 1)
        for i in np.flatnonzero(valid):
            height, width = sizes[i]
            if middle.get(number[i]) == position[i]:
                previews[volumes[number[i]].name] = {
                    name: sharding.on_host(images[name], mesh)[i, :height, :width]
                    for name in ("corrupted", "reconstruction", "target")
                }
        waiting.append((number, valid, images))
        while waiting and not unseen[waiting[0][0]].any():
            number, valid, images = waiting.pop(0)
            of_batch = jax.device_get(score(images, jax.device_put(peak[number], sharding.by_example(mesh))))
            for method, parts in of_batch.items():
                for i in np.flatnonzero(valid):
                    sums[number[i]][method].append({name: part[i] for name, part in parts.items()})
    rows = []
    for volume, of_volume, maximum in zip(volumes, sums, peak, strict=True):
        row = describe(volume)
        for method, of_slices in of_volume.items():
            columns = {name: np.array([part[name] for part in of_slices]) for name in of_slices[0]}
            row[method] = metrics.volume_values(columns, float(maximum))
        rows.append(row)
    return rows, previews


def describe(volume: hdf5.Volume) -> Row:
    """What a row says of its volume: name, contrast, and how many slices count."""
    return {"volume": volume.name, "contrast": volume.contrast, "slices": volume.slices - len(volume.empty)}


def summarise(rows: list[Row]) -> dict[str, Scores]:
    """Mean and standard deviation over volumes, by group ('all' and each contrast), method and metric."""
    contrasts = sorted({row["contrast"] for row in rows})
    return {
        group: {
            method: {
                name: {"mean": float(np.mean(values)), "std": _spread(values)}
                for name in rows[0][method]
                if (values := [row[method][name] for row in rows if group in ("all", row["contrast"])])
            }
            for method in METHODS
        }
        for group in ["all", *contrasts]
    }


def _spread(values: list[float]) -> float:
    # A perfect volume has an infinite PSNR, and with it the spread is no number.
    return float(np.std(values)) if np.isfinite(values).all() else math.nan


def table(rows: list[Row], labels: tuple[str, str]) -> str:
    """The summary as text, a line for each contrast and method, mean +- standard deviation over volumes."""
    lines = [f"{'contrast':<10}{'volumes':>8}  {'method':<12}{'NMSE':>18}{'PSNR (dB)':>16}{'SSIM':>18}"]
    for group, methods in summarise(rows).items():
        count = sum(group in ("all", row["contrast"]) for row in rows)
        for method, label in zip(METHODS, labels, strict=True):
            nmse, psnr, ssim = (
                f"{methods[method][name]['mean']:.{digits}f} \u00b1 {methods[method][name]['std']:.{digits}f}"
                for name, digits in (("nmse", 4), ("psnr", 2), ("ssim", 4))
            )
            lines.append(f"{group:<10}{count:>8}  {label:<12}{nmse:>18}{psnr:>16}{ssim:>18}")
    return "\n".join(lines)


def labels(task: str, model: str) -> tuple[str, str]:
    """What a table or a picture calls the corrupted input and the reconstruction."""
    inputs = {"kspace": "zero-filled", "paired": "input", "denoise": "one scan", "noise2noise": "one scan"}
    return inputs[task], _NETWORKS.get(model, model)


def main(argv: list[str]) -> None:
    """Restores, evaluates, prints, writes."""
    cli.expect_no_arguments(argv)
    processes.require_one_process("mrjax.evaluate")
    workdir, split, data = flags.FLAGS.workdir, flags.FLAGS.split, flags.FLAGS.data
    inference = experiment.restore(workdir, sharding.make_mesh())
    config = inference.config
    volumes = splits.volumes(
        hdf5.find(data) if data else splits.locate(config.data, split),
        config.task,
        on_bad_file=config.data.on_bad_file,
        read_all=config.data.check == "samples",
        mask=config.acquisition.mask,
    )
    if config.normalise == "volume":
        splits.needs_maximum(volumes)
    logger.info("%s: step %d, %s", workdir, inference.progress["step"], splits.fingerprint(volumes))
    rows = []
    for volume in tqdm.tqdm(volumes, unit="volume", disable=None):
        found = scores(reconstruct(inference, volume), volume)
        rows.append(describe(volume) | found)
    print(table(rows, labels(config.task, config.model.name)))
    result = {"split": split, "data": data, "step": inference.progress["step"], "data_range": "maximum of the volume"}
    result |= {"summary": summarise(rows), "volumes": rows}
    about = f"-{Path(data).stem}" if data else "" if split == "test" else f"-{split}"
    file = Path(workdir) / f"metrics{about}.json"
    checkpoint.write_json(file, result)
    logger.info("written: %s", file)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "of a run of mrjax.main", required=True)
    flags.DEFINE_enum("split", "test", ["train", "val", "test"], "which of the run's data to evaluate")
    flags.DEFINE_string("data", None, "instead of a split: a folder, glob or file")
    cli.run(main)
