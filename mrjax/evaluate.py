"""Evaluate a checkpoint over a split: volume metrics, beside those of the corrupted (zero-filled) input.

    python -m mrjax.evaluate --workdir=runs/unet --split=test [--data=FOLDER]
    python -m mrjax.evaluate --workdir=runs/unet --method=cs --split=test
    python -m mrjax.evaluate --method=cs --data=FOLDER --output=cs.json [--config=configs/unet.py --config.FIELD=VALUE]

A method that needs no training (zero_filled, sense or cs: compressed sensing) is evaluated on the files and masks of a
run, so that the tables compare, or without a run as a config says.

Metrics are over whole volumes, with the volume's maximum as data range (fastMRI's evaluate.py), on each file's own grid
and in its units, whatever size the network works at. The table is printed, and written with a row for every volume to
<workdir>/metrics.json, or metrics-<split>.json, or metrics-<name>-<hash of its path>.json for --data; for a method
these begin with metrics-<method>. --output names another file. The same with images, as a page for the browser, is
beside it: report.html, report-<split>.html, ...
"""

import functools
import logging
import zlib
from pathlib import Path

import tqdm
from absl import flags

from mrjax import cli
from mrjax.config import check_flags
from mrjax.data import splits
from mrjax.errors import expect
from mrjax.inference import define_flags, from_flags, write_report
from mrjax.io import readers
from mrjax.io.files import stem, write_json
from mrjax.measures import evaluator
from mrjax.report.html import Report

logger = logging.getLogger("mrjax.evaluate")


def main(_: list[str]) -> None:
    """Restore, evaluate, print, write."""
    values = flags.FLAGS
    split, data = values.split, values.data
    needed = "a file for the metrics where there is no --workdir"
    expect(values.output or values.workdir or not values.method, "--output is not given", needed)
    inference = from_flags()
    config, method = inference.config, values.method
    paths = readers.find(data) if data else splits.find_split(config.data, split)
    volumes = splits.describe_split(config, paths)
    source = method or f"{values.workdir}: step {inference.source['step']}"
    logger.info("%s, %s", source, splits.fingerprint(volumes))
    rows, report = [], Report(len(volumes))
    for volume in tqdm.tqdm(volumes, unit="volume", disable=None):
        images = inference.reconstruct(volume)
        scores = evaluator.score_volume(images, volume)
        rows.append(evaluator.describe(volume) | scores)
        report.add(volume, images, scores)
    print(evaluator.table(rows, inference.labels))
    suffix = "" if split == "test" else f"-{split}"
    if data:
        suffix = f"-{stem(data)}-{zlib.crc32(str(Path(data).resolve()).encode()):08x}"
    of_method = f"-{method}" if method else ""
    file = Path(values.output or Path(values.workdir) / f"metrics{of_method}{suffix}.json")
    result = {"split": split, "data": data, **inference.source, "data_range": "maximum of the volume"}
    write_json(file, result | {"summary": evaluator.summarise(rows), "volumes": rows})
    label = file.stem.removeprefix("metrics-").removeprefix("metrics")
    page = file.with_name("-".join(filter(None, ("report", label))) + ".html")
    write_report(report, page, inference, data or f"the {split} split")
    logger.info("written: %s and, to look at in a browser, %s", file, page)


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_enum("split", "test", ["train", "val", "test"], "which of the run's data to evaluate")
    flags.DEFINE_string("data", None, "instead of a split: a folder, glob or file")
    flags.DEFINE_string("output", None, "file for the metrics; by default in the workdir")
    cli.run(main, functools.partial(check_flags, required=False), one_process=True)
