"""The mesh of devices, and how arrays are laid out on it.

Three axes, in any combination that multiplies to the number of devices:
  data     examples are split; parameters are replicated
  model    examples are split, and parameters and optimizer state too: each device keeps a shard, and a layer is
           gathered when it is needed (FSDP; Rajbhandari et al., "ZeRO", arXiv:1910.02054)
  spatial  the rows of each image are split; XLA exchanges the borders that a convolution needs
"""

import collections
import functools
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
    """Make a mesh of the devices (all of all processes by default), all of them along `data` by default."""
    devices = devices if devices is not None else jax.devices()
    return jax.make_mesh(shape or (len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: the leading axis split over `data` and `model`."""
    return NamedSharding(mesh, PartitionSpec(EXAMPLES))


def by_row(mesh: Mesh) -> NamedSharding:
    """Return the sharding of images (batch, height, width): as `by_example`, and rows split over `spatial`."""
    return NamedSharding(mesh, PartitionSpec(EXAMPLES, "spatial"))


def example_shards(mesh: Mesh) -> int:
    """Count the shards of a batch."""
    return mesh.shape["data"] * mesh.shape["model"]


def by_parameter(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a parameter: along its longest axis that `model` divides, replicated if there is none."""
    ways = mesh.shape["model"]
    axes = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not axes:
        return replicated(mesh)
    axis = max(axes, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))


def constrain_state(state: Any, mesh: Mesh) -> Any:
    """Lay out every leaf by `by_parameter`, inside a jitted function."""
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, by_parameter(mesh, leaf.shape)), state)


def with_parameter_layout(gradients: Any, mesh: Mesh) -> Any:
    """Store every leaf, sharded by `by_parameter`, in row-major order, as the parameters are.

    Otherwise XLA would transpose the parameters and both moments instead (12 MB an image on an H100, benchmarks.fit).
    """
    specs = jax.tree.map(lambda leaf: by_parameter(mesh, leaf.shape).spec, gradients)
    row_major = jax.tree.map(lambda leaf: Layout(tuple(range(leaf.ndim))), gradients)
    constrain = functools.partial(with_layout_constraint, layouts=row_major)
    # Shard by shard: XLA would gather the whole array for it.
    return jax.shard_map(constrain, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)(gradients)


def per_device(function: Callable[..., Any], mesh: Mesh, replicated_args: int = 0) -> Callable[..., Any]:
    """Map a function of batches over the devices, each computing its own examples: nothing is sent.

    XLA would gather a batch for an FFT. A function with `replicated_args`, the same on every device, has one batch
    after them.
    """
    split = PartitionSpec(EXAMPLES)
    in_specs = (*[PartitionSpec()] * replicated_args, split) if replicated_args else split
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)


def mean_gradient(
    function: Callable[[Any, Any], tuple[jax.Array, Any]], params: Any, parts: Any, mesh: Mesh, dtype: DTypeLike
) -> tuple[jax.Array, Any]:
    """Average the loss and gradient that `function` computes on each device from whole parameters and its own examples.

    Each device runs the program of one: its memory and traffic do not grow with their number, and what is sent are the
    gradients, once, in the precision of the parameters. Parameters and gradients are laid out by `by_parameter`; parts
    of a batch are (parts, batch, ...), and images are whole: the mesh's `spatial` axis is 1. In `dtype` the function
    uses kernels of convolutions (of four axes), and these are gathered.
    """
    specs = jax.tree.map(lambda leaf: by_parameter(mesh, leaf.shape).spec, params)

    def gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        if "model" not in spec:
            return leaf
        sent = leaf.astype(dtype) if leaf.ndim == 4 else leaf
        return jax.lax.all_gather(sent, "model", axis=spec.index("model"), tiled=True).astype(leaf.dtype)

    def average(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        if "model" not in spec:
            return jax.lax.pmean(gradient, EXAMPLES)
        shard = jax.lax.psum_scatter(gradient, "model", scatter_dimension=spec.index("model"), tiled=True)
        return jax.lax.psum(shard, "data") / example_shards(mesh)

    def on_device(params: Any, parts: Any) -> tuple[jax.Array, Any]:
        loss, gradients = function(jax.tree.map(gather, params, specs), parts)
        if mesh.size == 1:
            return loss, gradients
        return jax.lax.pmean(loss, EXAMPLES), jax.tree.map(average, gradients, specs)

    in_specs, out_specs = (specs, PartitionSpec(None, EXAMPLES)), (PartitionSpec(), specs)
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(params, parts)


def micro_batches(batch: Any, count: int, mesh: Mesh) -> Any:
    """Reshape (batch, ...) to (count, batch // count, ...) inside a jitted function; examples stay on their device."""
    shards = example_shards(mesh)
    split = NamedSharding(mesh, PartitionSpec(None, EXAMPLES))

    def divide(x: jax.Array) -> jax.Array:
        parts = x.reshape(shards, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts.reshape(count, -1, *x.shape[1:]), split)

    return jax.tree.map(divide, batch)


def rows_of_process(mesh: Mesh, batch_size: int) -> list[int]:
    """List the rows of a global batch whose examples the devices of this process hold."""
    slices = by_example(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for index in slices.values() if index for row in range(batch_size)[index[0]]})


def on_host(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """Fetch all of an array that is spread over the mesh."""
    return np.asarray(jax.device_put(x, replicated(mesh)))


def to_devices(batches: Iterator[dict[str, np.ndarray]], mesh: Mesh) -> Generator[dict[str, jax.Array], None, None]:
    """Make global batches of every process's part; transfers are asynchronous and run two batches before use."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        queue.append(jax.make_array_from_process_local_data(by_example(mesh), batch))
        if len(queue) > 2:
            yield queue.popleft()
    yield from queue
