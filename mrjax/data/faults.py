"""Files that fail while they are in use: read again, in training replaced by other examples, counted and listed."""

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np

from mrjax.data.buffers import Batch
from mrjax.data.dataset import Dataset
from mrjax.errors import UserError

logger = logging.getLogger(__name__)
PAUSES = (0.1, 0.5, 2.0)  # seconds, each before another try: network file systems fail for moments
FAULT = np.dtype("S1000")  # what `FaultyReader` says of an example, as an array of a batch


class FaultyReader:
    """Reads examples of datasets whose files may fail, from any thread; a worker process has a copy of its own.

    With `substitute` another example takes the place of one that cannot be read. Which one is a function of its number,
    so that it is the same in a resumed run; those of a bad file are spread over all others.
    """

    def __init__(self, substitute: bool):
        self._substitute = substitute
        self._bad_files: set[str] = set()  # that every try failed for: one is enough from then on

    def read_into(self, dataset: Dataset, number: int, example: Batch) -> bytes:
        """Read an example; return b'', or why another one took its place. Raises `UserError` if none can be read."""
        for pause in (*PAUSES, None):
            try:
                dataset.read_into(number, example)
                return b""
            except UserError as error:
                fault = str(error)
            if pause is None or _file(fault) in self._bad_files:
                break
            time.sleep(pause)
        self._bad_files.add(_file(fault))
        others = np.random.default_rng(number).permutation(len(dataset) if self._substitute else 0)
        for other in map(int, others):
            with contextlib.suppress(UserError):
                dataset.read_into(other, example)
                return fault.encode()
        raise UserError(f"{fault} in {1 + len(PAUSES)} tries, expected the file as it was at the start")


@contextlib.contextmanager
def count_faults() -> Iterator[Callable[[bytes], None]]:
    """Yield a function that takes what `FaultyReader` says of an example; log each file once, and all at the end."""
    counts: collections.Counter[str] = collections.Counter()

    def add(fault: bytes) -> None:
        if fault:
            sentence = fault.decode(errors="replace")
            if _file(sentence) not in counts:
                logger.warning("%s: another example takes its place", sentence)
            counts[_file(sentence)] += 1

    try:
        yield add
    finally:
        if counts:
            files = ", ".join(f"{file} ({count})" for file, count in sorted(counts.items()))
            logger.warning("%d times another example was read in the place of one of: %s", counts.total(), files)


def _file(sentence: str) -> str:
    """Return the file that an error is about, with which it begins."""
    return sentence.partition(": ")[0]
