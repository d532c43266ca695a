"""From a config to the parts that a step is made of, and from a workdir to all that inference needs."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped
from ml_collections import ConfigDict

from mrjax import checkpoint, models
from mrjax import train_step as step
from mrjax.data.buffers import Spec
from mrjax.errors import UserError
from mrjax.measures import losses
from mrjax.mri.acquire import Acquisition
from mrjax.mri.augment import Augment
from mrjax.mri.tasks import TASKS, as_measured
from mrjax.parallel import memory, sharding


def model(config: ConfigDict, mesh: Mesh | None = None) -> nn.Module:
    """The network that config.model names, computing in config.precision; its parameters are the same on any mesh."""
    fields = {"dtype": jnp.dtype(config.precision), "remat": config.remat, **config.model}
    fields |= {"lanes": 128 if mesh is not None and mesh.devices.flat[0].platform == "tpu" else 1}
    known = models.attributes(config.model.name)
    return models.build(config.model.name, **{name: fields[name] for name in known if name in fields})


def schedule(config: ConfigDict) -> optax.Schedule:
    """Learning rate by step: a linear rise, then constant, falling in steps, or a cosine to zero at config.steps."""
    warmup, peak = round(config.warmup * config.steps), config.learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(config.steps, warmup + 1))
    if config.schedule == "step":
        every = max(round(config.decay_every * config.steps), 1)
        later: optax.Schedule = optax.exponential_decay(peak, every, config.decay_factor, staircase=True)
    else:
        later = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), later], [warmup]) if warmup else later


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, arXiv:1412.6980), AdamW (arXiv:1711.05101) or NAdamW (Dozat, ICLR workshop 2016)."""
    rate = schedule(config)
    update = {
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=config.weight_decay),
        "nadamw": lambda: optax.nadamw(rate, weight_decay=config.weight_decay),
    }[config.optimizer]()
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


def initial_state(config: ConfigDict) -> Callable[[], step.TrainState]:
    """What makes the state that training starts from, a pure function."""
    # Where each file has its own size, the parameters are of a network that is there for all of them.
    side = models.MODELS[config.model.name].smallest_side(config.model.levels)
    return functools.partial(
        step.init_state,
        *(model(config), optimizer(config), tuple(config.data.image_size) or (side, side), config.seed),
        channels=1 + 2 * config.data.neighbours,
        ema=config.ema > 0,
    )


def task(config: ConfigDict) -> step.Task:
    """What config.task, config.acquisition and config.augment make of a batch."""
    acquisition = Acquisition(**config.acquisition)
    return TASKS[config.task](acquisition, Augment(**config.augment))


def abstract_state(initial: Callable[[], step.TrainState], mesh: Mesh) -> step.TrainState:
    """Shapes and shardings of the state that `initial` makes, without computing any of it."""
    shapes = jax.eval_shape(initial)
    place = functools.partial(sharding.by_parameter, mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x.shape)), shapes)


def train_step(
    config: ConfigDict,
    mesh: Mesh,
    state: step.TrainState,
    spec: Spec,
    cached: tuple[Any, ...],
    **closed_over: Any,
) -> tuple[Callable[[], UserError], Compiled]:
    """The training step, compiled for a state like that and batches of `spec`, and what to say when memory runs out.

    Raises:
      UserError: it needs more memory than a device has.
    """
    given = {"seed": config.seed, "accumulate": config.accumulate, "ema": config.ema}
    loss = losses.weighted_sum(config.loss)
    jitted = step.compile_train(mesh, loss=loss, **given, **closed_over)
    split = sharding.by_example(mesh)
    indexed = spec | {"index": ((), np.dtype(np.uint32))}

    def compile_for(batch_size: int) -> Compiled:
        batch = {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)
            for name, (shape, dtype) in indexed.items()
        }
        return jitted.lower(state, batch, *cached).compile()

    explain = functools.partial(memory.explain, config, mesh, compile_for)
    with memory.answered(explain):
        compiled = compile_for(config.batch_size)
    need, limit = memory.needed(compiled), memory.available(mesh)
    if limit and need > limit:
        raise explain(need)
    return explain, compiled


def train_steps(
    config: ConfigDict,
    mesh: Mesh,
    state: step.TrainState,
    specs: Sequence[Spec],
    cached: tuple[Any, ...],
    **closed_over: Any,
) -> tuple[Callable[[], UserError], Callable[..., tuple[step.TrainState, dict[str, jax.Array]]]]:
    """`train_step` for batches of each of the specs, as one function; the answer is that of the largest."""
    found = {}
    for spec in specs:
        shapes = tuple(spec[name][0] for name in sorted(spec))
        found[shapes] = train_step(config, mesh, state, spec, cached, **closed_over)
    names = sorted(specs[0])
    largest = max(found, key=lambda shapes: sum(map(math.prod, shapes)))

    def of_batch(state: step.TrainState, batch: step.Batch, *cached: Any) -> tuple[step.TrainState, Any]:
        return found[tuple(batch[name].shape[1:] for name in names)][1](state, batch, *cached)

    return found[largest][0], of_batch


class Inference(NamedTuple):
    """A checkpoint ready for use.

    Attributes:
      config: of the run that made it, image size included.
      progress: its step and validation scores.
      mesh: of the devices.
      params: the network's parameters; their average where the run kept one.
      predict: `step.predict` for files with a truth: simulates the corruption of the task.
      reconstruct: `step.predict` for what is corrupted already: takes it as it is.
    """

    config: ConfigDict
    progress: dict[str, Any]
    mesh: Mesh
    params: Any
    predict: Wrapped
    reconstruct: Wrapped


def restore(workdir: str, mesh: Mesh) -> Inference:
    """The best checkpoint of a run, restored with nothing but its workdir."""
    manager, config, progress = checkpoint.best(workdir)
    params = checkpoint.restore_params(manager, abstract_state(initial_state(config), mesh))
    manager.close()
    fixed = {"model": model(config, mesh), "normalise_by": config.normalise}
    fixed |= {"sizes": None if config.data.image_size else {}}
    return Inference(
        config=config,
        progress=progress,
        mesh=mesh,
        params=params,
        predict=step.compile_predict(mesh, task=task(config), **fixed),
        reconstruct=step.compile_predict(mesh, task=as_measured, **fixed),
    )
