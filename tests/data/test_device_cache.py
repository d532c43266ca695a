"""The cache on the devices: batches drawn from it are those that the host would have sent, on any mesh."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, to_kspace, write_scan
from test_loader import describe

from mrjax.config import defaults
from mrjax.data import buckets, loader
from mrjax.data.buffers import Batch
from mrjax.data.dataset import Dataset, ExampleIndices
from mrjax.data.device_cache import DeviceCache, cached_batches, device_bytes
from mrjax.parallel import sharding


class Examples(Dataset):
    """Examples in memory."""

    def __init__(self, arrays: Batch):
        self._arrays = arrays
        self.spec = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(self._arrays["slice"])

    def read_into(self, number: int, example: Batch) -> None:
        for name, array in self._arrays.items():
            example[name][...] = array[number]


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_cached_batches_of_several_sizes_are_those_sent_by_the_host(tmp_path: Path, shape) -> None:
    for number, (coils, *size) in enumerate(((2, 12, 10), (1, 16, 16), (2, 16, 16))):
        write_scan(tmp_path / f"{number}_T101.t5", 5 + number, coils, tuple(size), seed=number)
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])
    datasets = buckets.bucket_by_size(defaults().data, describe(tmp_path))
    caches = [DeviceCache(dataset, mesh) for dataset in datasets]
    indices = [ExampleIndices(len(dataset), bucket) for bucket, dataset in enumerate(datasets)]
    options = loader.LoaderOptions(8)
    with (
        loader.training_batches(datasets, options, seed=0, start=0) as plain,
        loader.training_batches(indices, options, seed=0, start=0) as small,
    ):
        sent = itertools.islice(sharding.to_devices(plain, mesh), 5)
        drawn = itertools.islice(cached_batches(small, caches, mesh), 5)
        shapes = set()
        for one, other in zip(sent, drawn, strict=True):
            assert sorted(one) == sorted(other)
            for name, x in one.items():
                assert np.array_equal(x, other[name]), name
                assert (x.dtype, x.sharding) == (other[name].dtype, other[name].sharding), name
            shapes.add(one["kspace"].shape)
    assert len(shapes) == 2


def test_a_cache_holds_examples_that_do_not_divide_and_half_precision_keeps_11_bits() -> None:
    mesh = sharding.make_mesh()
    kspace = to_kspace(coil_images(5, 2, 32, 32)) * np.float32(1e-7)
    kspace[3] = 0
    dataset = Examples({"kspace": kspace, "slice": np.arange(5, dtype=np.int32), "maximum": np.ones(5, np.float32)})
    numbers = jax.device_put(np.array([4, 0, 3, 1, 2, 4, 0, 0], np.int32), sharding.by_example(mesh))
    for half, error in ((False, 0), (True, 2.0**-11)):
        cache = DeviceCache(dataset, mesh, half)
        drawn = cache.draw(numbers)
        assert sorted(drawn) == ["kspace", "maximum", "slice"]
        assert drawn["kspace"].dtype == jnp.complex64
        assert np.array_equal(drawn["slice"], np.asarray(numbers))
        expected = kspace[np.asarray(numbers)]
        largest = np.abs(expected).max((1, 2, 3), keepdims=True)
        assert np.all(
            np.abs(drawn["kspace"] - expected) <= np.sqrt(2) * error * np.maximum(np.abs(expected), 1e-6 * largest)
        )
        assert device_bytes(dataset, mesh, half) == 2 * 32 * 32 * (4 if half else 8) + 3 * 4
        assert sum(array.nbytes for array in cache._stored.values()) == mesh.size * device_bytes(dataset, mesh, half)
