"""The functions that are jitted: a training step and inference. All are pure."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jax.stages import Wrapped

from mrjax.measures.losses import Loss
from mrjax.models import NetworkInputs, select_inputs
from mrjax.mri.grid import Grid
from mrjax.mri.normalise import Scaling
from mrjax.mri.tasks import Example, Task, evaluation_keys, training_keys
from mrjax.parallel import sharding

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

XLA_OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "gpu": {
        # The same run must give the same bits: autotuning may not choose algorithms that add in no fixed order.
        "xla_gpu_exclude_nondeterministic_ops": True,
        # Overlap the all-reduce of gradients with the backward pass, in buckets of 4 MB: by default, those of 8 million
        # parameters go into one bucket, which is sent after the last gradient.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_reduce_combine_threshold_bytes": 4 << 20,
    },
    "tpu": {"xla_tpu_enable_latency_hiding_scheduler": True},
}


class TrainState(struct.PyTreeNode):
    """All that a step changes."""

    step: jax.Array  # int32 scalar, steps done
    params: Any  # of the network, float32
    opt_state: Any
    ema: Any = None  # an exponential moving average of the parameters, None if none is kept

    @property
    def eval_params(self) -> Any:
        """The parameters to reconstruct with: the average if there is one."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step computes: closed over by the jitted functions."""

    mesh: Mesh
    model: nn.Module
    task: Task
    normalise: Callable[[jax.Array, jax.Array], Scaling]  # of `normalise.NORMALISATIONS`
    loss: Loss
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule  # that the optimizer follows, for the log
    seed: int  # of the parameters and of everything random
    grad_accumulation_steps: int = 1  # parts of a batch that are worked through one after the other
    ema: float = 0.0  # decay of the average of the parameters a step; 0: no average
    grid: Grid | None = None  # for inference on files whose grid is not the network's
    exact: bool = False  # whether float32 is multiplied as such, not in the shorter numbers of tensor cores or a TPU

    def arithmetic(self) -> AbstractContextManager[None]:
        """Return the context in which the network and its gradient are traced."""
        return jax.default_matmul_precision("highest") if self.exact else contextlib.nullcontext()


def network_inputs(recipe: Recipe, example: Example, scaling: Scaling) -> NetworkInputs:
    """Normalise what the network is given; k-space stays out unless the network asks for it."""
    image = scaling.apply(example.corrupted)[..., None]
    if example.adjacent is not None:
        adjacent = (example.adjacent - scaling.offset[..., None]) / scaling.scale[..., None]
        image = jnp.concatenate([image, adjacent], -1)
    kspace = mask = None
    if example.kspace is not None and "kspace" in recipe.model.input_names:
        kspace, mask = example.kspace / scaling.scale[:, None], example.mask
    return NetworkInputs(image, kspace, mask, scaling.offset / scaling.scale)


def run_network(model: nn.Module, params: Any, inputs: NetworkInputs) -> jax.Array:
    """Apply the network: (batch, height, width) float32, normalised."""
    return jnp.squeeze(jnp.asarray(model.apply({"params": params}, *select_inputs(model, inputs))), -1)


def run_network_by_row(recipe: Recipe, params: Any, inputs: NetworkInputs) -> jax.Array:
    """Apply the network to images whose rows the mesh splits: FFTs need whole ones, the network does not."""
    params = jax.lax.with_sharding_constraint(params, sharding.replicated(recipe.mesh))
    image = jax.lax.with_sharding_constraint(inputs.image, sharding.by_row(recipe.mesh))
    return run_network(recipe.model, params, inputs._replace(image=image))


def training_pairs(recipe: Recipe, batch: Batch) -> tuple[NetworkInputs, jax.Array]:
    """Make the network's inputs and the normalised targets (batch, height, width) of a training batch."""
    example = recipe.task(batch, training_keys(recipe.seed, batch["index"]))
    scaling = recipe.normalise(example.corrupted, batch["maximum"])
    return network_inputs(recipe, example, scaling), scaling.apply(example.target)


def loss_of_batch(recipe: Recipe, params: Any, batch: Batch) -> jax.Array:
    """Compute the loss of a batch whose images are whole on each device."""
    inputs, target = training_pairs(recipe, batch)
    return recipe.loss(run_network(recipe.model, params, inputs), target, inputs.offset)


def loss_of_split_rows(recipe: Recipe, params: Any, batch: Batch) -> jax.Array:
    """Compute the loss of a batch where the mesh splits the rows of images."""
    inputs, target = sharding.per_device(functools.partial(training_pairs, recipe), recipe.mesh)(batch)
    target = jax.lax.with_sharding_constraint(target, sharding.by_row(recipe.mesh))
    return recipe.loss(run_network_by_row(recipe, params, inputs), target, inputs.offset)


def accumulate_gradient(loss: Callable[..., jax.Array], params: Any, parts: Batch) -> tuple[jax.Array, Any]:
    """Average loss and gradient over parts of equal size, arrays of (parts, batch, ...), one after the other."""
    if len(parts["index"]) == 1:
        return jax.value_and_grad(loss)(params, jax.tree.map(lambda x: x[0], parts))

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (jnp.float32(0), params)), parts)
    return jax.tree.map(lambda x: x / len(parts["index"]), total)


