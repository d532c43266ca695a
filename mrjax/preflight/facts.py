"""Facts about volumes and masks, in a line each."""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mrjax.experiment import Experiment
from mrjax.io.volume import Volume
from mrjax.mri.acquire import Acquisition, draw_protocol

DRAWS = 16  # masks, of which the mean acceleration is shown
SHAPES = 3  # shown of each split


def describe_volumes(volumes: Sequence[Volume]) -> str:
    """Describe how many files, slices and subjects there are, shapes, and the range of the volumes' maxima."""
    slices = sum(len(volume.full_slices) for volume in volumes)
    shapes = collections.Counter("x".join(map(str, volume.shape[1:])) for volume in volumes).most_common()
    shown = ", ".join(f"{shape} ({count})" if len(shapes) > 1 else shape for shape, count in shapes[:SHAPES])
    others = f" and {len(shapes) - SHAPES} other shapes" if len(shapes) > SHAPES else ""
    subjects = {volume.subject for volume in volumes}
    known = "" if "" in subjects else f" of {len(subjects)} subject{'s' * (len(subjects) > 1)}"
    maxima = [volume.maximum for volume in volumes if volume.maximum is not None]
    scale = f"maximum {min(maxima):.3g} to {max(maxima):.3g}" if maxima else "maximum unknown"
    masked = sum(volume.stored_mask is not None for volume in volumes)
    masks = f"; {masked} store a mask" if masked else ""
    files = f"{len(volumes)} file{'s' * (len(volumes) > 1)}"
    return f"{files}{known}, {slices} slice{'s' * (slices > 1)} of {shown}{others}; {scale}{masks}"


def describe_masks(experiment: Experiment) -> str:
    """Draw masks for a slice from the middle of the training data, and describe them against its measured columns."""
    config = experiment.config
    if config.task == "paired":
        return "none: `input` is corrupted as it is"
    dataset = experiment.train_datasets[-1]
    example = {name: np.zeros(shape, dtype) for name, (shape, dtype) in dataset.spec.items()}
    dataset.read_into(len(dataset) // 2, example)
    kspace = example["kspace"].reshape(-1, *dataset.spec["kspace"][0][-3:])[0]
    stored = example.get("mask", np.ones((1, 1), bool))
    sampled = kspace.any((0, 1)) & stored.any(0)
    acquisition = Acquisition(**config.acquisition)
    parts = []
    for acceleration, centre in zip(acquisition.accelerations, acquisition.centre_fractions, strict=True):
        kept = stored & _draw_masks(acquisition, acceleration, centre, kspace, sampled)
        found = kept.shape[-2] * sampled.sum() / kept.sum((-2, -1)).mean()
        columns = f", {round(sampled.sum() * centre)} columns" if kept.shape[-2] == 1 else ""
        parts.append(f"{acceleration:g}x with {100 * centre:.3g} % in the centre{columns} ({found:.3g}x as drawn)")
    drawn = "as stored in the files" if acquisition.mask == "stored" else f"{acquisition.mask}, {' or '.join(parts)}"
    return f"{drawn}; {sampled.sum()} of {len(sampled)} columns hold data"


def _draw_masks(
    acquisition: Acquisition, acceleration: float, centre: float, kspace: np.ndarray, sampled: np.ndarray
) -> np.ndarray:
    """Draw masks (draws, 1 or height, width) bool of one acceleration."""
    one = dataclasses.replace(
        acquisition, accelerations=(acceleration,), centre_fractions=(centre,), noise=(0.0, 0.0), snr=(), motion_p=0.0
    )
    target = jnp.zeros(kspace.shape[-2:])
    draw = jax.vmap(lambda key: draw_protocol(key, jnp.asarray(kspace), jnp.asarray(sampled), target, one).mask)
    return np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), DRAWS)))
