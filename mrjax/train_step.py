"""The functions that are jitted: a training step, inference, its score. All are pure."""

import dataclasses
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

from mrjax.measures import metrics
from mrjax.measures.losses import Loss
from mrjax.models import NetworkInputs, select_inputs
from mrjax.mri.normalise import NORMALISATIONS, Scaling
from mrjax.mri.tasks import Example, Keys, Task, evaluation_keys, training_keys
from mrjax.parallel import compiler, sharding

Batch = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """All that a step changes.

    Attributes:
      step: int32 scalar, steps done.
      params: the network's parameters, float32.
      opt_state: optax's state.
      ema: an exponential moving average of the parameters, None if none is kept.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def eval_params(self) -> Any:
        """The parameters to reconstruct with: the average if there is one."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step computes: closed over by the jitted functions.

    Attributes:
      mesh: of the devices.
      model: a network of `models`.
      task: makes examples of a batch.
      normalisation: name in `normalise.NORMALISATIONS`.
      loss: what is minimised.
      optimizer: optax's.
      learning_rate: the schedule that the optimizer follows, for the log.
      seed: of the parameters and of everything random.
      grad_accumulation_steps: parts of a batch that are worked through one after the other.
      ema: decay of the average of the parameters a step; 0: no average.
    """

    mesh: Mesh
    model: nn.Module
    task: Task
    normalisation: str
    loss: Loss
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    seed: int
    grad_accumulation_steps: int = 1
    ema: float = 0.0


def init_state(recipe: Recipe, size: tuple[int, int], channels: int = 1) -> TrainState:
    """Draw parameters and set up the optimizer; the parameters are a function of the seed alone.

    Args:
      recipe: of the step.
      size: (height, width) of an image that the network accepts.
      channels: of the network's image: the slice and its adjacent ones.
    """
    blank = NetworkInputs(
        image=jnp.zeros((1, *size, channels)),
        kspace=jnp.zeros((1, 1, *size), jnp.complex64),
        mask=jnp.ones((1, 1, size[1]), bool),
        offset=jnp.zeros((1, 1, 1)),
    )
    params = recipe.model.init(jax.random.key(recipe.seed), *select_inputs(recipe.model, blank))["params"]
    ema = jax.tree.map(jnp.copy, params) if recipe.ema else None
    return TrainState(step=jnp.int32(0), params=params, opt_state=recipe.optimizer.init(params), ema=ema)


def make_example(recipe: Recipe, batch: Batch, keys: Keys) -> tuple[Example, Scaling]:
    """Augment and corrupt the slices of a batch, and find how they are normalised."""
    example = recipe.task(batch, keys)
    return example, NORMALISATIONS[recipe.normalisation](example.corrupted, batch["maximum"])


def network_inputs(recipe: Recipe, example: Example, scaling: Scaling) -> NetworkInputs:
    """Normalise what the network is given; k-space stays out unless the network asks for it."""
    image = scaling.apply(example.corrupted)[..., None]
    if example.adjacent is not None:
        adjacent = (example.adjacent - scaling.offset[..., None]) / scaling.scale[..., None]
        image = jnp.concatenate([image, adjacent], -1)
    kspace, mask = example.kspace, example.mask
    if kspace is None or "kspace" not in recipe.model.input_names:
        kspace = mask = None
    else:
        kspace = kspace / scaling.scale[:, None]
    return NetworkInputs(image, kspace, mask, scaling.offset / scaling.scale)


def run_network(model: nn.Module, params: Any, inputs: NetworkInputs) -> jax.Array:
    """Apply the network: (batch, height, width) float32, normalised."""
    return jnp.squeeze(jnp.asarray(model.apply({"params": params}, *select_inputs(model, inputs))), -1)


def training_pairs(recipe: Recipe, batch: Batch) -> tuple[NetworkInputs, jax.Array]:
    """Make the network's inputs and the normalised targets (batch, height, width) of a training batch."""
    example, scaling = make_example(recipe, batch, training_keys(recipe.seed, batch["index"]))
    return network_inputs(recipe, example, scaling), scaling.apply(example.target)


def loss_of_batch(recipe: Recipe, params: Any, batch: Batch) -> jax.Array:
    """Compute the loss of a batch whose images are whole on each device."""
    inputs, target = training_pairs(recipe, batch)
    return recipe.loss(run_network(recipe.model, params, inputs), target, inputs.offset)


