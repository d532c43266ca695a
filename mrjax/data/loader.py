"""Grain: from files to host batches. source -> shuffle -> this process's rows of a batch -> prefetch.

The order of the examples is a function of the seed and the files; where these differ in shape also of the batch size,
for a batch holds examples of one shape (`turns`). A global batch holds the same examples whatever the number of
processes, devices or workers, and the position in the stream is one number: how many examples were drawn.
An example is read straight into its row of the batch.
"""

import abc
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from mrjax.data import hdf5, resize
from mrjax.data.buffers import Batch, Buffers, Parcel, Spec
from mrjax.data.files import Files
from mrjax.data.schedule import Turns
from mrjax.errors import UserError


class Source(abc.ABC):
    """Examples by their place: `spec` holds the shape and dtype of each of an example's arrays, by name."""

    spec: Spec

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many examples there are."""

    @abc.abstractmethod
    def fill(self, place: int, example: Batch) -> None:
        """Writes the example at `place` into arrays of `spec`, each C-contiguous."""

    def __getitem__(self, place: int) -> Batch:
        example = {name: np.empty(shape, dtype) for name, (shape, dtype) in self.spec.items()}
        self.fill(place, example)
        return example


class Slices(Source):
    """Random access to the slices of volumes, each brought to one size.

    An example is a dict:
      kspace: (coils, height, width) complex64, padded with empty coils to the largest number among the volumes; and
      repetitions: (repetitions, coils, height, width) complex64, the same slice of the volume's other repetitions, padded
        with empty ones to the largest number among the volumes, where any has others; and
      mask: (width,) bool, the columns to keep, where k-space is all there and all volumes store it; or
      input, target: (height, width) float32, magnitudes; target is missing if a volume has none
      volume, slice: int32, numbers of the volume in the list and of the slice in it
      name: uint32, a hash of the volume's name
      maximum: float32, the volume's maximum in the file's units, 0 where unknown

    With `neighbours` = n above 0, kspace or input has one more axis in front, (2n + 1, ...): the slice itself, then the
    n before it and the n after it, in order; beyond either end the last one is repeated.
    """

    def __init__(self, volumes: list[hdf5.Volume], image_size: tuple[int, int], rule: str, neighbours: int = 0):
        self._volumes = volumes
        self._beside = [0, *range(-neighbours, 0), *range(1, neighbours + 1)]
        self._size = (image_size[0], image_size[1])
        self._rule = rule
        self._files = Files({(volume.path, name): lie for volume in volumes for name, lie in volume.layouts})
        self._names = [zlib.crc32(volume.name.encode()) for volume in volumes]
        self.where = [(v, i) for v, volume in enumerate(volumes) for i in range(volume.slices) if i not in volume.empty]
        several = (len(self._beside),) if neighbours else ()
        if volumes[0].layout == "kspace":
            coils, kind = max(volume.coils for volume in volumes), np.dtype(np.complex64)
            data: Spec = {"kspace": ((*several, coils, *self._size), kind)}
            if others := max(len(volume.others) for volume in volumes):
                data["repetitions"] = ((others, coils, *self._size), kind)
            if all(volume.stored_mask and not volume.undersampled for volume in volumes):
                data["mask"] = ((self._size[1],), np.dtype(np.bool_))
                for volume in volumes:
                    if volume.shape[-1] != self._size[1]:
                        raise UserError(
                            f"{volume.path}: `mask` has {volume.shape[-1]} columns, expected config.data.image_size, "
                            f"which is {self._size}, to be as wide"
                        )
        else:
            data = {"input": ((*several, *self._size), np.dtype(np.float32))}
            if all(volume.target for volume in volumes):
                data["target"] = (self._size, np.dtype(np.float32))
        labels = {"volume": np.int32, "slice": np.int32, "name": np.uint32, "maximum": np.float32}
        self.spec = data | {name: ((), np.dtype(dtype)) for name, dtype in labels.items()}

    def __len__(self) -> int:
        return len(self.where)

    def fill(self, place: int, example: Batch) -> None:
        """Reads a slice: without a copy in between where the file holds just what is wanted."""
        number, i = self.where[place]
        volume = self._volumes[number]
        read = self._kspace if volume.layout == "kspace" else self._image
        data = example[volume.data]
        for offset, out in zip(self._beside, data if len(self._beside) > 1 else data[None], strict=True):
            read(volume, (volume.path, volume.data, min(max(i + offset, 0), volume.slices - 1)), out)
        if "target" in self.spec:
            self._image(volume, (volume.path, "target", i), example["target"])
        if "mask" in self.spec:
            example["mask"][...] = volume.stored_mask
        if "repetitions" in self.spec:
            example["repetitions"][len(volume.others) :] = 0
            for path, out in zip(volume.others, example["repetitions"], strict=False):
                self._kspace(volume, (path, "kspace", i), out)
        labels = (number, i, self._names[number], volume.maximum or 0)
        for name, label in zip(("volume", "slice", "name", "maximum"), labels, strict=True):
            example[name][...] = label

    def _kspace(self, volume: hdf5.Volume, where: tuple[str, str, int], out: np.ndarray) -> None:
        filled, missing = out[: volume.coils], out[volume.coils :]
        missing[...] = 0
        kspace = self._files.read(*where, filled)
        masked = volume.stored_mask is not None and volume.undersampled
        if kspace is filled and not masked:
            return
        kspace = kspace.astype(np.complex64, copy=False)
        kspace = kspace.reshape(-1, *kspace.shape[-2:])
        if masked:
            kspace = np.where(np.asarray(volume.stored_mask), kspace, 0)
        filled[...] = resize.kspace_to(kspace, self._size, self._rule)

    def _image(self, volume: hdf5.Volume, where: tuple[str, str, int], out: np.ndarray) -> None:
        image = self._files.read(*where, out)
        if image is not out:
            magnitude = (np.abs(image) if image.dtype.kind == "c" else image).astype(np.float32)
            out[...] = resize.scale_to(magnitude, self._size)


class Numbers(Source):
    """The places of another source's examples: for data that lie elsewhere already, in the same order."""

    def __init__(self, source: Source):
        self._length = len(source)
        self.spec = {"example": ((), np.dtype(np.int32))}

    def __len__(self) -> int:
        return self._length

    def fill(self, place: int, example: Batch) -> None:
        """Writes the place itself."""
        example["example"][...] = place


