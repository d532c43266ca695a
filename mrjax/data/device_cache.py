"""A whole split on the accelerators: batches are drawn inside the step, the host sends nothing but their numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mrjax.parallel import sharding

Cache = dict[str, jax.Array]


def load(read: Callable[[int, int], dict[str, np.ndarray]], count: int, mesh: Mesh, half: bool) -> Cache:
    """Reads every example once, each on the process whose devices hold it.

    Args:
      read: gives the arrays of the examples [first, last), with a leading axis.
      count: number of examples.
      mesh: over whose `data` and `model` axes the examples are split evenly, the last one repeated to fill up.
      half: whether k-space is kept in float16, each slice scaled by a power of two so that its largest sample is near
        the top of the range: 11 bits, for half the memory.

    Returns:
      The arrays of an example with a leading axis for the examples; complex ones as float (examples, 2, ...) and a
      `<name>_unit` (examples,) that scales them back.
    """
    shards = sharding.example_shards(mesh)
    each = -(-count // shards)
    split = sharding.by_example(mesh)
    parts: dict[int, dict[str, np.ndarray]] = {}
    pieces: dict[str, list[jax.Array]] = {}
    places = split.addressable_devices_indices_map((each * shards,))
    for device, place in places.items():
        first = place[0].start or 0 if place else 0
        if first not in parts:
            some = read(min(first, count - 1), min(first + each, count))
            fill = each - len(some["slice"])
            filled = {n: np.concatenate([x, np.repeat(x[-1:], fill, 0)]) if fill else x for n, x in some.items()}
            parts[first] = _encode(filled, half)
        for name, array in parts[first].items():
            pieces.setdefault(name, []).append(jax.device_put(array, device))
    return {
        name: jax.make_array_from_single_device_arrays((each * shards, *arrays[0].shape[1:]), split, arrays)
        for name, arrays in pieces.items()
    }


def _encode(examples: dict[str, np.ndarray], half: bool) -> dict[str, np.ndarray]:
    encoded: dict[str, np.ndarray] = {}
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


def draw(stored: Cache, places: jax.Array) -> dict[str, jax.Array]:
    """Under `shard_map` over `sharding.EXAMPLES`: the examples at this device's `places` (batch,) int32.

    Each device sends every other the examples that it holds of the other's, one for each device at a time, so that no
    more than as many examples as there are devices are under way.
    """
    axes = sharding.EXAMPLES
    if jax.lax.axis_size(axes) == 1:
        return _decode({name: array[places] for name, array in stored.items()})
    first = jax.lax.axis_index(axes) * len(next(iter(stored.values())))

    def one_for_each(wanted: jax.Array) -> Cache:
        at = wanted - first

        def send(array: jax.Array) -> jax.Array:
            mine = ((at >= 0) & (at < len(array))).reshape(-1, *[1] * (array.ndim - 1))
            found = jnp.where(mine, array[jnp.clip(at, 0, len(array) - 1)], 0)
            return jax.lax.psum_scatter(found, axes)

        return {name: send(array) for name, array in stored.items()}

    return _decode(jax.lax.map(one_for_each, jax.lax.all_gather(places, axes, axis=1)))


def _decode(drawn: Cache) -> Cache:
    examples = {}
    for name, array in drawn.items():
        unit = drawn.get(f"{name}_unit")
        if unit is not None:
            array = jax.lax.complex(*jnp.moveaxis(array.astype(jnp.float32), 1, 0))
            examples[name] = array * unit.reshape(-1, *[1] * (array.ndim - 1))
        elif not name.endswith("_unit"):
            examples[name] = array
    return examples
