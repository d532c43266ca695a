"""Volumes of several sizes: one bucket of slices for each, and which bucket each batch comes from."""

import functools
from collections.abc import Sequence

import numpy as np

from mrjax.data.dataset import SliceDataset
from mrjax.data.volume import Volume
from mrjax.errors import UserError


def bucket_by_size(volumes: Sequence[Volume], max_shapes: int, adjacent_slices: int = 0) -> list[SliceDataset]:
    """Make a dataset for each exact (height, width) of the volumes, in ascending order of size.

    Coils are zero-padded to the most in each dataset, and `volume` in the examples counts in the list of all volumes.
    Raises `UserError` for more than `max_shapes` sizes.
    """
    buckets: dict[tuple[int, int], list[int]] = {}
    for number, volume in enumerate(volumes):
        buckets.setdefault(volume.data_shape, []).append(number)
    if len(buckets) > max_shapes:
        five = ", ".join(f"{height}x{width}" for height, width in sorted(buckets)[:5])
        raise UserError(
            f"config.data.max_shapes is {max_shapes}, found files of {len(buckets)} sizes, among them {five}; expected "
            "at most as many, for the step is compiled for each; set config.data.image_size for one size, or raise it"
        )
    return [
        SliceDataset(volumes, size, adjacent_slices=adjacent_slices, volume_numbers=numbers)
        for size, numbers in sorted(buckets.items())
    ]


def describe_buckets(datasets: Sequence[SliceDataset]) -> str:
    """List the shapes and numbers of slices: '2 shapes: 4x28x36 (5 slices), 2x32x32 (4 slices)'."""
    parts = [f"{'x'.join(map(str, dataset.image_shape))} ({len(dataset)} slices)" for dataset in datasets]
    return f"{len(parts)} shape{'' if len(parts) == 1 else 's'}: {', '.join(parts)}"


def bucket_of_batch(lengths: tuple[int, ...], batch_size: int, seed: int, number: int) -> tuple[int, int]:
    """Return the bucket of a batch of an endless stream, and how many batches that bucket had before.

    After e epochs a bucket of n examples has had e * n of them, less than a batch fewer: what an epoch leaves over
    counts for the next. The batches of an epoch are shuffled.
    """

    def first_batch(epoch: int) -> int:
        return sum(epoch * length // batch_size for length in lengths)

    epoch = number * batch_size // sum(lengths)
    while first_batch(epoch + 1) <= number:
        epoch += 1
    buckets, counts = _shuffled_epoch(lengths, batch_size, seed, epoch)
    within_epoch = number - first_batch(epoch)
    return int(buckets[within_epoch]), int(counts[within_epoch])


@functools.lru_cache(maxsize=4)
def _shuffled_epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket of each batch of an epoch, and the number of that bucket's batches before it."""
    first, end = ([n * length // batch_size for length in lengths] for n in (epoch, epoch + 1))
    buckets = np.repeat(np.arange(len(lengths)), np.subtract(end, first))
    counts = np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)])
    # The buckets are shuffled; the batches of each keep their order.
    buckets = np.random.default_rng((seed, epoch)).permutation(buckets)
    return buckets, counts[np.argsort(np.argsort(buckets, kind="stable"), kind="stable")]
