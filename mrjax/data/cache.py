"""A cache in host memory: examples are read from their files once, by whichever worker process or thread is first."""

import math
import os
import tempfile
import weakref
from typing import Any

from mrjax.data.buffers import SHARED, Batch, transfer
from mrjax.data.dataset import Dataset
from mrjax.errors import UserError
from mrjax.parallel.memory import available_memory


class HostCache(Dataset):
    """The examples of a dataset, each read once and then copied from memory, which all worker processes share.

    The memory has no name in any file system and is freed with the last process that uses it, however that ends. Only
    systems other than Linux need a temporary file instead. Raises `UserError` if it would not fit.
    """

    def __init__(self, dataset: Dataset, path: str = ""):
        self._dataset = dataset
        self.spec = dataset.spec
        self._example_size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.spec.values())
        self._path = path or self._allocate()
        self._descriptor = os.open(self._path, os.O_RDWR)
        weakref.finalize(self, os.close, self._descriptor)
        if not path:
            _caches.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return HostCache, (self._dataset, self._path)

    def _allocate(self) -> str:
        """Allocate the memory and return the path where any process can open it."""
        # One byte for each example, 1 once it has been read; then the examples.
        size = len(self) * (1 + self._example_size)
        available = max(available_memory() - sum(cache.unfilled() for cache in _caches), 0)
        if size > available:
            raise UserError(
                f"config.data.cache is 'host', which takes {size / 1e9:.2f} GB for {len(self)} slices, found "
                f"{available / 1e9:.2f} GB of memory available; expected 'none', or a smaller config.data.image_size"
            )
        if SHARED:
            descriptor = os.memfd_create("mrjax-cache")
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
        else:
            descriptor, path = tempfile.mkstemp(prefix="mrjax-cache-")
            weakref.finalize(self, os.unlink, path)
        weakref.finalize(self, os.close, descriptor)
        os.ftruncate(descriptor, size)
        return path

    def __len__(self) -> int:
        return len(self._dataset)

    def read_into(self, number: int, example: Batch) -> None:
        """Read an example, from memory if it was read before."""
        offset = len(self) + number * self._example_size
        cached = os.pread(self._descriptor, 1, number) == b"\1"
        if not cached:
            self._dataset.read_into(number, example)
        for name in self.spec:
            transfer(os.preadv if cached else os.pwritev, self._descriptor, example[name], offset)
            offset += example[name].nbytes
        if not cached:
            os.pwrite(self._descriptor, b"\1", number)

    def unfilled(self) -> int:
        """Return how many bytes of memory it has not taken yet."""
        status = os.fstat(self._descriptor)
        return max(status.st_size - 512 * status.st_blocks, 0)


_caches: weakref.WeakSet[HostCache] = weakref.WeakSet()
