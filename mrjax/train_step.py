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

from mrjax.data import device_cache
from mrjax.errors import UserError
from mrjax.measures import losses, metrics
from mrjax.models import Inputs
from mrjax.mri import normalise
from mrjax.mri.tasks import Example, Task, evaluation_keys, training_keys
from mrjax.parallel import compiler, sharding
from mrjax.sizes import OwnSize, Sizes

Batch = dict[str, jax.Array]
MSE = losses.weighted_sum({"mse": 1.0})


class TrainState(struct.PyTreeNode):
    """All that a step changes.

    Attributes:
      params: the network's parameters, float32.
      opt_state: optax's state.
      ema: an exponential moving average of the parameters, None if none is kept.
    """

    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def best_params(self) -> Any:
        """What to reconstruct with: the average if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    size: tuple[int, int],
    seed: int,
    *,
    channels: int = 1,
    ema: bool = False,
) -> TrainState:
    """Fresh parameters and optimizer state for images of `channels`; a function of the seed alone."""
    blank = Inputs(
        image=jnp.zeros((1, *size, channels)),
        kspace=jnp.zeros((1, 1, *size), jnp.complex64),
        mask=jnp.ones((1, 1, size[1]), bool),
        offset=jnp.zeros((1, 1, 1)),
    )
    params = model.init(jax.random.key(seed), *asked(model, blank))["params"]
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(params=params, opt_state=optimizer.init(params), ema=average)


def scaling(corrupted: jax.Array, batch: Batch, how: str) -> normalise.Scaling:
    """How the images of a batch are scaled: by 'slice', by the 'volume' maximum that its file knows, or 'standard'."""
    return normalise.NORMALISATIONS[how](corrupted, batch["maximum"])


def network_inputs(example: Example, scale: normalise.Scaling) -> Inputs:
    """All that a network may ask for, normalised."""
    image = scale.apply(example.corrupted)[..., None]
    if example.adjacent is not None:
        adjacent = (example.adjacent - scale.offset[..., None]) / scale.scale[..., None]
        image = jnp.concatenate([image, adjacent], -1)
    kspace = None if example.kspace is None else example.kspace / scale.scale[:, None]
    return Inputs(image, kspace, example.mask, scale.offset / scale.scale)


def without_kspace(inputs: Inputs, model: Any) -> Inputs:
    """The inputs without what only networks need that work on k-space, unless this one does."""
    return inputs if "kspace" in model.needs else inputs._replace(kspace=None, mask=None)


def asked(model: Any, inputs: Inputs) -> list[Any]:
    """What the network is called with.

    Raises:
      UserError: it needs k-space where the task has images.
    """
    for name in model.needs:
        if getattr(inputs, name) is None:
            raise UserError(
                f"config.model.name is a network that needs {name}, expected config.task = 'kspace' with it"
            )
    return [getattr(inputs, name) for name in model.needs]


def run_network(model: nn.Module, params: Any, inputs: Inputs) -> jax.Array:
    """The normalised reconstruction, (batch, height, width) float32."""
    of_canvas: dict[str, Any] = {} if inputs.canvas is None else {"canvas": inputs.canvas}
    return jnp.squeeze(jnp.asarray(model.apply({"params": params}, *asked(model, inputs), **of_canvas)), -1)


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
    loss: losses.Loss = MSE,
    accumulate: int = 1,
    ema: float = 0.0,
    learning_rate: optax.Schedule | None = None,
    sizes: Sizes | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augment, acquire, normalise, predict, compare, update.

    Args:
      state: donated by the caller.
      batch: the task's arrays, `index` (batch,) uint32, and `maximum` (batch,) float32; or `index` and `example`, the
        places in `cache` of the examples.
      cache: the whole split, from `device_cache.load`.
      mesh: of the devices.
      model: a network of `models`.
      optimizer: optax's.
      task: makes examples of the batch.
      seed: of everything random.
      normalise_by: 'slice', 'volume' or 'standard'.
      loss: what is minimised.
      accumulate: parts in which a batch is worked through one after the other, for less memory.
      ema: decay of the average of the parameters a step, if the state has one; less over the first steps, so that
        the average forgets where it started: min(ema, (1 + step) / (10 + step)).
      learning_rate: what the optimizer follows, if it is to be told: the host would wait for the device to compute it.
      sizes: of the slices in each bucket, if they differ in size and keep it.

    Returns:
      The next state, and float32 scalars: loss (normalised units), grad_norm, param_norm of the next state, and
        learning_rate.
    """
    parts = sharding.micro_batches(batch, accumulate, mesh)

    def normalised(part: Batch) -> tuple[Inputs, jax.Array]:
        example = task(part, training_keys(seed, part["index"]))
        scale = scaling(example.corrupted, part, normalise_by)
        return without_kspace(network_inputs(example, scale), model), scale.apply(example.target)

    def pairs(own: OwnSize, part: Batch, cache: Batch | None) -> tuple[Inputs, jax.Array]:
        return own.of(normalised)(part if cache is None else part | device_cache.draw(cache, part["example"]))

    def compare(params: Any, inputs: Inputs, truth: jax.Array, own: OwnSize) -> jax.Array:
        prediction = run_network(model, params, inputs._replace(canvas=own.canvas))
        return loss(own.cut(prediction), own.cut(truth), inputs.offset, own.size)

    def of_whole_images(params: Any, part: Batch, cache: Batch | None) -> jax.Array:
        own = OwnSize(part, sizes, model)
        return compare(params, *pairs(own, part, cache), own)

    def of_split_images(params: Any, part: Batch, cache: Batch | None) -> jax.Array:
        own = OwnSize(part, sizes, model)
        # FFTs need whole images, so each device makes those of its rows' neighbours too; the network sees rows alone.
        inputs, truth = sharding.each_alone(functools.partial(pairs, own), mesh)(part, cache)
        image, truth = jax.lax.with_sharding_constraint((inputs.image, truth), sharding.by_row(mesh))
        whole = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        return compare(whole, inputs._replace(image=image), truth, own)

    if mesh.shape["spatial"] == 1:
        gradient = sharding.mean_gradient(functools.partial(_gradient, of_whole_images), mesh, model.dtype)
    else:
        gradient = functools.partial(_gradient, of_split_images)
    value, gradients = gradient(state.params, parts, cache)
    gradients = sharding.constrain_state(gradients, mesh)
    # As the parameters lie, or XLA would turn them and both moments around instead (12 MB an image on an H100).
    gradients = sharding.as_it_lies(gradients, mesh)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    told = {"loss": value, "grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
    if learning_rate is not None:
        told["learning_rate"] = jnp.asarray(learning_rate(_steps_done(state)), jnp.float32)
    average = None
    if state.ema is not None:
        number = _steps_done(state) + 1
        decay = jnp.minimum(ema, (1 + number) / (10 + number))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    state = sharding.constrain_state(TrainState(params=params, opt_state=opt_state, ema=average), mesh)
    return state, told


def _steps_done(state: TrainState) -> jax.Array:
    """As an optimizer counts them that has a schedule."""
    return optax.tree.get_all_with_path(state.opt_state, "count")[0][1]


def _gradient(
    loss_of: Callable[..., jax.Array], params: Any, parts: Batch, cache: Batch | None
) -> tuple[jax.Array, Any]:
    """Mean loss and gradient over parts of equal size, (parts, batch, ...), one after the other."""
    count = len(parts["index"])
    first = jax.tree.map(lambda x: x[0], parts)
    if count == 1:
        return jax.value_and_grad(loss_of)(params, first, cache)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, part, cache)), None

    nothing = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    total, _ = jax.lax.scan(add, nothing, parts)
    return jax.tree.map(lambda x: x / count, total)


