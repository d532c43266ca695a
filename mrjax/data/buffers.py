"""Reusable memory for batches: filled again as soon as nobody holds the batch.

Fresh memory costs several times the copy of the data itself, for the system clears every page before its first use.
Here a page is touched once in a run, and workers write into memory that both processes map: no copy brings it over.
"""

import contextlib
import itertools
import math
import mmap
import os
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype of each array by name
SHARED = hasattr(os, "memfd_create")
_ALIGNMENT = 64  # JAX takes arrays that start at a multiple of this without a copy on a CPU.

_buffers_by_key: weakref.WeakValueDictionary[str, "Buffers"] = weakref.WeakValueDictionary()


class SharedBatch(NamedTuple):
    """A batch made by a worker process; unpickled by the process that made the `Buffers`, it is the batch itself."""

    key: str
    path: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, tuple(self)


def _receive(key: str, path: str) -> Batch | None:
    """Return the batch; None if it comes too late: the worker has ended, or the loader is closing."""
    buffers = _buffers_by_key.get(key)
    with contextlib.suppress(OSError):
        return buffers.receive(path) if buffers else None
    return None


class Buffers:
    """A pool of buffers for batches of one spec, as many as there are batches held at once.

    A copy pickled to a worker process has its own buffers, in memory that the sender can map.
    """

    def __init__(self, spec: Spec, key: str | None = None):
        self._spec = spec
        self._key = key or uuid.uuid4().hex
        self._shared = SHARED and key is not None
        self._lock = threading.Lock()
        # By the path where other processes open it; the last byte is 1 while a buffer is in use.
        self._pool: dict[str, mmap.mmap] = {}
        lengths = [-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) for shape, dtype in spec.values()]
        *self._offsets, end = (_ALIGNMENT * start for start in itertools.accumulate(lengths, initial=0))
        self._size = end + 1
        if key is None:
            _buffers_by_key[self._key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffers, (self._spec, self._key)

    def fill(self, write: Callable[[Batch], None]) -> Batch | SharedBatch:
        """Return a batch written by `write`, which gets uninitialised arrays; in a worker process a `SharedBatch`."""
        with self._lock:
            free = (path for path, memory in self._pool.items() if not memory[-1])
            path = next(free, None) or self._allocate()
            memory = self._pool[path]
            memory[-1] = 1
        try:
            write(self._arrays(np.frombuffer(memory, np.uint8)))
        except BaseException:
            memory[-1] = 0
            raise
        return SharedBatch(self._key, path) if self._shared else self._lend(memory)

    def receive(self, path: str) -> Batch:
        """Return the batch that a worker process wrote into the memory at `path`."""
        if path not in self._pool:
            with open(path, "r+b") as file:
                self._pool[path] = mmap.mmap(file.fileno(), self._size)
        return self._lend(self._pool[path])

    def _allocate(self) -> str:
        if self._shared:
            descriptor = os.memfd_create("mrjax-batch")
            os.ftruncate(descriptor, self._size)
            path, memory = f"/proc/{os.getpid()}/fd/{descriptor}", mmap.mmap(descriptor, self._size)
        else:
            path = str(len(self._pool))
            memory = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # Large pages halve the time of the first fill. Only Linux has them, and not every kernel.
            with contextlib.suppress(AttributeError, OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._pool[path] = memory
        return path

    def _arrays(self, data: np.ndarray) -> Batch:
        placed = zip(self._spec.items(), self._offsets, strict=True)
        return {name: np.ndarray(shape, dtype, data, offset) for (name, (shape, dtype)), offset in placed}

    def _lend(self, memory: mmap.mmap) -> Batch:
        # Every array of the batch, and every view of one, keeps `data` alive, and nothing else does.
        data = np.frombuffer(memory, np.uint8)
        weakref.finalize(data, memory.__setitem__, -1, 0).atexit = False
        return self._arrays(data)
