"""The functions that are jitted: a training step, a step of inference, its score. Pure: state and batch in and out."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jax.stages import Wrapped

from mrjax import losses, metrics, sharding
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
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    task: Task,
    seed: int,
    normalise_by: str,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augment, acquire, normalise, predict, mean squared error, Adam.

    Args:
      state: donated by the caller.
      batch: the task's arrays, `index` (batch,) uint32, and `maximum` (batch,) float32.
      model: from (batch, height, width, 1) to the same, normalised.
      optimizer: optax's.
      task: makes (corrupted, target) from the batch.
      seed: of everything random.
      normalise_by: 'slice' or 'volume'.

    Returns:
      The next state, and float32 scalars: loss (normalised units), grad_norm, and param_norm of the next state.
    """
    corrupted, target = task(batch, training_keys(seed, batch["index"]))
    scale = scaling(corrupted, batch, normalise_by)
    inputs, truth = scale.apply(corrupted), scale.apply(target)

    def loss_of(params: Any) -> jax.Array:
        return losses.mean_squared_error(run_network(model, params, inputs), truth)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {"grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
    return TrainState(params=params, opt_state=opt_state), {"loss": loss} | norms


def predict(params: Any, batch: Batch, *, model: nn.Module, task: Task, normalise_by: str) -> tuple[Batch, jax.Array]:
    """Reconstructs a batch, each slice corrupted as its volume's name says, without augmentation.

    Returns:
      Images: corrupted, reconstruction and target, (batch, height, width) float32 in the file's units.
      Peak of each target, (batch,) float32.
    """
    corrupted, target = task(batch, evaluation_keys(batch["name"], batch["slice"]))
    scale = scaling(corrupted, batch, normalise_by)
    reconstruction = scale.invert(run_network(model, params, scale.apply(corrupted)))
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
    """`train_step` jitted over the mesh: batch split by example, state replicated and donated."""
    same, split = sharding.replicated(mesh), sharding.by_example(mesh)
    step = functools.partial(train_step, **closed_over)
    return jax.jit(step, in_shardings=(same, split), out_shardings=(same, same), donate_argnums=0)


def compile_predict(mesh: Mesh, **closed_over: Any) -> Wrapped:
    """`predict` jitted over the mesh: images stay split by example, their peaks come out on every device."""
    same, split = sharding.replicated(mesh), sharding.by_example(mesh)
    step = functools.partial(predict, **closed_over)
    return jax.jit(step, in_shardings=(same, split), out_shardings=(split, same))


def compile_score(mesh: Mesh) -> Wrapped:
    """`score` jitted over the mesh: its few numbers come out on every device."""
    same, split = sharding.replicated(mesh), sharding.by_example(mesh)
    return jax.jit(score, in_shardings=(split, split), out_shardings=same)
