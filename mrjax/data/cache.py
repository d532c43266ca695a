"""A cache in host memory: examples are read from their files once, by whichever worker process or thread is first."""

import os
import tempfile
import weakref
from typing import Any

import numpy as np

from mrjax.data.buffers import SHARED, Batch
from mrjax.data.dataset import Dataset
from mrjax.errors import UserError
from mrjax.parallel.memory import available_memory
from mrjax.parallel.processes import count_on_this_machine


class HostCache(Dataset):
    """The examples of a dataset, each read once and then copied from memory, which all worker processes share.

    The memory has no name in any file system and is freed with the last process that uses it, however that ends. Only
    systems other than Linux need a temporary file instead. Raises `UserError` if it would not fit.
    """

    def __init__(self, dataset: Dataset, path: str = ""):
        self._dataset = dataset
        self.spec = dataset.spec
        fields = [(name, dtype, shape) for name, (shape, dtype) in self.spec.items()]
        example = np.dtype([*fields, ("is cached", np.bool_)], align=True)
        self._path = path or self._allocate(len(dataset) * example.itemsize)
        self._memory = np.asarray(np.memmap(self._path, example, "r+", shape=len(dataset)))
        if not path:
            _caches.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return HostCache, (self._dataset, self._path)

    def _allocate(self, size: int) -> str:
        """Allocate memory of zeros and return the path where any process can open it."""
        # Memory that the other caches have not filled yet is available no more.
        files = [os.stat(cache._path) for cache in _caches]
        available = max(available_memory() - sum(max(file.st_size - 512 * file.st_blocks, 0) for file in files), 0)
        if size > available:
            processes = count_on_this_machine()
            share = f" for each of {processes} processes of this machine, which all hold it" if processes > 1 else ""
            raise UserError(
                f"config.data.cache is 'host', which takes {size / 1e9:.2f} GB for {len(self)} slices, found "
                f"{available / 1e9:.2f} GB of memory available{share}; expected 'none', or a smaller "
                "config.data.image_size"
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
        if self._memory["is cached"][number]:
            for name in self.spec:
                example[name][...] = self._memory[name][number]
        else:
            self._dataset.read_into(number, example)
            for name in self.spec:
                self._memory[name][number] = example[name]
            self._memory["is cached"][number] = True


_caches: weakref.WeakSet[HostCache] = weakref.WeakSet()
