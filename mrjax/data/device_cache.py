"""A cache on the accelerators: a whole dataset split over the devices, from which batches are drawn by number."""

import collections
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mrjax.data.buffers import Batch
from mrjax.data.dataset import Dataset, read_range
from mrjax.parallel import sharding

Arrays = dict[str, jax.Array]


class DeviceCache:
    """The examples of a dataset on the devices of a mesh, `device_bytes` on each."""

    def __init__(self, stored: Arrays, mesh: Mesh):
        self._stored = stored
        split = PartitionSpec(sharding.EXAMPLES)
        draw = jax.shard_map(_draw_shard, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        self._draw = jax.jit(draw, out_shardings=sharding.by_example(mesh))
        self.device_bytes = sum(x.nbytes for x in stored.values()) // sharding.example_shards(mesh)

    @classmethod
    def load(cls, dataset: Dataset, mesh: Mesh, half: bool = False) -> "DeviceCache":
        """Read every example once, on each process those that its devices hold.

        They are split evenly over the `data` and `model` axes, the last one repeated to fill up. `half` stores k-space
        in float16: each slice is scaled by a power of two so that its largest sample is near the top of the range, and
        keeps 11 bits.
        """
        shards = sharding.example_shards(mesh)
        per_shard = -(-len(dataset) // shards)

        @functools.cache
        def read_shard(first: int) -> Batch:
            return _encode(read_range(dataset, first, first + per_shard), half)

        def store(name: str, example: np.ndarray) -> jax.Array:
            def read(index: Any) -> np.ndarray:
                return read_shard(index[0].start or 0)[name]

            shape = (per_shard * shards, *example.shape)
            return jax.make_array_from_callback(shape, sharding.by_example(mesh), read)

        first = _encode(read_range(dataset, 0, 1), half)
        return cls({name: store(name, array[0]) for name, array in first.items()}, mesh)

    def draw(self, numbers: jax.Array) -> Arrays:
        """Draw the examples of these numbers, (batch,) int32, as a batch split by example over the mesh."""
        return self._draw(self._stored, numbers)


def cached_batches(
    host_batches: Iterator[Batch], caches: Sequence[DeviceCache], mesh: Mesh
) -> Generator[Arrays, None, None]:
    """Draw batches from the caches of the buckets.

    `host_batches` hold this process's rows of `ExampleIndices`, and arrays such as `index`, which are transferred.
    """
    drawn_from: collections.deque[DeviceCache] = collections.deque()

    def without_bucket() -> Iterator[Batch]:
        for batch in host_batches:
            drawn_from.append(caches[int(batch.pop("bucket")[0])])
            yield batch

    for sent in sharding.to_devices(without_bucket(), mesh):
        yield drawn_from.popleft().draw(sent.pop("example")) | sent


def _encode(examples: Batch, half: bool) -> Batch:
    """Split complex arrays into float (examples, 2, ...), with a `<name>_unit` (examples,) to multiply them by."""
    encoded: Batch = {}
    for name, array in examples.items():
        if array.dtype.kind != "c":
            encoded[name] = array
            continue
        pairs = np.stack([array.real, array.imag], axis=1)
        unit = np.ones(len(array), np.float32)
        if half:
            largest = np.abs(pairs).max(axis=tuple(range(1, pairs.ndim)))
            unit = np.exp2(np.ceil(np.log2(np.maximum(largest, 1e-30))) - 15).astype(np.float32)
            pairs = (pairs / unit.reshape(-1, *[1] * (pairs.ndim - 1))).astype(np.float16)
        encoded[name], encoded[f"{name}_unit"] = pairs, unit
    return encoded


def _decode(drawn: Arrays) -> Arrays:
    """Undo `_encode`."""
    examples = {}
    for name, array in drawn.items():
        unit = drawn.get(f"{name}_unit")
        if unit is not None:
            array = jax.lax.complex(*jnp.moveaxis(array.astype(jnp.float32), 1, 0))
            examples[name] = array * unit.reshape(-1, *[1] * (array.ndim - 1))
        elif not name.endswith("_unit"):
            examples[name] = array
    return examples


def _draw_shard(stored: Arrays, numbers: jax.Array) -> Arrays:
    """Draw this device's rows of the batch from the shards of all devices.

    Each device sends every other one of the examples that it holds of the other's at a time, so that no more examples
    are on their way than there are devices.
    """
    axes = sharding.EXAMPLES
    if jax.lax.axis_size(axes) == 1:
        return _decode({name: array[numbers] for name, array in stored.items()})
    first = jax.lax.axis_index(axes) * len(next(iter(stored.values())))

    def draw_row(wanted: jax.Array) -> Arrays:
        """Draw one example for each device, `wanted` (devices,)."""

        def send(array: jax.Array) -> jax.Array:
            held = array.at[wanted - first].get(mode="fill", fill_value=0, wrap_negative_indices=False)
            return jax.lax.psum_scatter(held, axes)

        return {name: send(array) for name, array in stored.items()}

    return _decode(jax.lax.map(draw_row, jax.lax.all_gather(numbers, axes, axis=1)))
