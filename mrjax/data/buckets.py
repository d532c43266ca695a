"""Volumes of several sizes in few shapes: batches hold slices of one bucket, each as it is, in the upper left corner.

What a slice is padded with changes nothing of what becomes of it (`mrjax.sizes`), so that buckets are a matter of
speed: fewer of them are fewer compilations, more of them less padding.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mrjax.data.buffers import Batch, Spec
from mrjax.data.hdf5 import Volume
from mrjax.data.loader import Slices, Source

Shape = tuple[int, int, int]


def shape_of(volume: Volume) -> Shape:
    """(coils, height, width) of a volume."""
    return (volume.coils, *volume.data_shape)


def plan(counts: dict[Shape, int], most: int) -> list[list[Shape]]:
    """Shapes brought together into at most `most` buckets, in each of which all are padded to the largest.

    The two buckets that add the fewest padded pixels when they become one do so, time and again; of equals those that
    add the fewest samples of coils, which cost much less than a network's pixels.

    Args:
      counts: how many slices there are of each (coils, height, width).
      most: number of buckets.

    Returns:
      The shapes of each bucket, no two buckets with the same largest shape.
    """
    found = [_Group([shape], counts[shape], shape) for shape in sorted(counts)]
    while len(found) > 1:
        one, other = min(itertools.combinations(found, 2), key=lambda pair: _added(*pair))
        if len(found) <= most and any(_added(one, other)):
            break
        both = _Group(
            sorted(one.shapes + other.shapes), one.slices + other.slices, enclosing([one.largest, other.largest])
        )
        found = [*(group for group in found if group is not one and group is not other), both]
    return sorted(group.shapes for group in found)


class _Group(NamedTuple):
    """Shapes of one bucket, the number of their slices, and what they are padded to."""

    shapes: list[Shape]
    slices: int
    largest: tuple[int, ...]


def _added(one: _Group, other: _Group) -> tuple[int, int]:
    """Pixels, and samples of coils, by which the padding grows when two groups become one."""
    coils, height, width = map(max, one.largest, other.largest)
    pixels = samples = 0
    for group in (one, other):
        pixels += group.slices * (height * width - math.prod(group.largest[1:]))
        samples += group.slices * (coils * height * width - math.prod(group.largest))
    return pixels, samples


def enclosing(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The smallest shape that all fit into."""
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


class Bucket(Source):
    """Random access to the slices of volumes of several sizes.

    An example is one of `Slices` at the volume's own size, in the corner of arrays that hold the largest, zero beyond;
    `volume` is its number in all `volumes`; and there is one more array:
      size: (2,) int32, its own height and width

    Attributes:
      shape: that of the largest array of an example, which ends in (coils,) height, width.
      sizes: each (height, width) that its volumes have.
      pixels: that are no padding, of all slices.
    """

    def __init__(self, volumes: list[Volume], shapes: Sequence[Shape], neighbours: int = 0):
        """The slices of those of the volumes that have one of the shapes."""
        self.sizes = sorted({shape[1:] for shape in shapes})
        self._numbers = [
            [v for v, volume in enumerate(volumes) if shape_of(volume) in shapes and volume.data_shape == size]
            for size in self.sizes
        ]
        self._slices = [
            Slices([volumes[v] for v in numbers], size, "kspace", neighbours)
            for numbers, size in zip(self._numbers, self.sizes, strict=True)
        ]
        self._ends = list(itertools.accumulate(map(len, self._slices)))
        specs = [slices.spec for slices in self._slices]
        self.spec: Spec = {
            name: (enclosing([spec[name][0] for spec in specs]), dtype) for name, (_, dtype) in specs[0].items()
        }
        self.spec["size"] = ((2,), np.dtype(np.int32))
        self.shape = max((len(shape), shape) for shape, _ in self.spec.values())[1]
        self.pixels = sum(len(s) * math.prod(size) for s, size in zip(self._slices, self.sizes, strict=True))

    def __len__(self) -> int:
        return self._ends[-1]

    def fill(self, place: int, example: Batch) -> None:
        """Reads a slice: straight into its place where that is in one piece."""
        part = bisect.bisect(self._ends, place)
        slices = self._slices[part]
        corners: Batch = {}
        own: Batch = {}
        for name, (shape, dtype) in slices.spec.items():
            upper_left: Any = (*map(slice, shape), ...)
            corner = example[name][upper_left]
            if corner.size < example[name].size:
                example[name][...] = 0
            corners[name], own[name] = corner, corner if corner.flags.c_contiguous else np.empty(shape, dtype)
        slices.fill(place - self._ends[part] + len(slices), own)
        for name, corner in corners.items():
            if own[name] is not corner:
                corner[...] = own[name]
        example["volume"][...] = self._numbers[part][int(example["volume"])]
        example["size"][...] = self.sizes[part]


def buckets(volumes: list[Volume], most: int, neighbours: int = 0) -> list[Bucket]:
    """The slices of the volumes in at most `most` buckets."""
    counts: dict[Shape, int] = {}
    for volume in volumes:
        counts[shape_of(volume)] = counts.get(shape_of(volume), 0) + volume.slices - len(volume.empty)
    return [Bucket(volumes, shapes, neighbours) for shapes in plan(counts, most)]


def describe(found: Sequence[Bucket]) -> str:
    """As in '2 shapes for 3 sizes, 12 % padding: 4x32x32 (12 slices of 24x20, 32x32), 2x28x36 (5 slices of 28x36)'."""
    parts = [
        f"{'x'.join(map(str, bucket.shape))} ({len(bucket)} slices of {', '.join(f'{h}x{w}' for h, w in bucket.sizes)})"
        for bucket in found
    ]
    sizes = {size for bucket in found for size in bucket.sizes}
    padded = sum(len(bucket) * math.prod(bucket.shape[-2:]) for bucket in found)
    padding = 1 - sum(bucket.pixels for bucket in found) / padded
    plural = "s" if len(found) > 1 else ""
    return f"{len(found)} shape{plural} for {len(sizes)} sizes, {100 * padding:.0f} % padding: {', '.join(parts)}"
