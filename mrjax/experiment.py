"""From a config to the objects of a run: mesh, data, recipe, compiled step."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped
from ml_collections import ConfigDict

from mrjax import config as configs
from mrjax import demo, models, optimizers
from mrjax.data import loader, splits
from mrjax.data.buckets import bucket_by_size, describe_buckets
from mrjax.data.buffers import Spec
from mrjax.data.cache import HostCache
from mrjax.data.dataset import Dataset, ExampleIndices
from mrjax.data.device_cache import DeviceCache, cached_batches, device_bytes
from mrjax.errors import UserError, expect
from mrjax.io import hdf5
from mrjax.io.volume import Volume
from mrjax.measures import evaluator, losses, metrics
from mrjax.mri.acquire import Acquisition
from mrjax.mri.augment import Augment
from mrjax.mri.normalise import NORMALISATIONS
from mrjax.mri.tasks import TASKS
from mrjax.parallel import memory, processes, sharding
from mrjax.report import loggers
from mrjax.train_step import Batch, Metrics, Recipe, TrainState, jit_predict, jit_train_step

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a training run is made of, checked."""

    config: ConfigDict  # with data.dir filled in
    recipe: Recipe
    train_set: list[Volume]
    val_set: list[Volume]
    train_datasets: Sequence[Dataset]  # slices of the training volumes, one dataset for each size
    val_datasets: Sequence[Dataset]
    abstract_state: TrainState  # its shapes and shardings

    @classmethod
    def from_config(cls, config: ConfigDict, faults: list[str] | None = None) -> "Experiment":
        """Check config and files, build everything but compiled functions; `UserError` for what the user can mend.

        With `faults` faulty files are left out, and a sentence for each is added to these.
        """
        configs.check(config)
        loggers.require_installed(config.loggers)
        mesh = sharding.make_mesh(mesh_shape(config, jax.device_count()))
        config = config.copy_and_resolve_references()
        if not (config.data.dir or config.data.train):
            config.data.dir = make_demo_data(config.task)
        started = time.perf_counter()
        train_set, val_set = (
            splits.describe_split(config, splits.find_split(config.data, split), faults) for split in ("train", "val")
        )
        logger.info("checked %d files in %.1f s", len(train_set) + len(val_set), time.perf_counter() - started)
        sizes = {volume.data_shape for volume in train_set + val_set}
        check_sizes(config, sizes, mesh.shape["spatial"])
        train_datasets = make_datasets(config, "training", train_set)
        val_datasets = make_datasets(config, "validation", val_set)
        recipe = make_recipe(config, mesh)
        state = abstract_state(config, recipe)
        return cls(config, recipe, train_set, val_set, train_datasets, val_datasets, state)

    def init_state(self) -> TrainState:
        """Draw the state that training starts from, laid out over the mesh."""
        layout = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(functools.partial(initial_state, self.config, self.recipe), out_shardings=layout)()

    def compile_train_step(self) -> "CompiledTrainStep":
        """Compile the training step for each shape of a batch; `UserError` if it does not fit beside the caches."""
        compiled = {}
        self._require_memory()  # before the compilation, which may take minutes
        with memory.explain_out_of_memory(self.explain_out_of_memory):
            for dataset in self.train_datasets:
                shapes = frozenset(shape for shape, _ in dataset.spec.values())
                compiled[shapes] = self._compile(dataset.spec, self.config.batch_size)
        step = CompiledTrainStep(compiled)
        self._require_memory(step.needed_bytes)
        return step

    def describe_memory(self, step: "CompiledTrainStep") -> str:
        """Describe the memory that a step needs, and the caches beside it, against that of each device."""
        need, cached, limit = (
            f"{size / 1e9:.2f} GB" for size in (step.needed_bytes, self._cached_bytes, self._device_memory or 0)
        )
        beside = f" and the cached slices {cached}" if self._cached_bytes else ""
        return f"a step takes {need}{beside} of {limit if self._device_memory else 'an unknown amount'} on each device"

    def explain_out_of_memory(self, need: int | None = None) -> UserError:
        """Return the error for a training step that is too large, with the largest batch that fits."""
        specs = [dataset.spec for dataset in self.train_datasets]
        largest = max(specs, key=lambda spec: sum(math.prod(shape) for shape, _ in spec.values()))
        compile_for = functools.partial(self._compile, largest)
        limit = self._device_memory and self._device_memory - self._cached_bytes
        return memory.out_of_memory_error(self.config, self.recipe.mesh, compile_for, limit, need)

    def _require_memory(self, step: int = 0) -> None:
        """Raise a `UserError` unless a step of so many bytes fits on the devices, and the caches beside it."""
        limit, cached = self._device_memory, self._cached_bytes
        if limit and step > limit:
            raise self.explain_out_of_memory(step)
        if limit and cached and cached + step > limit:
            raise memory.cache_error(self.config, cached, step, f"{limit / 1e9:.2f} GB there")
        host = memory.available_memory() // len(self.recipe.mesh.local_devices)
        if cached > host:
            raise memory.cache_error(
                self.config, cached, 0, f"{host / 1e9:.2f} GB for each on the host, which reads it"
            )

    @functools.cached_property
    def _device_memory(self) -> int | None:
        """The bytes of each device, None if unknown; first asked for before anything is there."""
        return memory.available_bytes(self.recipe.mesh)

    @functools.cached_property
    def _cached_bytes(self) -> int:
        """The bytes that the caches take on each device once they are loaded."""
        data, mesh = self.config.data, self.recipe.mesh
        if data.cache != "device":
            return 0
        return sum(device_bytes(dataset, mesh, data.cache_half) for dataset in self.train_datasets)

    def _compile(self, spec: Spec, batch_size: int) -> Compiled:
        split, batch = sharding.by_example(self.recipe.mesh), {}
        for name, (shape, dtype) in (spec | {"index": ((), np.dtype(np.uint32))}).items():
            batch[name] = jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)
        return jit_train_step(self.recipe).lower(self.abstract_state, batch).compile()

    @functools.cached_property
    def caches(self) -> list[DeviceCache]:
        """The training slices on the devices, a cache for each dataset, if config.data.cache is 'device'."""
        if self.config.data.cache != "device":
            return []
        started, mesh, half = time.perf_counter(), self.recipe.mesh, self.config.data.cache_half
        make = functools.partial(DeviceCache, mesh=mesh, half=half, substitute=self._reading.substitute)
        with memory.explain_out_of_memory(lambda: memory.cache_error(self.config, self._cached_bytes, 0, "less")):
            caches = list(map(make, self.train_datasets))
        slices, size = sum(map(len, self.train_datasets)), self._cached_bytes / 1e9
        seconds = time.perf_counter() - started
        logger.info("%d slices, %.2f GB on each device, are cached after %.1f s", slices, size, seconds)
        return caches

    @contextlib.contextmanager
    def training_batches(self, start: int, order: int = 0) -> Iterator[Iterator[Batch]]:
        """Open the endless stream of training batches, on the devices, after `start` steps; each `order` is another."""
        datasets, mesh, caches = self.train_datasets, self.recipe.mesh, self.caches
        if caches:
            datasets = [ExampleIndices(len(dataset), bucket) for bucket, dataset in enumerate(datasets)]
        examples, seed = start * self.config.batch_size, self.config.seed + order
        with loader.training_batches(datasets, self._reading, seed=seed, start=examples) as read:
            batches = cached_batches(read, caches, mesh) if caches else sharding.to_devices(read, mesh)
            with contextlib.closing(batches):
                yield batches

    def write_batch(self, path: Path, step: int, order: int) -> None:
        """Write the training batch of a step to an HDF5 file, with the names of its files."""
        with self.training_batches(step - 1, order) as batches:
            arrays = {name: multihost_utils.process_allgather(x, tiled=True) for name, x in next(batches).items()}
        if jax.process_index() == 0:
            names = [self.train_set[number].path for number in arrays["volume"]]
            hdf5.write(path, arrays, {"files": names, "step": step})

    def evaluate(
        self, params: Any, should_stop: Callable[[], bool]
    ) -> tuple[list[evaluator.Row], dict[str, evaluator.Images]]:
        """Evaluate parameters on the validation split: a row for each volume, and images of the first volumes.

        Raises `StopRequested` before the first batch at which `should_stop` says so.
        """
        with loader.evaluation_batches(self.val_datasets, self._reading) as batches:
            going_on = processes.until_stopped(batches, should_stop)
            return evaluator.evaluate(
                functools.partial(self._predict, params), going_on, self.val_set, self.recipe.mesh
            )

    @functools.cached_property
    def _predict(self) -> Wrapped:
        return jit_predict(self.recipe)

    @property
    def _reading(self) -> loader.LoaderOptions:
        batch_size, data = self.config.batch_size, self.config.data
        rows = sharding.rows_of_process(self.recipe.mesh, batch_size)
        return loader.LoaderOptions(batch_size, data.workers, data.prefetch, rows, data.on_bad_file == "skip")


