"""A cache on the accelerators: a whole dataset split over the devices, from which batches are drawn by number."""

import collections
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mrjax.data.buffers import Batch
from mrjax.data.dataset import Dataset, read_range
from mrjax.parallel import sharding

Arrays = dict[str, jax.Array]


class DeviceCache:
    """The examples of a dataset on the devices of a mesh.

    Attributes:
      device_bytes: memory that it takes on each device.
    """

    def __init__(self, stored: Arrays, mesh: Mesh):
        self._stored = stored
        split = PartitionSpec(sharding.EXAMPLES)
        draw = jax.shard_map(_draw_shard, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        self._draw = jax.jit(draw, out_shardings=sharding.by_example(mesh))
        self.device_bytes = sum(x.nbytes for x in stored.values()) // sharding.example_shards(mesh)

    @classmethod
    def load(cls, dataset: Dataset, mesh: Mesh, half: bool = False) -> "DeviceCache":
        """Read every example once, on each process those that its devices hold.

        Args:
          dataset: the examples, split evenly over the `data` and `model` axes, the last one repeated to fill up.
          mesh: of the devices.
          half: whether to store k-space in float16, half the memory. Each slice is scaled by a power of two so that its
            largest sample is near the top of the range, and keeps 11 bits.
        """
        count, shards = len(dataset), sharding.example_shards(mesh)
        per_shard = -(-count // shards)
        split = sharding.by_example(mesh)
        encoded: dict[int, Batch] = {}
        pieces: dict[str, list[jax.Array]] = {}
        for device, index in split.addressable_devices_indices_map((per_shard * shards,)).items():
            first = index[0].start or 0 if index else 0
            if first not in encoded:
                encoded[first] = _encode(_read_shard(dataset, first, per_shard), half)
            for name, array in encoded[first].items():
                pieces.setdefault(name, []).append(jax.device_put(array, device))
        stored: Arrays = {
            name: jax.make_array_from_single_device_arrays((per_shard * shards, *arrays[0].shape[1:]), split, arrays)
            for name, arrays in pieces.items()
        }
        return cls(stored, mesh)

    def draw(self, numbers: jax.Array) -> Arrays:
        """Draw the examples of these numbers, (batch,) int32, as a batch split by example over the mesh."""
        return self._draw(self._stored, numbers)


def cached_batches(
    host_batches: Iterator[Batch], caches: Sequence[DeviceCache], mesh: Mesh, ahead: int = 2
) -> Generator[Arrays, None, None]:
    """Draw batches from caches, `ahead` of their use.

    Args:
      host_batches: this process's rows of `ExampleIndices`, with other arrays such as `index`, which are transferred.
      caches: of the datasets, by the number of the bucket.
      mesh: of the devices.
      ahead: batches drawn ahead.
    """
    queue: collections.deque[Arrays] = collections.deque()
    for batch in host_batches:
        cache = caches[int(batch["bucket"][0])]
        rows = {name: array for name, array in batch.items() if name != "bucket"}
        sent = jax.make_array_from_process_local_data(sharding.by_example(mesh), rows)
        queue.append(cache.draw(sent.pop("example")) | sent)
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


def _read_shard(dataset: Dataset, first: int, count: int) -> Batch:
    """Read `count` examples from `first` on, the dataset's last one repeated beyond its end."""
    last = len(dataset)
    examples = read_range(dataset, min(first, last - 1), min(first + count, last))
    missing = count - len(next(iter(examples.values())))
    return {name: np.concatenate([x, np.repeat(x[-1:], missing, 0)]) for name, x in examples.items()}


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
        local = wanted - first

        def send(array: jax.Array) -> jax.Array:
            held = ((local >= 0) & (local < len(array))).reshape(-1, *[1] * (array.ndim - 1))
            found = jnp.where(held, array[jnp.clip(local, 0, len(array) - 1)], 0)
            return jax.lax.psum_scatter(found, axes)

        return {name: send(array) for name, array in stored.items()}

    return _decode(jax.lax.map(draw_row, jax.lax.all_gather(numbers, axes, axis=1)))
