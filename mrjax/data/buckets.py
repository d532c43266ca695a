"""Volumes of several sizes: one bucket of slices for each."""

import functools
from collections.abc import Sequence

from ml_collections import ConfigDict

from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.io.volume import Volume


def bucket_by_size(data: ConfigDict, volumes: Sequence[Volume]) -> list[SliceDataset]:
    """Make a dataset of config.data.image_size, or for each (height, width) of the volumes, in ascending order.

    Coils are zero-padded to the most in each dataset, and `volume` in the examples counts in the list of all volumes.
    Raises `UserError` for more than config.data.max_shapes sizes.
    """
    buckets: dict[tuple[int, int], dict[int, Volume]] = {}
    for number, volume in enumerate(volumes):
        buckets.setdefault(tuple(data.image_size) or volume.data_shape, {})[number] = volume
    if len(buckets) > data.max_shapes:
        five = ", ".join(f"{height}x{width}" for height, width in sorted(buckets)[:5])
        raise UserError(
            f"config.data.max_shapes is {data.max_shapes}, found files of {len(buckets)} sizes, among them {five}; "
            "expected at most as many, for the step is compiled for each; set config.data.image_size for one size, or "
            "raise it"
        )
    make = functools.partial(SliceDataset, rule=data.resize, adjacent_slices=data.adjacent_slices)
    return [make(buckets[size], size) for size in sorted(buckets)]


def describe_buckets(datasets: Sequence[SliceDataset]) -> str:
    """List the shapes and numbers of slices: '2 shapes: 4x28x36 (5 slices), 2x32x32 (4 slices)'."""
    parts = [f"{'x'.join(map(str, dataset.image_shape))} ({len(dataset)} slices)" for dataset in datasets]
    return f"{len(parts)} shape{'' if len(parts) == 1 else 's'}: {', '.join(parts)}"
