"""Grain: from examples to host batches. Order, this process's rows of each batch, prefetch.

The order of the examples is a function of the seed and the files, and with several datasets also of the batch size
(`BucketSchedule`), for all examples of a batch come from one dataset. A global batch holds the same examples whatever
the number of processes, devices or workers, and the position in the stream is one number: how many examples were drawn.
An example is read straight into its row of the batch.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from mrjax.data.buckets import BucketSchedule
from mrjax.data.buffers import Batch, Buffers, SharedBatch, batch_spec
from mrjax.data.dataset import Dataset

BatchStream = contextlib.AbstractContextManager[Iterator[Batch]]


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How batches are read.

    Attributes:
      batch_size: of the global batch, over all processes.
      workers: processes that read; 0 reads in threads of this one.
      prefetch: batches kept ready, by each worker.
      rows: of the global batch that this process reads, all by default.
    """

    batch_size: int
    workers: int = 0
    prefetch: int = 2
    rows: Sequence[int] | None = None


def training_batches(datasets: Sequence[Dataset], options: LoaderOptions, *, seed: int, start: int) -> BatchStream:
    """Open an endless stream of this process's rows of each batch, shuffled anew every epoch.

    The b-th global batch holds the stream's examples from b * batch_size on, whatever the number of processes.

    Args:
      datasets: each batch holds examples of one.
      options: how to read.
      seed: of the order.
      start: how many examples were drawn before, a multiple of the batch size.

    Returns:
      A context manager of an iterator. Its batches also hold `index` (rows,) uint32, the position in the stream. Their
      memory is used again once neither they nor a view of them is held.
    """
    orders = [grain.MapDataset.range(len(dataset)).shuffle(seed=seed).repeat() for dataset in datasets]
    schedule = BucketSchedule([len(dataset) for dataset in datasets], options.batch_size, seed)
    batches = grain.MapDataset.source(_Batches(datasets, orders, schedule, options, "index"))
    return _iterate(batches[start // options.batch_size :], options)


def evaluation_batches(datasets: Sequence[Dataset], options: LoaderOptions) -> BatchStream:
    """Open a stream of every example once, in order, dataset after dataset.

    The last batch of a dataset is filled up with examples whose `valid` (rows,) bool is False.
    """
    counts = [-(-len(dataset) // options.batch_size) for dataset in datasets]
    orders = [
        np.minimum(np.arange(count * options.batch_size), len(dataset) - 1)
        for dataset, count in zip(datasets, counts, strict=True)
    ]
    schedule = [(number, before) for number, count in enumerate(counts) for before in range(count)]
    batches = _Batches(datasets, orders, schedule, options, "valid")
    return _iterate(grain.MapDataset.source(batches), options)


class _Batches:
    """This process's rows of each batch, by the number of the batch: a source for Grain.

    Args:
      datasets: the examples.
      orders: for each dataset the number of the example at each position of that dataset's stream.
      schedule: for each batch its dataset, and the number of batches that this one had before.
      options: how to read.
      label: the array to add: 'index' or 'valid'.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        orders: Sequence[Sequence[int] | np.ndarray],
        schedule: Sequence[tuple[int, int]],
        options: LoaderOptions,
        label: str,
    ):
        self._datasets = datasets
        self._orders = orders
        self._schedule = schedule
        self._batch_size = options.batch_size
        self._rows = range(options.batch_size) if options.rows is None else options.rows
        added = {label: ((), np.dtype({"index": np.uint32, "valid": np.bool_}[label]))}
        self._buffers = [Buffers(batch_spec(dataset.spec | added, len(self._rows))) for dataset in datasets]

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, number: int) -> Batch | SharedBatch:
        dataset, before = self._schedule[number]
        return self._buffers[dataset].fill(functools.partial(self._read_into, dataset, number, before))

    def _read_into(self, dataset_number: int, number: int, before: int, batch: Batch) -> None:
        dataset, order = self._datasets[dataset_number], self._orders[dataset_number]
        for i, row in enumerate(self._rows):
            position = before * self._batch_size + row
            if "index" in batch:
                batch["index"][i] = number * self._batch_size + row
            else:
                batch["valid"][i] = position < len(dataset)
            dataset.read_into(int(order[position]), {name: batch[name][i, ...] for name in dataset.spec})


@contextlib.contextmanager
def _iterate(batches: Any, options: LoaderOptions) -> Iterator[Iterator[Batch]]:
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(options.prefetch, 2))
    stream = batches.to_iter_dataset(read)
    if options.workers:
        if not flags.FLAGS.is_parsed():  # Grain asks absl; a library user has no command line to parse.
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=options.workers, per_worker_buffer_size=options.prefetch)
        stream = stream.mp_prefetch(workers, worker_init_fn=_start_worker)
    iterator = iter(stream)
    try:
        yield iterator
    finally:
        iterator.close()


def _start_worker(index: int, count: int) -> None:
    """Tie a worker to its parent: it ignores the signals that the parent handles, and ends with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