def loss_of_split_rows(recipe: Recipe, params: Any, batch: Batch) -> jax.Array:
    """Compute the loss where the mesh splits the rows of images: FFTs need whole ones, the network does not."""
    inputs, target = sharding.per_device(functools.partial(training_pairs, recipe), recipe.mesh)(batch)
    image, target = jax.lax.with_sharding_constraint((inputs.image, target), sharding.by_row(recipe.mesh))
    params = jax.lax.with_sharding_constraint(params, sharding.replicated(recipe.mesh))
    return recipe.loss(run_network(recipe.model, params, inputs._replace(image=image)), target, inputs.offset)


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


def train_step(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augment, acquire, normalise, predict, compare, update.

    Args:
      recipe: what the step computes.
      state: donated by the caller.
      batch: the task's arrays, `index` (batch,) uint32, and `maximum` (batch,) float32.

    Returns:
      The next state, and float32 scalars: loss (normalised units), grad_norm, param_norm of the next state, and
      learning_rate.
    """
    loss, gradients = gradient(recipe, state.params, batch)
    new = update(recipe, state, gradients)
    return new, {
        "loss": loss,
        "grad_norm": optax.tree.norm(gradients),
        "param_norm": optax.tree.norm(new.params),
        "learning_rate": jnp.asarray(recipe.learning_rate(state.step), jnp.float32),
    }


def evaluation_inputs(recipe: Recipe, batch: Batch) -> tuple[NetworkInputs, Scaling, Batch, jax.Array]:
    """Corrupt a batch as its volumes' names say: network inputs, scaling, images in the file's units, target peaks."""
    example, scaling = make_example(recipe, batch, evaluation_keys(batch["name"], batch["slice"]))
    images = {"corrupted": example.corrupted, "target": example.target}
    return network_inputs(recipe, example, scaling), scaling, images, example.target.max((-2, -1))


def predict(recipe: Recipe, params: Any, batch: Batch) -> tuple[Batch, jax.Array]:
    """Reconstruct a batch, each slice corrupted as its volume's name says, without augmentation.

    Returns:
      Images: corrupted, reconstruction and target, (batch, height, width) float32 in the file's units.
      Peak of each target, (batch,) float32.
    """
    mesh, model = recipe.mesh, recipe.model
    inputs, scaling, images, peak = sharding.per_device(functools.partial(evaluation_inputs, recipe), mesh)(batch)
    if mesh.shape["spatial"] == 1:
        run = sharding.per_device(functools.partial(run_network, model), mesh, replicated_args=1)
        prediction = run(params, inputs)
    else:
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        image = jax.lax.with_sharding_constraint(inputs.image, sharding.by_row(mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            prediction = run_network(model, params, inputs._replace(image=image))
    return images | {"reconstruction": scaling.invert(prediction)}, peak


def score(images: Batch, data_range: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Compute each slice's share of its volume's metrics, for the corrupted input and for the reconstruction.

    Args:
      images: from `predict`.
      data_range: (batch,) maximum of the volume that each slice belongs to.
    """
    return {
        name: metrics.slice_values(images["target"], images[name], data_range)
        for name in ("corrupted", "reconstruction")
    }


def jit_train_step(recipe: Recipe) -> Wrapped:
    """Jit `train_step` of (state, batch) over the mesh: the state is donated and keeps its layout."""
    step = functools.partial(train_step, recipe)
    return jax.jit(step, donate_argnums=0, compiler_options=compiler.options(recipe.mesh))


def jit_predict(recipe: Recipe) -> Wrapped:
    """Jit `predict` of (params, batch) over the mesh: images stay split by example, peaks come out on every device."""
    same, split = sharding.replicated(recipe.mesh), sharding.by_example(recipe.mesh)
    return jax.jit(functools.partial(predict, recipe), in_shardings=(None, split), out_shardings=(split, same))


def jit_score(mesh: Mesh) -> Wrapped:
    """Jit `score` of (images, data_range) over the mesh: its few numbers come out on every device."""
    same, split = sharding.replicated(mesh), sharding.by_example(mesh)
    return jax.jit(score, in_shardings=(split, split), out_shardings=same)
