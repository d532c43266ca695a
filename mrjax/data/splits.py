"""The files of a split: found, described and checked, before anything is computed."""

import dataclasses
import hashlib
import logging
import os
from typing import Any

from mrjax.data import hdf5, repetitions
from mrjax.errors import UserError

logger = logging.getLogger(__name__)
REPEATED = ("denoise", "noise2noise")  # tasks that need the other repetitions of a scan


def locate(data: Any, split: str) -> list[str]:
    """The files of a split: what config.data.<split> names, else the split's folder under config.data.dir.

    fastMRI's own folder names (multicoil_train, singlecoil_val, ...) are understood.

    Raises:
      UserError: no such folder, or no file in it.
    """
    if data[split]:
        return hdf5.find(data[split])
    if not data.dir:
        raise UserError(
            f"config.data.{split} is not set, nor is config.data.dir; expected one of them to name the files"
        )
    if not os.path.isdir(data.dir):
        raise UserError(f"config.data.dir is {data.dir!r}: no such folder, expected one with train/, val/ and test/")
    names = (split, f"multicoil_{split}", f"singlecoil_{split}", f"multicoil_{split}_full")
    for name in names:
        if os.path.isdir(os.path.join(data.dir, name)):
            return hdf5.find(os.path.join(data.dir, name))
    raise UserError(
        f"config.data.dir is {data.dir!r}: it has no folder {split}/ (nor {', '.join(names[1:])}); "
        f"make one or set config.data.{split}"
    )


def layout(task: str) -> str:
    """The layout of the files that a task reads."""
    return "paired" if task == "paired" else "kspace"


def volumes(
    paths: list[str], task: str, *, on_bad_file: str, read_all: bool, mask: str = "random"
) -> list[hdf5.Volume]:
    """Describes and checks the files of a split, all of which need a ground truth, before anything is computed.

    For a task that needs other repetitions, those that moved or are alone are left out and listed.

    Args:
      paths: the files.
      task: what they are for, as config.task names it.
      on_bad_file: 'error' stops at the first faulty file; 'skip' leaves faulty files out, and of files whose only
        fault is empty slices just those slices, and lists them.
      read_all: whether to read every sample, or the headers only.
      mask: with which k-space is undersampled: 'stored' if with the `mask` that each file holds beside the truth.

    Raises:
      UserError: a faulty file, or none left.
    """
    good = []
    for path in paths:
        try:
            volume = hdf5.describe(path, layout(task))
            if mask == "stored" and volume.layout == "kspace":
                volume = _with_mask_to_come(volume)
            _needs_truth(volume)
            if read_all:
                volume, faults = hdf5.check(volume)
                _needs_truth(volume)
                empty = hdf5.empty_slices(volume)
                if empty and not faults and on_bad_file == "skip" and len(volume.empty) < volume.slices:
                    logger.warning("left out these slices: %s", empty[0])
                elif faults:
                    raise UserError(faults[0])
                elif empty:
                    raise UserError(f"{empty[0]} (on_bad_file='skip' leaves just these slices out)")
            good.append(volume)
        except UserError as error:
            if on_bad_file != "skip":
                raise UserError(
                    f"{error}; mend the file, or set config.data.on_bad_file='skip' to leave it out"
                ) from error
            logger.warning("left out: %s", error)
    if task in REPEATED:
        good, left_out = repetitions.group(good)
        for sentence in left_out:
            logger.warning("left out: %s", sentence)
    if not good:
        raise UserError(f"none of the {len(paths)} files can be used, the first is {paths[0]}")
    return good


def _with_mask_to_come(volume: hdf5.Volume) -> hdf5.Volume:
    """A file whose stored mask says what to keep of k-space that is all there, not what there is."""
    if volume.stored_mask is None:
        raise UserError(
            f"{volume.path}: has no data set `mask`, expected one for config.acquisition.mask = 'stored': "
            f"({volume.shape[-1]},), a value per column of its fully sampled `kspace`"
        )
    return dataclasses.replace(volume, undersampled=False)


def _needs_truth(volume: hdf5.Volume) -> None:
    if volume.layout == "kspace" and volume.undersampled:
        raise UserError(f"{volume.path}: `kspace` is undersampled already, expected fully sampled k-space as the truth")
    if volume.layout == "paired" and not volume.target:
        raise UserError(f"{volume.path}: has no data set `target`, expected one beside `input`")


def needs_maximum(volumes: list[hdf5.Volume]) -> None:
    """Raises a `UserError` if a volume's maximum is not known, which config.normalise = 'volume' goes by."""
    for volume in volumes:
        if not volume.maximum:
            raise UserError(
                f"{volume.path}: has no attribute `max` in the units of its data, expected one for "
                "config.normalise='volume'; 'slice' needs none"
            )


def fingerprint(volumes: list[hdf5.Volume]) -> str:
    """Changes whenever the examples or their order would: with the names, shapes or usable slices of the files."""
    rows = [(v.name, v.shape, v.empty, *([len(v.others)] if v.others else [])) for v in volumes]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    return f"{len(volumes)} files, {sum(v.slices - len(v.empty) for v in volumes)} slices, {digest}"
