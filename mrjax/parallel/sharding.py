"""The mesh of devices, and how arrays lie on it.

Three axes, in any combination that multiplies to the number of devices:
  data     examples are split; parameters are copied
  model    examples are split, and parameters and optimizer state too: each device keeps a part, and all of a layer is
           gathered when it is needed (FSDP; Rajbhandari et al., "ZeRO", arXiv:1910.02054)
  spatial  the rows of each image are split; XLA exchanges the borders that a convolution needs
"""

import collections
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

AXES = ("data", "model", "spatial")
EXAMPLES = ("data", "model")


def make_mesh(shape: tuple[int, int, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the devices (all of all processes by default), all of them along `data` by default."""
    devices = devices if devices is not None else jax.devices()
    return jax.make_mesh(shape or (len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The leading axis, the examples of a batch, split over `data` and `model`."""
    return NamedSharding(mesh, PartitionSpec(EXAMPLES))


def by_row(mesh: Mesh) -> NamedSharding:
    """Images (batch, height, width): examples split as by `by_example`, rows over `spatial`."""
    return NamedSharding(mesh, PartitionSpec(EXAMPLES, "spatial"))


def example_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["model"]


def by_parameter(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A parameter or its moments: split along its longest axis that `model` divides; whole on every device if none."""
    ways = mesh.shape["model"]
    axes = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not axes:
        return replicated(mesh)
    axis = max(axes, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))


def constrain_state(state: Any, mesh: Mesh) -> Any:
    """Inside a jitted function: every leaf laid out by `by_parameter`."""
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, by_parameter(mesh, leaf.shape)), state)


def each_alone(function: Callable[..., Any], mesh: Mesh, whole: int = 0) -> Callable[..., Any]:
    """`function` of batches, each device computing its own examples: nothing is sent, whatever XLA makes of an FFT.

    The first `whole` of its arguments are the same on every device.
    """
    split = PartitionSpec(EXAMPLES)

    def run(*args: Any) -> Any:
        places = tuple(PartitionSpec() if place < whole else split for place in range(len(args)))
        return jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=split, check_vma=False)(*args)

    return run


def as_it_lies(state: Any, mesh: Mesh) -> Any:
    """Inside a jitted function: every leaf, laid out by `by_parameter`, in row-major order in each device's memory."""
    places = jax.tree.map(lambda leaf: by_parameter(mesh, leaf.shape).spec, state)

    def of_device(state: Any) -> Any:
        return jax.tree.map(lambda leaf: with_layout_constraint(leaf, Layout(tuple(range(leaf.ndim)))), state)

    # Each device its own part: XLA would gather the whole for it.
    return jax.shard_map(of_device, mesh=mesh, in_specs=(places,), out_specs=places, check_vma=False)(state)


def mean_gradient(
    function: Callable[..., tuple[jax.Array, Any]], mesh: Mesh, dtype: DTypeLike
) -> Callable[..., tuple[jax.Array, Any]]:
    """The mean over devices of `function(params, parts)`, each computing that of its own examples.

    Each runs the program of one device: what it keeps and moves does not grow with their number, and what it sends are
    the gradients, once, in the precision of the parameters.

    Args:
      function: gives a scalar and gradients, from whole parameters and parts of a batch (parts, batch, ...).
      mesh: whose `spatial` axis is 1: images must not be split.
      dtype: in which the function uses kernels of convolutions (of four axes), and in which these are gathered.

    Returns:
      A function of the same arguments, whose gradients are laid out by `by_parameter`.
    """

    def whole(leaf: jax.Array, place: PartitionSpec) -> jax.Array:
        if "model" not in place:
            return leaf
        sent = leaf.astype(dtype) if leaf.ndim == 4 else leaf
        return jax.lax.all_gather(sent, "model", axis=place.index("model"), tiled=True).astype(leaf.dtype)

    def mean(gradient: jax.Array, place: PartitionSpec) -> jax.Array:
        if "model" not in place:
            return jax.lax.pmean(gradient, EXAMPLES)
        mine = jax.lax.psum_scatter(gradient, "model", scatter_dimension=place.index("model"), tiled=True)
        return jax.lax.psum(mine, "data") / example_shards(mesh)

    def run(params: Any, parts: Any) -> tuple[jax.Array, Any]:
        places = jax.tree.map(lambda leaf: by_parameter(mesh, leaf.shape).spec, params)

        def of_device(params: Any, parts: Any) -> tuple[jax.Array, Any]:
            value, gradients = function(jax.tree.map(whole, params, places), parts)
            if mesh.size == 1:
                return value, gradients
            return jax.lax.pmean(value, EXAMPLES), jax.tree.map(mean, gradients, places)

        inputs = (places, PartitionSpec(None, EXAMPLES))
        outputs = (PartitionSpec(), places)
        return jax.shard_map(of_device, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)(params, parts)

    return run


def micro_batches(batch: Any, count: int, mesh: Mesh) -> Any:
    """Inside a jitted function: (batch, ...) to (count, batch // count, ...); every example stays on its device."""
    shards = example_shards(mesh)
    split = NamedSharding(mesh, PartitionSpec(None, EXAMPLES))

    def divide(x: jax.Array) -> jax.Array:
        parts = x.reshape(shards, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts.reshape(count, -1, *x.shape[1:]), split)

    return jax.tree.map(divide, batch)


def rows_of_process(mesh: Mesh, batch_size: int) -> list[int]:
    """The places in a global batch whose examples the devices of this process hold."""
    places = by_example(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for place in places.values() if place for row in range(batch_size)[place[0]]})


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
