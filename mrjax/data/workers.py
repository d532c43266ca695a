"""The processes of Grain that read batches: each ends with its parent, and is missed if it is killed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

from mrjax.data.buffers import Batch
from mrjax.errors import UserError


class WatchedBatches(Iterator[Batch]):
    """Batches of Grain's worker processes; `next` raises `UserError` after one of these was killed.

    Grain itself notices only after it has used up what that process had sent before, which can take minutes.
    """

    def __init__(self, batches: Iterator[Batch | None]):
        self._batches = batches
        self._workers: set[BaseProcess] = set()

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            batch = None
        self._workers |= {child for child in multiprocessing.active_children() if child.name.startswith("grain-")}
        if batch is None:  # its memory is gone with the process that wrote it, which may not be quite dead yet
            for worker in self._workers:
                worker.join(0.5)
        ended = next((worker for worker in self._workers if worker.exitcode), None)
        if batch is None or ended:
            raise _explain_end(ended)
        return batch


def _explain_end(worker: BaseProcess | None) -> UserError:
    """Return the error for a worker process that has ended, None if it is not known which."""
    code = (worker and worker.exitcode) or 0
    name = f" (process {worker.pid})" if worker else ""
    end = (
        f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}" if code else "ended"
    )
    way_out = "lower config.data.workers or config.data.prefetch if memory ran out"
    return UserError(f"a data worker{name} {end}, expected it to read to the end; {way_out}")


def start_worker(index: int, count: int) -> None:
    """Tie a worker to its parent: it ignores the signals that the parent handles, and ends with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def exit_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
