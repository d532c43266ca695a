"""Examples kept in memory: decoded once, then read by every worker process and thread."""

import concurrent.futures
import contextlib
import math
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from mrjax.data.buffers import SHARED, Batch
from mrjax.data.files import read_at
from mrjax.data.loader import Source
from mrjax.errors import UserError


class HostCache(Source):
    """The examples of another source, each read from it once and from memory ever after, whichever process asks.

    The memory has no name in any file system: it is gone with the process that made it, however that ends. A copy sent
    to a worker process uses the same memory. Only systems other than Linux need a temporary file instead.

    Raises:
      UserError: it would not fit into the memory that is available.
    """

    def __init__(self, source: Source):
        self._source = source
        self.spec = source.spec
        self._record = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.spec.values())
        # A byte for each example tells whether it is there; the examples follow.
        size = len(source) * (1 + self._record)
        promised = sum(cache.missing() for cache in _made)
        available = max(available_memory() - promised, 0)
        if size > available:
            raise UserError(
                f"config.data.cache is 'host', which takes {size / 1e9:.2f} GB for {len(source)} slices, found "
                f"{available / 1e9:.2f} GB of memory available; expected 'none', or a smaller config.data.image_size"
            )
        if SHARED:
            self._keep(os.memfd_create("mrjax-cache"))
            self._path = f"/proc/{os.getpid()}/fd/{self._number}"
        else:
            number, self._path = tempfile.mkstemp(prefix="mrjax-cache-")
            self._keep(number)
            weakref.finalize(self, os.unlink, self._path)
        os.ftruncate(self._number, size)
        _made.add(self)

    def _keep(self, number: int) -> None:
        self._number = number
        weakref.finalize(self, os.close, number)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_source", "spec", "_record", "_path")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._keep(os.open(self._path, os.O_RDWR))

    def __len__(self) -> int:
        return len(self._source)

    def fill(self, place: int, example: Batch) -> None:
        """Writes the example at `place`, from memory if it was asked for before."""
        offset = len(self) + place * self._record
        there = os.pread(self._number, 1, place) == b"\1"
        if not there:
            self._source.fill(place, example)
        for name in self.spec:
            if there:
                read_at(self._number, example[name], offset)
            else:
                _write_at(self._number, example[name], offset)
            offset += example[name].nbytes
        if not there:
            os.pwrite(self._number, b"\1", place)

    def missing(self) -> int:
        """Bytes of memory that it will still take."""
        status = os.fstat(self._number)
        return max(status.st_size - 512 * status.st_blocks, 0)


_made: weakref.WeakSet[HostCache] = weakref.WeakSet()


def _write_at(number: int, data: np.ndarray, offset: int) -> None:
    left = data.reshape(-1).view(np.uint8).data
    while left:
        count = os.pwrite(number, left, offset)
        left, offset = left[count:], offset + count


def available_memory() -> int:
    """Bytes that this process can still take, by the machine and by the control groups it is in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    mine = next((line[3:] for line in groups if line.startswith("0::")), "/")
    for group in (folder := Path("/sys/fs/cgroup") / mine.lstrip("/"), *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # a group without a limit has no such file, or says 'max'
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(limit - used + int(kept["inactive_file"]) + int(kept["active_file"]))
    return min(found)


def read_all(source: Source, first: int, last: int, threads: int = 4) -> Batch:
    """The examples from place `first` to before `last`, read in threads, stacked along a new leading axis."""
    batch = {name: np.empty((last - first, *shape), dtype) for name, (shape, dtype) in source.spec.items()}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        tasks = [
            pool.submit(source.fill, place, {name: batch[name][place - first, ...] for name in source.spec})
            for place in range(first, last)
        ]
        for task in tasks:
            task.result()
    return batch
