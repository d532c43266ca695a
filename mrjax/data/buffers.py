"""Reusable memory for batches: filled again as soon as nobody holds the batch.

A loader spends most of its time on fresh memory: the system clears every page before its first use, which costs several
times the copy of the data itself. Here a page is touched once in a run, and the batches of worker processes are in
memory that both processes map, so that they arrive without a copy.
"""

import contextlib
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


class _Buffer(NamedTuple):
    """Memory of one batch, whose last byte is 1 while it is in use, and where other processes open it."""

    memory: mmap.mmap
    path: str


class SharedBatch(NamedTuple):
    """A batch made by a worker process; unpickled by the process that made the `Buffers`, it is the batch itself."""

    key: str
    path: str

    def __reduce__(self) -> tuple[Callable[[str, str], Batch | None], tuple[str, str]]:
        return _receive, (self.key, self.path)


def _receive(key: str, path: str) -> Batch | None:
    """Return the batch; None if it comes too late: the worker has ended, or the loader is closing."""
    buffers = _buffers_by_key.get(key)
    return buffers.receive(path) if buffers else None


class Buffers:
    """A pool of buffers for batches of one spec, as many as there are batches held at once.

    A copy pickled to a worker process has its own buffers, in memory that the sender can map.
    """

    def __init__(self, spec: Spec):
        self._spec = spec
        self._key = uuid.uuid4().hex
        self._shared = False
        self._offsets, end = {}, 0
        for name, (shape, dtype) in spec.items():
            self._offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._size = end + _ALIGNMENT
        self._reset()
        _buffers_by_key[self._key] = self

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._pool: list[_Buffer] = []
        self._received: dict[str, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_spec", "_key", "_offsets", "_size")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._shared = SHARED
        self._reset()

    def fill(self, write: Callable[[Batch], None]) -> Batch | SharedBatch:
        """Return a batch written by `write`, which gets uninitialised arrays; in a worker process a `SharedBatch`."""
        buffer = self._acquire()
        try:
            write(self._arrays(np.frombuffer(buffer.memory, np.uint8)))
        except BaseException:
            buffer.memory[-1] = 0
            raise
        return SharedBatch(self._key, buffer.path) if self._shared else self._lend(buffer.memory)

    def receive(self, path: str) -> Batch | None:
        """Return the batch that a worker process wrote into the memory at `path`; None if the worker has ended."""
        if path not in self._received:
            try:
                with open(path, "r+b") as file:
                    self._received[path] = mmap.mmap(file.fileno(), self._size)
            except OSError:
                return None
        return self._lend(self._received[path])

    def _acquire(self) -> _Buffer:
        with self._lock:
            buffer = next((one for one in self._pool if not one.memory[-1]), None)
            if buffer is None:
                buffer = self._allocate()
                self._pool.append(buffer)
            buffer.memory[-1] = 1
            return buffer

    def _allocate(self) -> _Buffer:
        if self._shared:
            descriptor = os.memfd_create("mrjax-batch")
            os.ftruncate(descriptor, self._size)
            return _Buffer(mmap.mmap(descriptor, self._size), f"/proc/{os.getpid()}/fd/{descriptor}")
        memory = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # only Linux has large pages, and not every kernel
            memory.madvise(mmap.MADV_HUGEPAGE)
        return _Buffer(memory, "")

    def _arrays(self, data: np.ndarray) -> Batch:
        return {
            name: np.ndarray(shape, dtype, data, self._offsets[name]) for name, (shape, dtype) in self._spec.items()
        }

    def _lend(self, memory: mmap.mmap) -> Batch:
        # Every array of the batch, and every view of one, keeps `data` alive, and nothing else does.
        data = np.frombuffer(memory, np.uint8)
        weakref.finalize(data, memory.__setitem__, -1, 0).atexit = False
        return self._arrays(data)


def read_at(descriptor: int, out: np.ndarray, offset: int) -> None:
    """Fill a C-contiguous array with the bytes of an open file from `offset` on; too few of them are an OSError."""
    left = out.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(descriptor, [left], offset)
        if not count:
            raise OSError("the file ends before the slice does")
        left, offset = left[count:], offset + count
