"""Grain: from files to host batches. source -> shuffle -> shard by process -> batch -> prefetch.

The order of the examples is a function of the seed and the files. Process p of n takes every n-th example from the
p-th on, so a global batch holds the same examples whatever the number of processes, devices or workers, and the
position in the stream is one number: how many examples were drawn.
"""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from mrjax.data import resize, t5
from mrjax.data.files import Files
from mrjax.errors import UserError

Batch = dict[str, np.ndarray]
Example = dict[str, np.ndarray | np.generic]
logger = logging.getLogger(__name__)


def locate(data: Any, split: str) -> list[str]:
    """The files of a split: what config.data.<split> names, else the split's folder under config.data.dir.

    fastMRI's own folder names (multicoil_train, singlecoil_val, ...) are understood.

    Raises:
      UserError: no such folder, or no file in it.
    """
    if data[split]:
        return t5.find(data[split])
    if not data.dir:
        raise UserError(
            f"config.data.{split} is not set, nor is config.data.dir; expected one of them to name the files"
        )
    if not os.path.isdir(data.dir):
        raise UserError(f"config.data.dir is {data.dir!r}: no such folder, expected one with train/, val/ and test/")
    names = (split, f"multicoil_{split}", f"singlecoil_{split}", f"multicoil_{split}_full")
    for name in names:
        if os.path.isdir(os.path.join(data.dir, name)):
            return t5.find(os.path.join(data.dir, name))
    raise UserError(
        f"config.data.dir is {data.dir!r}: it has no folder {split}/ (nor {', '.join(names[1:])}); "
        f"make one or set config.data.{split}"
    )


def volumes(paths: list[str], layout: str, *, on_bad_file: str, read_all: bool) -> list[t5.Volume]:
    """Describes and checks the files of a split, all of which need a ground truth, before anything is computed.

    Args:
      paths: the files.
      layout: 'kspace' or 'paired', what the task needs.
      on_bad_file: 'error' stops at the first faulty file; 'skip' leaves faulty files out, and of files whose only
        fault is empty slices just those slices, and lists them.
      read_all: whether to read every sample, or the headers only.

    Raises:
      UserError: a faulty file, or none left.
    """
    good = []
    for path in paths:
        try:
            volume = t5.describe(path, layout)
            _needs_truth(volume)
            if read_all:
                volume, faults = t5.check(volume)
                _needs_truth(volume)
                empty = t5.empty_slices(volume)
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
    if not good:
        raise UserError(f"none of the {len(paths)} files can be used, the first is {paths[0]}")
    return good


def _needs_truth(volume: t5.Volume) -> None:
    if volume.layout == "kspace" and volume.undersampled:
        raise UserError(f"{volume.path}: `kspace` is undersampled already, expected fully sampled k-space as the truth")
    if volume.layout == "paired" and not volume.target:
        raise UserError(f"{volume.path}: has no data set `target`, expected one beside `input`")


def common_size(volumes: list[t5.Volume]) -> tuple[int, int]:
    """The (height, width) that all volumes share.

    Raises:
      UserError: they differ, so that config.data.image_size has to say.
    """
    sizes = sorted({volume.data_shape for volume in volumes})
    if len(sizes) > 1:
        found = ", ".join(f"{height}x{width}" for height, width in sizes[:5])
        raise UserError(
            f"config.data.image_size is not set and the files differ in size ({found}), expected (height, width)"
        )
    return sizes[0]


def needs_maximum(volumes: list[t5.Volume]) -> None:
    """Raises a `UserError` if a volume's maximum is not known, which config.normalise = 'volume' goes by."""
    for volume in volumes:
        if not volume.maximum:
            raise UserError(
                f"{volume.path}: has no attribute `max` in the units of its data, expected one for "
                "config.normalise='volume'; 'slice' needs none"
            )


def fingerprint(volumes: list[t5.Volume]) -> str:
    """Changes whenever the examples or their order would: with the names, shapes or usable slices of the files."""
    rows = [(volume.name, volume.shape, volume.empty) for volume in volumes]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    return f"{len(volumes)} files, {sum(v.slices - len(v.empty) for v in volumes)} slices, {digest}"


