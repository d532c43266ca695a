"""The mesh of devices, and how arrays lie on it."""

import collections
from collections.abc import Generator, Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The leading axis, the examples of a batch, split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def on_host(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """All of an array that is spread over the mesh."""
    return np.asarray(jax.device_put(x, replicated(mesh)))


def to_devices(
    batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Generator[dict[str, jax.Array], None, None]:
    """Global batches of every process's part; transfers are asynchronous and run `ahead` batches before their use."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        queue.append(jax.make_array_from_process_local_data(by_example(mesh), batch))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