@dataclasses.dataclass(frozen=True)
class CompiledTrainStep:
    """The training step, compiled for each shape of a batch: `programs` by the shapes of an example's arrays."""

    programs: Mapping[frozenset[tuple[int, ...]], Compiled]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Take a step: see `train_step`."""
        return self.programs[frozenset(x.shape[1:] for x in batch.values())](state, batch)

    @property
    def needed_bytes(self) -> int:
        """The bytes that the largest takes on each device."""
        return max(map(memory.needed_bytes, self.programs.values()))


def make_recipe(config: ConfigDict, mesh: Mesh) -> Recipe:
    """Build the network, task, loss and optimizer of a config."""
    known = models.attribute_names(config.model.name)
    attributes = {name: value for name, value in config.model.items() if name in known}
    dtype = jnp.bfloat16 if config.precision == "bfloat16" else jnp.float32
    return Recipe(
        mesh=mesh,
        model=models.MODELS[config.model.name](dtype=dtype, remat=config.remat, **attributes),
        task=TASKS[config.task](Acquisition(**config.acquisition), Augment(**config.augment)),
        normalise=NORMALISATIONS[config.normalise],
        loss=losses.weighted_sum(config.loss),
        optimizer=optimizers.make_optimizer(config),
        learning_rate=optimizers.make_schedule(config),
        seed=config.seed,
        grad_accumulation_steps=config.grad_accumulation_steps,
        ema=config.ema,
        exact=config.precision == "float32_exact",
    )


def initial_state(config: ConfigDict, recipe: Recipe) -> TrainState:
    """Draw parameters and set up the optimizer: a pure function of the seed, whatever the size of images."""
    side, channels = max(smallest_side(config)[0], 16), 1 + 2 * config.data.adjacent_slices
    blank = models.NetworkInputs(
        image=jnp.zeros((1, side, side, channels)),
        kspace=jnp.zeros((1, 1, side, side), jnp.complex64),
        mask=jnp.ones((1, 1, side), bool),
        offset=jnp.zeros((1, 1, 1)),
    )
    params = recipe.model.init(jax.random.key(recipe.seed), *models.select_inputs(recipe.model, blank))["params"]
    ema = jax.tree.map(jnp.copy, params) if recipe.ema else None
    return TrainState(step=jnp.int32(0), params=params, opt_state=recipe.optimizer.init(params), ema=ema)


def abstract_state(config: ConfigDict, recipe: Recipe) -> TrainState:
    """Return shapes and shardings of `initial_state`, without computing any of it."""
    shapes = jax.eval_shape(functools.partial(initial_state, config, recipe))
    return jax.tree.map(lambda leaf: leaf.update(sharding=sharding.by_parameter(recipe.mesh, leaf.shape)), shapes)


def mesh_shape(config: ConfigDict, devices: int) -> tuple[int, int, int]:
    """Fill in the 0 of config.mesh; `UserError` if it is not of so many devices, or a batch does not split evenly."""
    mesh = tuple(config.mesh)
    try:
        data, model, spatial = np.empty(devices).reshape([n or -1 for n in mesh]).shape
    except ValueError:
        raise UserError(f"config.mesh is {mesh}, expected numbers that multiply to the {devices} devices") from None
    shards, accumulation = data * model, config.grad_accumulation_steps
    if config.batch_size % (shards * accumulation):
        factors = [f"the {shards} devices it is split over"] if shards > 1 else []
        factors += [f"config.grad_accumulation_steps = {accumulation}"] if accumulation > 1 else []
        raise UserError(f"config.batch_size is {config.batch_size}, expected a multiple of {' times '.join(factors)}")
    return data, model, spatial


def smallest_side(config: ConfigDict) -> tuple[int, str]:
    """Return the least height or width that the network takes, and the field it depends on."""
    depths = sorted({"levels", "sens_levels"} & set(models.attribute_names(config.model.name)))
    field = max(depths, key=config.model.get, default="levels")
    return models.MODELS[config.model.name].smallest_side(config.model[field]), field


def check_sizes(config: ConfigDict, sizes: Iterable[tuple[int, int]], spatial: int = 1) -> None:
    """Raise a `UserError` if config.data.image_size, or without it a (height, width) of the files, cannot be used.

    It may be too small for the network or the metrics, or not split over the `spatial` devices of the mesh by rows.
    """
    size = tuple(config.data.image_size)
    least, field = smallest_side(config)
    least = max(least, metrics.WINDOW)
    for height, width in [size] if size else sorted(sizes):
        found = f"config.data.image_size is {size}" if size else f"the files hold slices of {height}x{width}"
        way_out = "" if size else ", or config.data.image_size for all"
        side = f"at least {least} a side for config.model.{field} = {config.model[field]}; lower the levels or enlarge"
        expect(min(height, width) >= least, found, f"{side} the images{way_out}")
        rows = f"a height that is a multiple of {spatial}, over which config.mesh splits the rows{way_out}"
        expect(height % spatial == 0, found, rows)


def demo_folder(task: str) -> str:
    """Return the folder of the demo data for a task."""
    return "data/demo-repeated" if task in splits.REPETITION_TASKS else "data/demo"


def make_demo_data(task: str) -> str:
    """Make the demo data for a task unless they are there, and return their folder."""
    folder = demo_folder(task)
    with processes.first_process_first():
        if jax.process_index() == 0 and not os.path.isdir(folder):
            logger.info("config.data.dir is not set: making the demo data in %s", folder)
            demo.make(folder, demo.REPEATED if task in splits.REPETITION_TASKS else None)
    return folder


def make_datasets(config: ConfigDict, split: str, volumes: list[Volume]) -> Sequence[Dataset]:
    """Sort the slices of volumes by size, one dataset for each, kept in memory if config.data.cache is 'host'."""
    datasets = bucket_by_size(config.data, volumes)
    logger.info("%s: %s", split, describe_buckets(datasets))
    return [HostCache(dataset) for dataset in datasets] if config.data.cache == "host" else datasets
