"""The files of a split: found, described and checked before anything is computed."""

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from mrjax.data import checks, plausibility, repetitions
from mrjax.data.findings import Findings
from mrjax.errors import UserError, expect
from mrjax.io import readers
from mrjax.io.storage import Storage
from mrjax.io.volume import Volume

logger = logging.getLogger(__name__)
REPETITION_TASKS = ("denoise", "noise2noise")  # tasks that need the other repetitions of a scan


def find_split(data: ConfigDict, split: str) -> list[str]:
    """Find the files of a split: those of config.data.<split>, else of the split's folder in config.data.dir.

    fastMRI's folder names (multicoil_train, singlecoil_val, ...) are found too. Raises `UserError` for no such folder,
    or no file in it.
    """
    if data[split]:
        return readers.find(data[split])
    expect(data.dir, f"config.data.{split} is not set, nor is config.data.dir", "one of them to name the files")
    found = f"config.data.dir is {data.dir!r}: no such folder"
    expect(os.path.isdir(data.dir), found, "one with train/, val/ and test/")
    names = (split, f"multicoil_{split}", f"singlecoil_{split}", f"multicoil_{split}_full")
    for name in names:
        if os.path.isdir(os.path.join(data.dir, name)):
            return readers.find(os.path.join(data.dir, name))
    raise UserError(
        f"config.data.dir is {data.dir!r}: it has no folder {split}/ (nor {', '.join(names[1:])}); "
        f"make one or set config.data.{split}"
    )


def task_layout(task: str) -> str:
    """Return the layout of the files that a task reads."""
    return "paired" if task == "paired" else "kspace"


def storage_of(data: ConfigDict) -> Storage:
    """Return what a config says of how its files store their arrays."""
    return Storage(**data.names, axes=data.axes, shifted=data.shifted)


def describe_split(config: ConfigDict, paths: Sequence[str], faults: list[str] | None = None) -> list[Volume]:
    """Describe and check the files of a split, each of which needs a target, as the config says.

    The first faulty file raises a `UserError`; with config.data.on_bad_file = 'skip' faulty files are left out and
    logged, and with `faults` left out and a sentence for each added to these. Always left out and logged are empty
    slices, files without the repetitions that a task needs, and repetitions that moved. What is doubtful about the
    first file is logged. Contents are read once (`findings`).
    """
    volumes: list[Volume] = []
    with Findings(storage_of(config.data)) as findings:
        for path in paths:
            try:
                volumes.append(_describe(config, path, findings))
            except UserError as error:
                if faults is not None:
                    faults.append(str(error))
                    continue
                if config.data.on_bad_file != "skip":
                    way_out = "mend the file, or set config.data.on_bad_file='skip' to leave it out"
                    raise UserError(f"{error}; {way_out}") from error
                logger.warning("left out: %s", error)
        size = tuple(config.data.image_size)
        for volume in volumes[:1]:
            read = functools.partial(plausibility.find_doubts, volume, size)
            for doubt in findings.find("doubts", [volume], read, size):
                logger.warning("%s", doubt)
        if config.task in REPETITION_TASKS:
            volumes, left_out = repetitions.group(volumes, findings)
            for sentence in left_out:
                logger.warning("left out: %s", sentence)
    if not volumes:
        raise UserError(f"none of the {len(paths)} files can be used, the first is {paths[0]}")
    for volume in volumes:
        require_maximum(config, volume)
    return volumes


def _describe(config: ConfigDict, path: str, findings: Findings) -> Volume:
    """Describe and check a file; raises `UserError` for its first fault."""
    volume = readers.describe(path, task_layout(config.task), storage_of(config.data))
    if config.acquisition.mask == "stored" and volume.layout == "kspace":
        require_mask(volume)
        volume = dataclasses.replace(volume, undersampled=False)
    expect(volume.layout == "kspace" or volume.target, f"{path}: has no data set `target`", "one beside `input`")
    if config.data.check == "samples" and not volume.undersampled:
        read = functools.partial(_read_samples, config, volume)
        empty, undersampled, maximum = findings.find("samples", [volume], read)
        volume = dataclasses.replace(volume, empty=tuple(empty), undersampled=undersampled, maximum=maximum)
    expect(not volume.undersampled, f"{path}: `kspace` is undersampled already", "fully sampled k-space as the target")
    expect(volume.full_slices, f"{path}: holds nothing but zeros", "an image in its slices")
    if sentence := checks.describe_empty_slices(volume):
        logger.warning("%s", sentence)
    return volume


def _read_samples(config: ConfigDict, volume: Volume) -> tuple[tuple[int, ...], bool, float | None]:
    """Read every sample, and return what only these tell; raises `UserError` for the first fault."""
    volume, faults = checks.check(volume)
    if faults:  # a doubt may say why
        raise UserError("; ".join((faults[0], *plausibility.find_doubts(volume, tuple(config.data.image_size)))))
    return volume.empty, volume.undersampled, volume.maximum


def require_mask(volume: Volume) -> None:
    """Raise a `UserError` if a volume does not store the mask by which it is to be undersampled."""
    needed = "one for config.acquisition.mask = 'stored', of the samples of its fully sampled `kspace` to keep"
    expect(volume.stored_mask is not None, f"{volume.path}: has no data set `mask`", needed)


def require_maximum(config: ConfigDict, volume: Volume) -> None:
    """Raise a `UserError` if config.normalise is 'volume' and the maximum of the volume is not known."""
    if config.normalise == "volume":
        found = f"{volume.path}: has no attribute `max` in the units of its data"
        known = volume.maximum is not None and 0 < volume.maximum < math.inf
        expect(known, found, "a positive one for config.normalise='volume'; 'slice' needs none")


def find_shared_subjects(volumes: Mapping[str, Sequence[Volume]]) -> list[str]:
    """Return a sentence for each two splits, by their names, that show the same subject, or hold the same file."""
    sentences = []
    for (one, first), (other, second) in itertools.combinations(volumes.items(), 2):
        known, also = ({_subject(volume): volume.path for volume in reversed(split)} for split in (first, second))
        shared = sorted(known.keys() & also, key=also.__getitem__)
        if shared:
            more = f", and {len(shared) - 1} more do" if len(shared) > 1 else ""
            sentences.append(
                f"{also[shared[0]]} ({other}) shows the same subject as {known[shared[0]]} ({one}){more}, by "
                "`patient_id` or the file's name; expected each subject in one split, else metrics are too good"
            )
    return sentences


def _subject(volume: Volume) -> str:
    return volume.subject or os.path.realpath(volume.path)


def fingerprint(volumes: Sequence[Volume]) -> str:
    """Summarise the volumes in a line that changes with the names, shapes or usable slices of the files."""
    rows = [(v.name, v.shape, v.empty, *([len(v.repetitions)] if v.repetitions else [])) for v in volumes]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    simulated = sum(volume.simulated for volume in volumes)
    note = f", k-space of {simulated} files simulated from images" if simulated else ""
    return f"{len(volumes)} files, {sum(len(v.full_slices) for v in volumes)} slices, {digest}{note}"
