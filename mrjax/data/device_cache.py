"""A cache on the accelerators: a whole dataset split over the devices, from which batches are drawn by number."""

import collections
import concurrent.futures
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mrjax.data.buffers import Batch
from mrjax.data.dataset import Dataset
from mrjax.data.faults import FaultyReader, count_faults
from mrjax.parallel import sharding

Arrays = dict[str, jax.Array]


class DeviceCache:
    """The examples of a dataset on the devices of a mesh.

    Each process reads those that its devices hold, once. They are split evenly over the `data` and `model` axes, the
    last one repeated to fill up, and with `substitute` others in the place of those that cannot be read. `half` stores
    k-space in float16: each slice is scaled by a power of two so that its largest sample is near the top of the range,
    and keeps 11 bits.
    """

    def __init__(self, dataset: Dataset, mesh: Mesh, half: bool = False, *, substitute: bool = False):
        reader = FaultyReader(substitute)
        shards = sharding.example_shards(mesh)
        rows = sharding.rows_of_process(mesh, -(-len(dataset) // shards) * shards)

        def read(row: int) -> tuple[Batch, bytes]:
            example = {name: np.empty(shape, dtype) for name, (shape, dtype) in dataset.spec.items()}
            fault = reader.read_into(dataset, min(row, len(dataset) - 1), example)
            return _encode(example, half), fault

        def store(i: int) -> bytes:
            example, fault = read(rows[i])
            for name, array in example.items():
                stored[name][i] = array
            return fault

        stored = {name: np.empty((len(rows), *array.shape), array.dtype) for name, array in read(0)[0].items()}
        with concurrent.futures.ThreadPoolExecutor(4) as pool, count_faults() as count:
            for fault in pool.map(store, range(len(rows))):
                count(fault)
        self._stored = jax.make_array_from_process_local_data(sharding.by_example(mesh), stored)
        self._draw = jax.jit(sharding.per_device(_draw_shard, mesh), out_shardings=sharding.by_example(mesh))

    def draw(self, numbers: jax.Array) -> Arrays:
        """Draw the examples of these numbers, (batch,) int32, as a batch split by example over the mesh."""
        return self._draw((self._stored, numbers))


def device_bytes(dataset: Dataset, mesh: Mesh, half: bool = False) -> int:
    """Return the bytes that a `DeviceCache` takes on each device."""
    example = _encode({name: np.zeros(shape, dtype) for name, (shape, dtype) in dataset.spec.items()}, half)
    return -(-len(dataset) // sharding.example_shards(mesh)) * sum(array.nbytes for array in example.values())


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


def _encode(example: Batch, half: bool) -> Batch:
    """Split complex arrays into float (2, ...), with a number `<name>_unit` to multiply them by."""
    encoded = dict(example)
    for name, array in example.items():
        if array.dtype.kind == "c":
            pair, unit = np.stack([array.real, array.imag]), np.float32(1)
            if half:
                unit = np.exp2(np.ceil(np.log2(np.maximum(np.abs(pair).max(), 1e-30))) - 15).astype(np.float32)
                pair = (pair / unit).astype(np.float16)
            encoded[name], encoded[f"{name}_unit"] = pair, np.asarray(unit)
    return encoded


def _decode(drawn: Arrays) -> Arrays:
    """Undo `_encode`."""
    examples = dict(drawn)
    for name in [name for name in drawn if f"{name}_unit" in drawn]:
        array = jax.lax.complex(*jnp.moveaxis(drawn[name].astype(jnp.float32), 1, 0))
        unit = examples.pop(f"{name}_unit")
        examples[name] = array * unit.reshape(-1, *[1] * (array.ndim - 1))
    return examples


def _draw_shard(shard: tuple[Arrays, jax.Array]) -> Arrays:
    """Draw this device's rows of the batch from the shards of all devices.

    Each device sends every other one of the examples that it holds of the other's at a time, so that no more examples
    are on their way than there are devices.
    """
    (stored, numbers), axes = shard, sharding.EXAMPLES
    if jax.lax.axis_size(axes) == 1:
        return _decode({name: array[numbers] for name, array in stored.items()})
    first = jax.lax.axis_index(axes) * len(next(iter(stored.values())))

    def draw_row(wanted: jax.Array) -> Arrays:
        """Draw one example for each device, `wanted` (devices,)."""
        held = {
            name: array.at[wanted - first].get(mode="fill", fill_value=0, wrap_negative_indices=False)
            for name, array in stored.items()
        }
        return jax.lax.psum_scatter(held, axes)

    return _decode(jax.lax.map(draw_row, jax.lax.all_gather(numbers, axes, axis=1)))
