"""Reconstruct files with a checkpoint, or without any: for each a .t5 and a picture, and report.html on all of them.

Beside it the reconstruction of images in NIfTI or DICOM is written in that format.

    python -m mrjax.reconstruct --workdir=runs/unet --input=scan.t5 --output=out
    python -m mrjax.reconstruct --method=cs --input=scan.t5 --output=out

The methods that need no training are zero_filled; sense (CG-SENSE, Pruessmann et al., 2001); and cs, compressed sensing
by total variation (Lustig et al., 2007). Sensitivities are ESPIRiT's; the weight of the regularisation is chosen by the
noise of the file, or is --weight.

Fully sampled k-space is undersampled as in training first, to show what would have come of a shorter scan; k-space that
is undersampled already (a stored `mask`, or samples left out) is taken as it is. A target is used for the metrics and
the picture where there is one, and is not needed. For the tasks on repeated scans it is the mean of the other
repetitions in the file's folder; a scan without other repetitions is taken as it is.
"""

import collections
import functools
import logging
from pathlib import Path

import numpy as np
from absl import flags

from mrjax import cli
from mrjax.config import check_flags
from mrjax.data import checks, plausibility, repetitions, splits
from mrjax.errors import UserError, expect, printable
from mrjax.inference import Inference, define_flags, from_flags, write_report
from mrjax.io import readers
from mrjax.io.files import stem
from mrjax.measures import evaluator
from mrjax.report import figures, html

logger = logging.getLogger("mrjax.reconstruct")


def main(_: list[str]) -> int:
    """Reconstruct every file of --input; the exit status is 1 if one could not be."""
    inference = from_flags()
    paths, output = readers.find(flags.FLAGS.input), Path(flags.FLAGS.output)
    if step := inference.source.get("step"):
        size = "x".join(map(str, inference.config.data.image_size)) or "each file's own number of"
        logger.info("%s: step %d, trained at %s pixels", flags.FLAGS.workdir, step, size)
    require_free_names(paths, output)
    status, report, page = 0, html.Report(len(paths)), output / "report.html"
    for path in paths:
        try:
            print(printable(reconstruct_file(inference, path, output, report, flags.FLAGS.keep_identity)))
        except UserError as error:
            logger.error("%s", error)
            status = 1
    if report.rows:
        write_report(report, page, inference, flags.FLAGS.input)
        logger.info("to look at in a browser: %s", page)
    return status


def require_free_names(paths: list[str], output: Path) -> None:
    """Raise a `UserError` if two results would have one name, or one would replace what is no result."""
    names = {path: _name(path) for path in paths}
    counts = collections.Counter(names.values())
    inputs = {Path(path).resolve() for path in paths}
    page = output / "report.html"
    found = f"--output is {output}, where {page.name} is no report of mrjax"
    expect(not page.exists() or html.is_report(page), found, "another folder")
    for path, name in names.items():
        found = f"--input holds {counts[name]} files named {name}"
        expect(counts[name] == 1, found, "names that differ: results go by them")
        found = f"--output is {output}, where a result would replace {path}"
        file, own = (output / f"{name}{suffix}" for suffix in (".t5", readers.reader_for(path).image_suffix or ".t5"))
        expect(inputs.isdisjoint((file.resolve(), own.resolve())), found, "another folder")
        for place in filter(Path.exists, (own, file)):  # a result of any format has its .t5 beside it
            found = f"--output is {output}, where {place.name} is no result of mrjax.reconstruct"
            expect(file.exists() and readers.describe(str(file)).layout == "image", found, "another folder")


def _name(path: str) -> str:
    try:
        return readers.describe(path).name
    except UserError:  # which the reconstruction will raise, unless it knows the names in the file
        return stem(path)


def reconstruct_file(
    inference: Inference,
    path: str,
    output: Path,
    report: html.Report | None = None,
    keep_identity: bool = False,
) -> str:
    """Reconstruct a file and return a line about the results; `UserError` if the file is faulty.

    <name>.t5 has the attributes and the header of the file it came from. <name>.png shows the middle slice: corrupted,
    reconstruction, target and error. A report gets its images and metrics.
    """
    config = inference.config
    storage = splits.storage_of(config.data)
    volume, faults = checks.check(readers.describe(path, splits.task_layout(config.task), storage))
    if faults:
        raise UserError(faults[0])
    splits.require_maximum(config, volume)
    if config.acquisition.mask == "stored" and not volume.undersampled:
        splits.require_mask(volume)
    trained = "step" in inference.source and config.acquisition.mask != "stored"
    known = config.acquisition.accelerations if trained else ()
    if volume.undersampled and known and (doubt := plausibility.find_doubt_of_acceleration(volume, known)):
        logger.warning("%s", doubt)
    if config.task in splits.REPETITION_TASKS:
        volume = repetitions.add_repetitions(volume, storage)
    images = inference.reconstruct(volume)
    scores = evaluator.score_volume(images, volume)
    after, result, file = scores.get("reconstruction", {}), images["reconstruction"], output / f"{volume.name}.t5"
    attributes = {"max": result.max(), "norm": np.linalg.norm(result)}
    attributes |= {f"mrjax_{name.lower()}": value for name, value in (inference.source | after).items()}
    places = readers.result_places(file, volume)
    for place, reader in places:
        reader.write(place, {"reconstruction": result}, attributes, volume, keep_identity)
    middle = volume.slices // 2
    panel = {name: image[middle] for name, image in images.items()}
    note = ", simulated k-space" * volume.simulated
    title = f"{volume.name}, {volume.contrast}{note}, slice {middle + 1} of {volume.slices}"
    title += ", metrics of the volume" if scores else ""
    figures.draw_panel(file.with_suffix(".png"), panel, title=title, metrics=scores)
    if report is not None:
        report.add(volume, images, scores)
    values = [f"  {name.upper()} {value:.4g} ({scores['corrupted'][name]:.4g} before)" for name, value in after.items()]
    written = ", ".join([str(file), *(reader.image_suffix for _, reader in places[1:])])
    return f"{written} and .png{note}{''.join(values)}"


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_string("input", None, "a scan of any known format, a folder or a glob of them", required=True)
    flags.DEFINE_string("output", None, "folder for the results", required=True)
    flags.DEFINE_bool("keep_identity", False, "whether results in DICOM say of the patient what the source does")
    cli.run(main, functools.partial(check_flags, required=False), one_process=True)