def gradient(recipe: Recipe, params: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """Compute the loss of a global batch and its gradient, laid out as the parameters are."""
    mesh = recipe.mesh
    parts = sharding.micro_batches(batch, recipe.grad_accumulation_steps, mesh)
    if mesh.shape["spatial"] == 1:
        of_device = functools.partial(accumulate_gradient, functools.partial(loss_of_batch, recipe))
        loss, gradients = sharding.mean_gradient(of_device, params, parts, mesh, recipe.model.dtype)
    else:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # as shard_map does: it tells operations the platform
            loss, gradients = accumulate_gradient(functools.partial(loss_of_split_rows, recipe), params, parts)
    return loss, sharding.with_parameter_layout(sharding.constrain_state(gradients, mesh), mesh)


def update(recipe: Recipe, state: TrainState, gradients: Any) -> TrainState:
    """Apply the optimizer, and move the average of the parameters if one is kept.

    Over the first steps the average moves faster, so that it forgets the initial parameters: its decay is
    min(ema, (1 + step) / (10 + step)).
    """
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step, ema = state.step + 1, None
    if state.ema is not None:
        decay = jnp.minimum(recipe.ema, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    return sharding.constrain_state(TrainState(step=step, params=params, opt_state=opt_state, ema=ema), recipe.mesh)


def train_step(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Augment, acquire, normalise, predict, compare, update; a loss or gradient that is not finite changes nothing.

    The batch holds the task's arrays, `index` (batch,) uint32, and `maximum` (batch,) float32. Returns the next state,
    and float32 scalars: loss (normalised units), grad_norm, param_norm of the next state, learning_rate, and skipped, 1
    for a step whose update was left out, else 0.
    """
    with recipe.arithmetic():
        loss, gradients = gradient(recipe, state.params, batch)
    # Else XLA shares the squares of the norm with Adam's, transposed as the convolutions return them, and copies the
    # optimizer's state to follow: 0.654 GB an image instead of 0.650 on an H100 (benchmarks.fit).
    gradients = jax.lax.optimization_barrier(gradients)
    grad_norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    # Fused into the update, which reads the old values and writes the new ones anyway.
    new = jax.tree.map(functools.partial(jnp.where, is_finite), update(recipe, state, gradients), state)
    new = new.replace(step=state.step + 1)
    return new, {
        "loss": loss,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(new.params),
        "learning_rate": jnp.asarray(recipe.learning_rate(state.step), jnp.float32),
        "skipped": 1 - is_finite.astype(jnp.float32),
    }


def predict(recipe: Recipe, params: Any, batch: Batch) -> tuple[Batch, jax.Array]:
    """Reconstruct a batch, each slice corrupted as its volume's name says, without augmentation.

    Returns images: corrupted, reconstruction and target, (batch, height, width) float32 in the file's units; and the
    peak of each target, (batch,) float32.
    """
    mesh = recipe.mesh

    def corrupt(batch: Batch) -> tuple[NetworkInputs, Scaling, Example, jax.Array]:
        example = recipe.task(batch, evaluation_keys(batch["name"], batch["slice"]))
        given = recipe.grid.to_network(example) if recipe.grid else example
        scaling = recipe.normalise(given.corrupted, batch["maximum"])
        return network_inputs(recipe, given, scaling), scaling, example, example.target.max((-2, -1))

    inputs, scaling, example, peak = sharding.per_device(corrupt, mesh)(batch)
    if mesh.shape["spatial"] == 1:
        run = sharding.per_device(functools.partial(run_network, recipe.model), mesh, replicated_args=1)
        with recipe.arithmetic():
            prediction = run(params, inputs)
    else:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), recipe.arithmetic():
            prediction = run_network_by_row(recipe, params, inputs)
    image = scaling.invert(prediction)
    if recipe.grid:
        image = sharding.per_device(recipe.grid.from_network, mesh)(image, example)
    return {"corrupted": example.corrupted, "target": example.target, "reconstruction": image}, peak


def compiler_options(mesh: Mesh) -> dict[str, bool | int | str]:
    """Return XLA's options for the mesh's devices, without those set by XLA_FLAGS or, on a TPU, LIBTPU_INIT_ARGS."""
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    given = os.environ.get("LIBTPU_INIT_ARGS" if platform == "tpu" else "XLA_FLAGS", "")
    return {name: value for name, value in XLA_OPTIONS.get(platform, {}).items() if f"--{name}" not in given}


def jit_train_step(recipe: Recipe) -> Wrapped:
    """Jit `train_step` of (state, batch) over the mesh: the state is donated and keeps its layout."""
    step = functools.partial(train_step, recipe)
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(recipe.mesh))


def jit_predict(recipe: Recipe) -> Wrapped:
    """Jit `predict` of (params, batch) over the mesh: images stay split by example, peaks come out on every device."""
    same, split = sharding.replicated(recipe.mesh), sharding.by_example(recipe.mesh)
    return jax.jit(functools.partial(predict, recipe), in_shardings=(None, split), out_shardings=(split, same))