def predict(
    params: Any,
    batch: Batch,
    *,
    mesh: Mesh,
    model: nn.Module,
    task: Task,
    normalise_by: str,
    sizes: Sizes | None = None,
) -> tuple[Batch, jax.Array]:
    """Reconstructs a batch, each slice corrupted as its volume's name says, without augmentation.

    Returns:
      Images: corrupted, reconstruction and target, (batch, height, width) float32 in the file's units; where slices of
        several sizes share a batch, zero beyond their own, and `size` (batch, 2) int32.
      Peak of each target, (batch,) float32.
    """

    def make(batch: Batch) -> tuple[Inputs, normalise.Scaling, Batch, jax.Array]:
        example = task(batch, evaluation_keys(batch["name"], batch["slice"]))
        scale = scaling(example.corrupted, batch, normalise_by)
        images = {"corrupted": example.corrupted, "target": example.target}
        return without_kspace(network_inputs(example, scale), model), scale, images, example.target.max((-2, -1))

    own = OwnSize(batch, sizes, model)
    inputs, scale, images, peak = sharding.each_alone(own.of(make), mesh)(batch)
    inputs = inputs._replace(canvas=own.canvas)
    if mesh.shape["spatial"] == 1:
        prediction = sharding.each_alone(functools.partial(run_network, model), mesh, whole=1)(params, inputs)
    else:
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        image = jax.lax.with_sharding_constraint(inputs.image, sharding.by_row(mesh))
        prediction = run_network(model, params, inputs._replace(image=image))
    images = jax.tree.map(own.cut, images | {"reconstruction": scale.invert(prediction)})
    return images if own.size is None else images | {"size": own.size}, peak


def score(images: Batch, data_range: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Sums over each slice from which a volume's metrics are made, for the corrupted input and the reconstruction.

    Args:
      images: from `predict`.
      data_range: (batch,) maximum of the volume that each slice belongs to.
    """
    return {
        name: metrics.slice_sums(images["target"], images[name], data_range, images.get("size"))
        for name in ("corrupted", "reconstruction")
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
