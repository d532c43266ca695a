"""A cache in host memory: examples are read from their files once, by whichever worker process or thread is first."""

import math
import os
import tempfile
import weakref
from typing import Any

import numpy as np

from mrjax.data.buffers import SHARED, Batch, read_at
from mrjax.data.dataset import Dataset
from mrjax.errors import UserError
from mrjax.parallel.memory import available_memory


class HostCache(Dataset):
    """The examples of a dataset, each read once and then copied from memory, which all worker processes share.

    The memory has no name in any file system: it is freed with the last process that uses it, however that ends. Only
    systems other than Linux need a temporary file instead.

    Raises:
      UserError: it would not fit into the available memory.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self.spec = dataset.spec
        self._example_size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.spec.values())
        # One byte for each example, 1 once it has been read; then the examples.
        size = len(dataset) * (1 + self._example_size)
        available = max(available_memory() - sum(cache.unfilled() for cache in _caches), 0)
        if size > available:
            raise UserError(
                f"config.data.cache is 'host', which takes {size / 1e9:.2f} GB for {len(dataset)} slices, found "
                f"{available / 1e9:.2f} GB of memory available; expected 'none', or a smaller config.data.image_size"
            )
        if SHARED:
            self._own(os.memfd_create("mrjax-cache"))
            self._path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        else:
            descriptor, self._path = tempfile.mkstemp(prefix="mrjax-cache-")
            self._own(descriptor)
            weakref.finalize(self, os.unlink, self._path)
        os.ftruncate(self._descriptor, size)
        _caches.add(self)

    def _own(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_dataset", "spec", "_example_size", "_path")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._own(os.open(self._path, os.O_RDWR))

    def __len__(self) -> int:
        return len(self._dataset)

    def read_into(self, number: int, example: Batch) -> None:
        """Read an example, from memory if it was read before."""
        offset = len(self) + number * self._example_size
        cached = os.pread(self._descriptor, 1, number) == b"\1"
        if not cached:
            self._dataset.read_into(number, example)
        for name in self.spec:
            (read_at if cached else _write_at)(self._descriptor, example[name], offset)
            offset += example[name].nbytes
        if not cached:
            os.pwrite(self._descriptor, b"\1", number)

    def unfilled(self) -> int:
        """Return how many bytes of memory it has not taken yet."""
        status = os.fstat(self._descriptor)
        return max(status.st_size - 512 * status.st_blocks, 0)


_caches: weakref.WeakSet[HostCache] = weakref.WeakSet()


def _write_at(descriptor: int, data: np.ndarray, offset: int) -> None:
    left = data.reshape(-1).view(np.uint8).data
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
