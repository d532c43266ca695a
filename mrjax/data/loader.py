"""Grain: from examples to host batches. Order, this process's rows of each batch, prefetch.

The order of the examples is a function of the seed and the files, and with several datasets also of the batch size
(`bucket_of_batch`), for all examples of a batch come from one dataset. A global batch holds the same examples whatever
the number of processes, devices or workers. An example is read straight into its row of the batch.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from mrjax.data.buckets import bucket_of_batch
from mrjax.data.buffers import Batch, Buffers, SharedBatch, batch_spec
from mrjax.data.dataset import Dataset

BatchStream = contextlib.AbstractContextManager[Iterator[Batch]]


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How batches are read."""

    batch_size: int  # of the global batch, over all processes
    workers: int = 0  # processes that read; 0 reads in threads of this one
    prefetch: int = 2  # batches kept ready, by each worker
    rows: Sequence[int] | None = None  # of the global batch that this process reads, all by default


def training_batches(datasets: Sequence[Dataset], options: LoaderOptions, *, seed: int, start: int) -> BatchStream:
    """Open an endless stream of this process's rows of each batch, shuffled anew every epoch by `seed`.

    It goes on after `start` examples, a multiple of the batch size. A batch holds examples of one dataset and `index`
    (rows,) uint32, their position in the stream. Its memory is used again once no view of the batch is held.
    """
    orders = [grain.MapDataset.range(len(dataset)).shuffle(seed=seed).repeat() for dataset in datasets]
    lengths = tuple(len(dataset) for dataset in datasets)
    schedule = functools.partial(bucket_of_batch, lengths, options.batch_size, seed)
    numbers = grain.MapDataset.range(start // options.batch_size, sys.maxsize // options.batch_size)
    return _iterate(numbers.map(_ReadBatch(datasets, orders, schedule, options, "index")), options)


def evaluation_batches(datasets: Sequence[Dataset], options: LoaderOptions) -> BatchStream:
    """Open a stream of every example once, in order, dataset after dataset.

    The last batch of a dataset is filled up with examples whose `valid` (rows,) bool is False.
    """
    orders = [range(len(dataset)) for dataset in datasets]
    counts = [-(-len(order) // options.batch_size) for order in orders]
    schedule = [(number, before) for number, count in enumerate(counts) for before in range(count)]
    numbers = grain.MapDataset.range(len(schedule))
    return _iterate(numbers.map(_ReadBatch(datasets, orders, schedule.__getitem__, options, "valid")), options)


@dataclasses.dataclass
class _ReadBatch:
    """Reads this process's rows of the batch of a number.

    `orders` say for each dataset which example is at each position of that dataset's stream, the last one repeated
    beyond its end; `schedule` for each batch its dataset, and the number of batches that this one had before.
    """

    datasets: Sequence[Dataset]
    orders: Sequence[Sequence[int]]
    schedule: Callable[[int], tuple[int, int]]
    options: LoaderOptions
    label: str

    def __post_init__(self) -> None:
        size = self.options.batch_size
        self.rows = range(size) if self.options.rows is None else self.options.rows
        added = {self.label: ((), np.dtype({"index": np.uint32, "valid": np.bool_}[self.label]))}
        self.buffers = [Buffers(batch_spec(dataset.spec | added, len(self.rows))) for dataset in self.datasets]

    def __call__(self, number: int) -> Batch | SharedBatch:
        bucket, before = self.schedule(number)
        dataset, order, size = self.datasets[bucket], self.orders[bucket], self.options.batch_size

        def read(batch: Batch) -> None:
            for i, row in enumerate(self.rows):
                position = before * size + row
                batch[self.label][i] = number * size + row if self.label == "index" else position < len(dataset)
                example = {name: batch[name][i, ...] for name in dataset.spec}
                dataset.read_into(order[min(position, len(order) - 1)], example)

        return self.buffers[bucket].fill(read)


@contextlib.contextmanager
def _iterate(batches: Any, options: LoaderOptions) -> Iterator[Iterator[Batch]]:
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(options.prefetch, 2))
    stream = batches.to_iter_dataset(read)
    if options.workers:
        if not flags.FLAGS.is_parsed():  # Grain asks absl; a library user has no command line to parse.
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=options.workers, per_worker_buffer_size=options.prefetch)
        stream = stream.mp_prefetch(workers, worker_init_fn=_start_worker)
    with contextlib.closing(iter(stream)) as iterator:
        yield iterator


def _start_worker(index: int, count: int) -> None:
    """Tie a worker to its parent: it ignores the signals that the parent handles, and ends with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
