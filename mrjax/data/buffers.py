"""Memory for batches, lent out and filled again as soon as nobody holds the batch it was lent for.

Fresh memory is what a loader spends most of its time on: the system clears every page before its first use, which
costs several times the copy of the data itself. Here a page is touched once in a run, and the batches of worker
processes lie in memory that both sides see, so that they cross over without a copy.
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
# Shape and dtype of each array by its name.
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]
SHARED = hasattr(os, "memfd_create")
_LINE = 64  # JAX takes arrays that start at a multiple of this without a copy on a CPU.

_here: weakref.WeakValueDictionary[str, "Buffers"] = weakref.WeakValueDictionary()


class _Buffer(NamedTuple):
    """Memory of one batch, its last byte telling whether it is taken, and where other processes find it."""

    memory: mmap.mmap
    path: str


class Parcel(NamedTuple):
    """A batch made by a worker process: what arrives in the process that made the `Buffers` is the batch itself."""

    key: str
    path: str

    def __reduce__(self) -> tuple[Callable[[str, str], Batch | None], tuple[str, str]]:
        return _receive, (self.key, self.path)


def _receive(key: str, path: str) -> Batch | None:
    """The batch of a parcel; None if it comes too late: the worker has ended, or this end is closing."""
    buffers = _here.get(key)
    return buffers.receive(path) if buffers else None


class Buffers:
    """As many buffers as there are batches held at once, each used again and again.

    A copy sent to a worker process makes its own, in memory that the sender can map.
    """

    def __init__(self, spec: Spec):
        self._spec = spec
        self._key = uuid.uuid4().hex
        self._shared = False
        self._offsets, end = {}, 0
        for name, (shape, dtype) in spec.items():
            self._offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _LINE) * _LINE
        self._size = end + _LINE
        self._forget()
        _here[self._key] = self

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._own: list[_Buffer] = []
        self._received: dict[str, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_spec", "_key", "_offsets", "_size")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._shared = SHARED
        self._forget()

    def fill(self, write: Callable[[Batch], None]) -> Batch | Parcel:
        """A batch written by `write`, which gets arrays of undefined content; a worker process gets it as a parcel."""
        buffer = self._take()
        try:
            write(self._arrays(np.frombuffer(buffer.memory, np.uint8)))
        except BaseException:
            buffer.memory[-1] = 0
            raise
        return Parcel(self._key, buffer.path) if self._shared else self._lend(buffer.memory)

    def receive(self, path: str) -> Batch | None:
        """The batch that a worker process has put at `path`; None if it has ended meanwhile."""
        if path not in self._received:
            try:
                with open(path, "r+b") as file:
                    self._received[path] = mmap.mmap(file.fileno(), self._size)
            except OSError:
                return None
        return self._lend(self._received[path])

    def _take(self) -> _Buffer:
        with self._lock:
            buffer = next((one for one in self._own if not one.memory[-1]), None)
            if buffer is None:
                buffer = self._make()
                self._own.append(buffer)
            buffer.memory[-1] = 1
            return buffer

    def _make(self) -> _Buffer:
        if self._shared:
            number = os.memfd_create("mrjax-batch")
            os.ftruncate(number, self._size)
            return _Buffer(mmap.mmap(number, self._size), f"/proc/{os.getpid()}/fd/{number}")
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