class Slices:
    """Random access to the slices of volumes, each brought to one size: what Grain calls a source.

    An example is a dict:
      kspace: (coils, height, width) complex64, padded with empty coils to the largest number among the volumes; or
      input, target: (height, width) float32, magnitudes; target is missing if a volume has none
      volume, slice: int32, numbers of the volume in the list and of the slice in it
      name: uint32, a hash of the volume's name
      maximum: float32, the volume's maximum in the file's units, 0 where unknown
    """

    def __init__(self, volumes: list[t5.Volume], image_size: tuple[int, int], rule: str):
        self._volumes = volumes
        self._size = image_size
        self._rule = rule
        self._files = Files()
        self._coils = max(volume.coils for volume in volumes)
        self._paired = all(volume.target for volume in volumes)
        self.where = [(v, i) for v, volume in enumerate(volumes) for i in range(volume.slices) if i not in volume.empty]

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> Example:
        number, i = self.where[index]
        volume = self._volumes[number]
        read = self._kspace if volume.layout == "kspace" else self._images
        return {
            **read(volume, i),
            "volume": np.int32(number),
            "slice": np.int32(i),
            "name": np.uint32(zlib.crc32(volume.name.encode())),
            "maximum": np.float32(volume.maximum or 0),
        }

    def _kspace(self, volume: t5.Volume, i: int) -> Batch:
        kspace = self._files.read(volume.path, "kspace", i).astype(np.complex64, copy=False)
        kspace = kspace.reshape(-1, *kspace.shape[-2:])
        if volume.stored_mask is not None:
            kspace = np.where(np.asarray(volume.stored_mask), kspace, 0)
        kspace = resize.kspace_to(kspace, self._size, self._rule).astype(np.complex64, copy=False)
        missing = self._coils - kspace.shape[0]
        return {"kspace": np.pad(kspace, ((0, missing), (0, 0), (0, 0))) if missing else kspace}

    def _images(self, volume: t5.Volume, i: int) -> Batch:
        def read(name: str) -> np.ndarray:
            image = self._files.read(volume.path, name, i)
            return resize.scale_to((np.abs(image) if image.dtype.kind == "c" else image).astype(np.float32), self._size)

        return {name: read(name) for name in ("input", "target") if name == "input" or self._paired}


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
    source: Slices, *, batch_size: int, seed: int, start: int, workers: int, prefetch: int
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """An endless stream of this process's part of each batch, shuffled anew every epoch.

    Args:
      source: the examples.
      batch_size: of the global batch, over all processes; a multiple of their number.
      seed: of the order.
      start: how many examples were drawn before, a multiple of `batch_size`.
      workers: processes that read; 0 reads in threads of this one.
      prefetch: batches kept ready (by each worker).

    Returns:
      A context manager of an iterator. Its batches also hold `index` (batch,) uint32, the place in the stream.
    """
    stream = grain.MapDataset.source(source).shuffle(seed=seed).repeat().map_with_index(_with_index)
    stream = stream[jax.process_index() :: jax.process_count()].batch(batch_size // jax.process_count())
    return _iterate(stream[start // batch_size :], workers, prefetch)


def _with_index(index: int, example: Example) -> Example:
    return {**example, "index": np.uint32(index)}


class _Padded:
    """A source repeated at its end up to a multiple of the batch, with `valid` telling which examples count."""

    def __init__(self, source: Slices, batch_size: int):
        self._source = source
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return {**self._source[min(index, len(self._source) - 1)], "valid": np.bool_(index < len(self._source))}


def evaluation_batches(
    source: Slices, *, batch_size: int, workers: int, prefetch: int
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """Every example once, in order; the last batch is filled up with examples whose `valid` is False."""
    stream = grain.MapDataset.source(_Padded(source, batch_size))[jax.process_index() :: jax.process_count()]
    return _iterate(stream.batch(batch_size // jax.process_count()), workers, prefetch)