def _start_worker(index: int, count: int) -> None:
    """Ties a worker to its parent: it lives through the signals that the parent answers, and not longer than it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


class _Batches:
    """This process's part of each batch, by the batch's number: a source for Grain.

    Args:
      sources: the examples; all of a batch are of one of them.
      places: for each source the example's place in it, by its place in the stream of that source.
      turns: for each batch its source, and the number of batches that this one had before.
      batch_size: of the global batch.
      rows: the places in it that are read here.
      label: one more array beside the source's: its name and dtype, and its value by the place in the whole stream,
        the place in the source's stream and the length of the source.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        places: Sequence[Sequence[int]],
        turns: Sequence[tuple[int, int]],
        batch_size: int,
        rows: Sequence[int],
        label: tuple[str, type, Callable[[int, int, int], int]],
    ):
        self._sources = sources
        self._places = places
        self._turns = turns
        self._batch_size = batch_size
        self._rows = rows
        self._label, kind, self._value = label
        specs = [source.spec | {self._label: ((), np.dtype(kind))} for source in sources]
        self._buffers = [
            Buffers({name: ((len(rows), *shape), dtype) for name, (shape, dtype) in spec.items()}) for spec in specs
        ]

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, number: int) -> Batch | Parcel:
        source, turn = self._turns[number]
        return self._buffers[source].fill(functools.partial(self._write, source, number, turn))

    def _write(self, source: int, number: int, turn: int, batch: Batch) -> None:
        examples, places = self._sources[source], self._places[source]
        for i, row in enumerate(self._rows):
            place = turn * self._batch_size + row
            batch[self._label][i] = self._value(number * self._batch_size + row, place, len(examples))
            examples.fill(places[place], {name: batch[name][i, ...] for name in examples.spec})


def _index(in_stream: int, in_source: int, length: int) -> int:
    return in_stream


def _valid(in_stream: int, in_source: int, length: int) -> int:
    return in_source < length


class _InOrder(Sequence[int]):
    """0, 1, 2, ... up to `count`, the last one repeated up to a multiple of the batch."""

    def __init__(self, count: int, batch_size: int):
        self._last = count - 1
        self._length = -(-count // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return min(index, self._last)


@contextlib.contextmanager
def _iterate(dataset: Any, workers: int, prefetch: int) -> Iterator[Iterator[Batch]]:
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(prefetch, 2)))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain asks absl; a library user has no command line to parse.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    iterator = iter(dataset)
    try:
        yield iterator
    finally:
        iterator.close()


def training_batches(
    source: Source | Sequence[Source],
    *,
    batch_size: int,
    seed: int,
    start: int,
    workers: int,
    prefetch: int,
    rows: Sequence[int] | None = None,
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """An endless stream of this process's part of each batch, shuffled anew every epoch.

    The b-th global batch holds the stream's examples from b * batch_size on, whatever the number of processes.

    Args:
      source: the examples; of several sources, each batch holds examples of one.
      batch_size: of the global batch, over all processes.
      seed: of the order.
      start: how many examples were drawn before, a multiple of `batch_size`.
      workers: processes that read; 0 reads in threads of this one.
      prefetch: batches kept ready (by each worker).
      rows: the places within the global batch that are read here, all of them by default.

    Returns:
      A context manager of an iterator. Its batches also hold `index` (rows,) uint32, the place in the stream. Their
      memory is used again once neither they nor a view of them is held.
    """
    sources = [source] if isinstance(source, Source) else source
    orders = [grain.MapDataset.range(len(one)).shuffle(seed=seed).repeat() for one in sources]
    turns = Turns([len(one) for one in sources], batch_size, seed)
    part = range(batch_size) if rows is None else rows
    batches = _Batches(sources, orders, turns, batch_size, part, ("index", np.uint32, _index))
    return _iterate(grain.MapDataset.source(batches)[start // batch_size :], workers, prefetch)


def evaluation_batches(
    source: Source | Sequence[Source],
    *,
    batch_size: int,
    workers: int,
    prefetch: int,
    rows: Sequence[int] | None = None,
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """Every example once, in order, source after source.

    The last batch of a source is filled up with examples whose `valid` (rows,) bool is False.
    """
    sources = [source] if isinstance(source, Source) else source
    orders = [_InOrder(len(one), batch_size) for one in sources]
    turns = [(i, turn) for i, order in enumerate(orders) for turn in range(len(order) // batch_size)]
    part = range(batch_size) if rows is None else rows
    batches = _Batches(sources, orders, turns, batch_size, part, ("valid", np.bool_, _valid))
    return _iterate(grain.MapDataset.source(batches), workers, prefetch)
