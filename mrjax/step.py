"""The functions that are jitted: a training step, a step of inference, its score. Pure: state and batch in and out."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jax.stages import Wrapped

from mrjax import compiler, device_cache, losses, metrics, sharding
from mrjax.mri import normalise
from mrjax.mri.tasks import Keys, evaluation_keys, training_keys

Batch = dict[str, jax.Array]
Task = Callable[[Batch, Keys], tuple[jax.Array, jax.Array]]


class TrainState(struct.PyTreeNode):
    """All that a step changes.

    Attributes:
      params: the network's parameters, float32.
      opt_state: optax's state.
    """

    params: Any
    opt_state: Any


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, size: tuple[int, int], seed: int
) -> TrainState:
    """Fresh parameters and optimizer state; a function of the seed alone."""
    params = model.init(jax.random.key(seed), jnp.zeros((1, *size, 1)))["params"]
    return TrainState(params=params, opt_state=optimizer.init(params))


def scaling(corrupted: jax.Array, batch: Batch, how: str) -> normalise.Scaling:
    """How the images of a batch become 0..1: by 'slice' or by the 'volume' maximum that its file knows."""
    return normalise.by_volume(batch["maximum"]) if how == "volume" else normalise.by_slice(corrupted)


def run_network(model: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    """(batch, height, width) normalised to the same: networks themselves work on (batch, height, width, 1)."""
    return jnp.squeeze(jnp.asarray(model.apply({"params": params}, images[..., None])), -1)


def train_step(
    state: TrainState,
    batch: Batch,
    cache: Batch | None = None,
    *,
    mesh: Mesh,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    task: Task,
    seed: int,
    normalise_by: str,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augment, acquire, normalise, predict, mean squared error, Adam.

    Args:
      state: donated by the caller.
      batch: the task's arrays, `index` (batch,) uint32, and `maximum` (batch,) float32; or `index` and `example`, the
        places in `cache` of the examples.
      cache: the whole split, from `device_cache.load`.
      mesh: of the devices.
      model: from (batch, height, width, 1) to the same, normalised.
      optimizer: optax's.
      task: makes (corrupted, target) from the batch.
      seed: of everything random.
      normalise_by: 'slice' or 'volume'.
      accumulate: parts in which a batch is worked through one after the other, for less memory.

    Returns:
      The next state, and float32 scalars: loss (normalised units), grad_norm, and param_norm of the next state.
    """
    batch = jax.lax.with_sharding_constraint(batch, sharding.by_example(mesh))

    def pair(part: Batch) -> tuple[jax.Array, jax.Array]:
        corrupted, target = task(part, training_keys(seed, part["index"]))
        scale = scaling(corrupted, part, normalise_by)
        return scale.apply(corrupted), scale.apply(target)

    def loss_of(params: Any, part: Batch) -> jax.Array:
        if cache is not None:
            part = part | device_cache.draw(cache, part["example"], mesh)
        # FFTs need whole images, so each device makes those of its rows' neighbours too; the network sees rows alone.
        pairs = sharding.each_alone(pair, mesh)(part)
        inputs, truth = jax.lax.with_sharding_constraint(pairs, sharding.by_row(mesh))
        whole = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        return losses.mean_squared_error(run_network(model, whole, inputs), truth)

    if accumulate == 1:
        loss, gradients = jax.value_and_grad(loss_of)(state.params, batch)
    else:
        loss, gradients = _accumulated(loss_of, state.params, sharding.micro_batches(batch, accumulate, mesh))
    gradients = sharding.constrain_state(gradients, mesh)
    # As the parameters lie, or XLA would turn them and both moments around instead (12 MB an image on an H100).
    gradients = jax.tree.map(lambda g: with_layout_constraint(g, Layout(tuple(range(g.ndim)))), gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {"grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
    state = sharding.constrain_state(TrainState(params=params, opt_state=opt_state), mesh)
    return state, {"loss": loss} | norms


def _accumulated(loss_of: Callable[[Any, Batch], jax.Array], params: Any, parts: Batch) -> tuple[jax.Array, Any]:
    """Mean loss and gradient over parts of equal size, (parts, batch, ...), one after the other."""

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, part)), None

    nothing = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    total, _ = jax.lax.scan(add, nothing, parts)
    return jax.tree.map(lambda x: x / len(parts["index"]), total)


def predict(
    params: Any, batch: Batch, *, mesh: Mesh, model: nn.Module, task: Task, normalise_by: str
) -> tuple[Batch, jax.Array]:
    """Reconstructs a batch, each slice corrupted as its volume's name says, without augmentation.

    Returns:
      Images: corrupted, reconstruction and target, (batch, height, width) float32 in the file's units.
      Peak of each target, (batch,) float32.
    """

    def pair(batch: Batch) -> tuple[jax.Array, jax.Array]:
        return task(batch, evaluation_keys(batch["name"], batch["slice"]))

    corrupted, target = sharding.each_alone(pair, mesh)(batch)
    scale = scaling(corrupted, batch, normalise_by)
    params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
    inputs = jax.lax.with_sharding_constraint(scale.apply(corrupted), sharding.by_row(mesh))
    reconstruction = scale.invert(run_network(model, params, inputs))
    return {"corrupted": corrupted, "reconstruction": reconstruction, "target": target}, target.max((-2, -1))


def score(images: Batch, data_range: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Sums over each slice from which a volume's metrics are made, for the corrupted input and the reconstruction.

    Args:
      images: from `predict`.
      data_range: (batch,) maximum of the volume that each slice belongs to.
    """
    return {
        name: metrics.slice_sums(images["target"], images[name], data_range) for name in ("corrupted", "reconstruction")
    }


def compile_train(mesh: Mesh, **closed_over: Any) -> Wrapped:
    """`train_step` jitted over the mesh: the state is donated, and comes out laid out as it must go in."""
    step = functools.partial(train_step, mesh=mesh, **closed_over)
    return jax.jit(step, donate_argnums=0, compiler_options=compiler.options(mesh))


def compile_predict(mesh: Mesh, **closed_over: Any) -> Wrapped:
    """`predict` jitted over the mesh: images stay split by example, their peaks come out on every device."""
    same, split = sharding.replicated(mesh), sharding.by_example(mesh)
    step = functools.partial(predict, mesh=mesh, **closed_over)
    return jax.jit(step, in_shardings=(None, split), out_shardings=(split, same))


def compile_score(mesh: Mesh) -> Wrapped:
    """`score` jitted over the mesh: its few numbers come out on every device."""
    same, split = sharding.replicated(mesh), sharding.by_example(mesh)
    return jax.jit(score, in_shardings=(split, split), out_shardings=same)
