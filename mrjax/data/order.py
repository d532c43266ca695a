"""The order of an endless stream of training batches, a function of the seed and of the numbers of examples.

Each epoch is one of NumPy's permutations. Grain's `shuffle` computes each place anew, which in small data sets takes
longer than reading a slice.
"""

import functools

import numpy as np


class ShuffledOrder:
    """Which of `length` examples is at each position of an endless stream, shuffled anew every epoch."""

    def __init__(self, length: int, seed: int):
        self._length = length
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> int:
        """Return the number of the example; fast for positions of the two epochs that were asked for last."""
        epoch, within_epoch = divmod(position, self._length)
        order = self._epochs.get(epoch)
        if order is None:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._length)
            self._epochs = dict([*self._epochs.items()][-1:]) | {epoch: order}
        return int(order[within_epoch])


def bucket_of_batch(lengths: tuple[int, ...], batch_size: int, seed: int, number: int) -> tuple[int, int]:
    """Return the bucket of a batch of an endless stream, and how many batches that bucket had before.

    After e epochs a bucket of n examples has had e * n of them, less than a batch fewer: what an epoch leaves over
    counts for the next. The batches of an epoch are shuffled.
    """
    epoch = number * batch_size // sum(lengths)
    while sum((epoch + 1) * length // batch_size for length in lengths) <= number:
        epoch += 1
    before, buckets = _shuffled_epoch(lengths, batch_size, seed, epoch)
    within_epoch = number - before.sum()
    bucket = buckets[within_epoch]
    return int(bucket), int(before[bucket] + np.count_nonzero(buckets[:within_epoch] == bucket))


@functools.lru_cache(maxsize=4)
def _shuffled_epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many batches each bucket had before an epoch, and the bucket of each batch of the epoch."""
    before, after = (np.array([n * length // batch_size for length in lengths]) for n in (epoch, epoch + 1))
    buckets = np.repeat(np.arange(len(lengths)), after - before)
    return before, np.random.default_rng((seed, epoch)).permutation(buckets)
