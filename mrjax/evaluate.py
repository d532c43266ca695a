"""Evaluate a checkpoint over a split: volume metrics, beside those of the corrupted (zero-filled) input.

    python -m mrjax.evaluate --workdir=runs/unet --split=test [--data=FOLDER]

Metrics are over whole volumes, with the volume's maximum as data range (fastMRI's evaluate.py), on each file's own grid
and in its units, whatever size the network works at. The table is printed, and written with a row for every volume to
<workdir>/metrics.json, or metrics-<split>.json, or metrics-<name>-<hash of its path>.json for --data.
"""

import logging
import zlib
from pathlib import Path

import tqdm
from absl import flags

from mrjax import cli
from mrjax.data import readers, splits
from mrjax.data.files import write_json
from mrjax.inference import Inference
from mrjax.measures import evaluator

logger = logging.getLogger("mrjax.evaluate")
_INPUTS = {"kspace": "zero-filled", "paired": "input", "denoise": "one scan", "noise2noise": "one scan"}
_NETWORKS = {"unet": "U-Net", "unet_dc": "U-Net + DC", "varnet": "VarNet"}


def main(_: list[str]) -> None:
    """Restore, evaluate, print, write."""
    workdir, split, data = flags.FLAGS.workdir, flags.FLAGS.split, flags.FLAGS.data
    inference = Inference.restore(workdir, flags.FLAGS.data_consistency)
    config, step = inference.config, inference.progress["step"]
    paths = readers.find(data) if data else splits.find_split(config.data, split)
    volumes = splits.describe_split(config, paths)
    logger.info("%s: step %d, %s", workdir, step, splits.fingerprint(volumes))
    rows = []
    for volume in tqdm.tqdm(volumes, unit="volume", disable=None):
        rows.append(evaluator.describe(volume) | evaluator.score_volume(inference.reconstruct(volume), volume))
    labels = (_INPUTS.get(config.task, "corrupted"), _NETWORKS.get(config.model.name, config.model.name))
    print(evaluator.table(rows, labels))
    suffix = "" if split == "test" else f"-{split}"
    if data:
        suffix = f"-{Path(data).stem}-{zlib.crc32(str(Path(data).resolve()).encode()):08x}"
    file = Path(workdir) / f"metrics{suffix}.json"
    result = {"split": split, "data": data, "step": step, "data_range": "maximum of the volume"}
    write_json(file, result | {"summary": evaluator.summarise(rows), "volumes": rows})
    logger.info("written: %s", file)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "of a run of mrjax.main", required=True)
    flags.DEFINE_enum("split", "test", ["train", "val", "test"], "which of the run's data to evaluate")
    flags.DEFINE_string("data", None, "instead of a split: a folder, glob or file")
    flags.DEFINE_bool("data_consistency", True, "keep the measured samples of k-space in the reconstruction")
    cli.run(main, one_process=True)
