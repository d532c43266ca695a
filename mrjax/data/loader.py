"""Grain: from examples to host batches. This process's rows of each batch, threads, worker processes, prefetch.

The order of the examples (`order.py`) is a function of the seed and the files, and with several datasets also of the
batch size, for all examples of a batch come from one dataset. A global batch holds the same examples whatever the
number of processes, devices or workers. An example is read straight into its row of the batch.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags

from mrjax.data.buffers import Batch, Buffers, SharedBatch
from mrjax.data.dataset import Dataset
from mrjax.data.faults import FAULT, FaultyReader, count_faults
from mrjax.data.order import ShuffledOrder, bucket_of_batch
from mrjax.data.workers import WatchedBatches, start_worker

BatchStream = contextlib.AbstractContextManager[Iterator[Batch]]


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How batches are read."""

    batch_size: int  # of the global batch, over all processes
    workers: int = 0  # processes that read; 0 reads in threads of this one
    prefetch: int = 2  # batches kept ready, by each worker
    rows: Sequence[int] | None = None  # of the global batch that this process reads, all by default
    substitute: bool = False  # whether in training others take the place of examples that cannot be read


def training_batches(datasets: Sequence[Dataset], options: LoaderOptions, *, seed: int, start: int) -> BatchStream:
    """Open an endless stream of this process's rows of each batch, shuffled anew every epoch by `seed`.

    It goes on after `start` examples, a multiple of the batch size. A batch holds examples of one dataset and `index`
    (rows,) uint32, their position in the stream. Its memory is used again once no view of the batch is held. At the end
    of the stream the files that failed are logged. `next` raises `UserError` for an example that cannot be read, and
    for a worker process that was killed.
    """
    orders = [ShuffledOrder(len(dataset), seed) for dataset in datasets]
    lengths, size = tuple(map(len, datasets)), options.batch_size
    schedule = functools.partial(bucket_of_batch, lengths, size, seed)
    numbers = grain.MapDataset.range(start // size, sys.maxsize // size)
    return _read_batches(datasets, orders, schedule, numbers, "index", options)


def evaluation_batches(datasets: Sequence[Dataset], options: LoaderOptions) -> BatchStream:
    """Open a stream of every example once, in order, dataset after dataset.

    The last batch of a dataset is filled up with examples whose `valid` (rows,) bool is False. `next` raises as that of
    `training_batches`; nothing takes the place of an example here.
    """
    orders = [functools.partial(min, len(dataset) - 1) for dataset in datasets]
    counts = [-(-len(dataset) // options.batch_size) for dataset in datasets]
    schedule = [(bucket, before) for bucket, count in enumerate(counts) for before in range(count)]
    numbers = grain.MapDataset.range(len(schedule))
    options = dataclasses.replace(options, substitute=False)
    return _read_batches(datasets, orders, schedule.__getitem__, numbers, "valid", options)


@contextlib.contextmanager
def _read_batches(
    datasets: Sequence[Dataset],
    orders: Sequence[Callable[[int], int]],
    schedule: Callable[[int], tuple[int, int]],
    numbers: grain.MapDataset,
    label: str,
    options: LoaderOptions,
) -> Iterator[Iterator[Batch]]:
    """Open a stream of this process's rows of the batches of these numbers, with `label`, 'index' or 'valid'.

    `schedule` says for each batch its dataset, and the number of batches that this one had before; `orders` for each
    dataset which example is at each position of that dataset's stream.
    """
    size = options.batch_size
    rows = range(size) if options.rows is None else options.rows
    labels = {label: ((), np.dtype({"index": np.uint32, "valid": np.bool_}[label])), "fault": ((), FAULT)}
    specs = [dataset.spec | labels for dataset in datasets]
    buffers = [Buffers({name: ((len(rows), *shape), dtype) for name, (shape, dtype) in spec.items()}) for spec in specs]
    reader = FaultyReader(options.substitute)

    def read_batch(number: int) -> Batch | SharedBatch:
        bucket, before = schedule(number)
        dataset, order = datasets[bucket], orders[bucket]

        def write(batch: Batch) -> None:
            for i, row in enumerate(rows):
                position = before * size + row
                batch[label][i] = number * size + row if label == "index" else position < len(dataset)
                example = {name: batch[name][i, ...] for name in dataset.spec}
                batch["fault"][i] = reader.read_into(dataset, order(position), example)

        return buffers[bucket].fill(write)

    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(options.prefetch, 2))
    stream = numbers.map(read_batch).to_iter_dataset(reading)
    if options.workers:
        flags.FLAGS.mark_as_parsed()  # Grain asks absl; a library user has no command line to parse.
        workers = grain.MultiprocessingOptions(num_workers=options.workers, per_worker_buffer_size=options.prefetch)
        stream = stream.mp_prefetch(workers, worker_init_fn=start_worker)

    with contextlib.closing(iter(stream)) as iterator, count_faults() as count:

        def take_faults(batch: Batch) -> Batch:
            for fault in batch.pop("fault"):
                count(fault)
            return batch

        yield map(take_faults, WatchedBatches(iterator))
