"""Whose turn it is: which of several sources each batch of a stream comes from."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np


class Turns(Sequence[tuple[int, int]]):
    """For each batch of an endless stream the number of its source, and how many batches that one had before.

    In every epoch each source has as many turns as there are batches in it, and what is left over of a batch counts
    for the next: after e epochs a source of n examples has had e * n of them, less than a batch fewer. The turns of an
    epoch are shuffled.

    Args:
      lengths: of the sources.
      batch_size: of a batch.
      seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self._lengths = tuple(lengths)
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, number: Any) -> Any:
        epoch = number * self._batch_size // sum(self._lengths)
        while self._start(epoch + 1) <= number:
            epoch += 1
        source, turn = _epoch(self._lengths, self._batch_size, self._seed, epoch)
        place = number - self._start(epoch)
        return int(source[place]), int(turn[place])

    def _start(self, epoch: int) -> int:
        return sum(epoch * length // self._batch_size for length in self._lengths)


@functools.lru_cache(maxsize=4)
def _epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each batch of an epoch, and its number among all batches of that source."""
    first, end = ([n * length // batch_size for length in lengths] for n in (epoch, epoch + 1))
    source = np.repeat(np.arange(len(lengths)), np.subtract(end, first))
    turn = np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)])
    order = np.random.default_rng((seed, epoch)).permutation(len(source))
    # Shuffled are the sources: each gives its batches in its own order.
    shuffled = source[order]
    return shuffled, turn[np.argsort(np.argsort(shuffled, kind="stable"), kind="stable")]
