"""From a config to the objects of a run: mesh, data, recipe, compiled step; and from a workdir to inference."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped
from ml_collections import ConfigDict

from mrjax import config as configs
from mrjax import demo, models, optimizers
from mrjax import train_step as steps
from mrjax.data import device_cache, loader, splits
from mrjax.data.buckets import bucket_by_size, describe_buckets
from mrjax.data.buffers import Spec
from mrjax.data.cache import HostCache
from mrjax.data.dataset import Dataset, ExampleIndices, SliceDataset
from mrjax.data.device_cache import DeviceCache
from mrjax.data.volume import Volume
from mrjax.errors import UserError
from mrjax.measures import evaluator, losses, metrics
from mrjax.mri.acquire import Acquisition
from mrjax.mri.augment import Augment
from mrjax.mri.tasks import TASKS
from mrjax.parallel import memory, processes, sharding
from mrjax.train_step import Batch, Recipe, TrainState

logger = logging.getLogger(__name__)
DEMO = "data/demo"
INDEX: Spec = {"index": ((), np.dtype(np.uint32))}  # which training batches hold beside a dataset's arrays


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a training run is made of, checked.

    Attributes:
      config: with data.dir filled in, and data.image_size if all files have one size.
      recipe: what a step computes.
      train_set: the training volumes.
      val_set: the validation volumes.
      train_datasets: slices of the training volumes, one dataset for each size.
      val_datasets: likewise, of the validation volumes.
    """

    config: ConfigDict
    recipe: Recipe
    train_set: list[Volume]
    val_set: list[Volume]
    train_datasets: Sequence[Dataset]
    val_datasets: Sequence[Dataset]

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Experiment":
        """Check the config and the files, and build everything but the compiled functions.

        Raises:
          UserError: what the user can mend in config or data.
        """
        configs.check(config)
        mesh = sharding.make_mesh(mesh_shape(config, jax.device_count()))
        config, train_set, val_set = prepare_data(config)
        check_sizes(config, {volume.data_shape for volume in train_set + val_set}, mesh.shape["spatial"])
        train_datasets, val_datasets = (
            make_datasets(config, split, volumes)
            for split, volumes in (("training", train_set), ("validation", val_set))
        )
        return cls(config, make_recipe(config, mesh), train_set, val_set, train_datasets, val_datasets)

    @property
    def mesh(self) -> Mesh:
        """The mesh of devices."""
        return self.recipe.mesh

    def init_state(self) -> TrainState:
        """Draw the state that training starts from, laid out over the mesh."""
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(self.config, self.recipe))
        return jax.jit(functools.partial(initial_state, self.config, self.recipe), out_shardings=layout)()

    def load_caches(self) -> list[DeviceCache]:
        """Read the training slices onto the devices if config.data.cache is 'device': a cache for each dataset."""
        if self.config.data.cache != "device":
            return []
        started = time.perf_counter()
        caches = [DeviceCache(dataset, self.mesh, self.config.data.cache_half) for dataset in self.train_datasets]
        logger.info(
            "%d slices, %.2f GB on each device, are cached after %.1f s",
            sum(map(len, self.train_datasets)),
            sum(cache.device_bytes for cache in caches) / 1e9,
            time.perf_counter() - started,
        )
        return caches

    @contextlib.contextmanager
    def training_batches(self, caches: Sequence[DeviceCache], start: int) -> Iterator[Iterator[Batch]]:
        """Open the endless stream of training batches, on the devices, from the batch of step `start` on."""
        datasets = self.train_datasets
        if caches:
            datasets = [ExampleIndices(len(dataset), bucket) for bucket, dataset in enumerate(datasets)]
        examples, seed = start * self.config.batch_size, self.config.seed
        with loader.training_batches(datasets, self._reading, seed=seed, start=examples) as host_batches:
            if caches:
                batches = device_cache.cached_batches(host_batches, caches, self.mesh)
            else:
                batches = sharding.to_devices(host_batches, self.mesh)
            with contextlib.closing(batches):
                yield batches

    def evaluate(self, params: Any) -> tuple[list[evaluator.Row], dict[str, evaluator.Images]]:
        """Evaluate parameters on the validation split: a row for each volume, and images of the first volumes."""
        predict, score = self._evaluation_functions
        with loader.evaluation_batches(self.val_datasets, self._reading) as batches:
            return evaluator.evaluate(functools.partial(predict, params), score, batches, self.val_set, self.mesh)

    @functools.cached_property
    def _evaluation_functions(self) -> tuple[Wrapped, Wrapped]:
        return steps.jit_predict(self.recipe), steps.jit_score(self.mesh)

    @property
    def _reading(self) -> loader.LoaderOptions:
        batch_size, data = self.config.batch_size, self.config.data
        rows = sharding.rows_of_process(self.mesh, batch_size)
        return loader.LoaderOptions(batch_size, data.workers, data.prefetch, rows)


class TrainStep:
    """The training step, compiled for each shape of a batch before the first step: it is known then that it fits.

    Args:
      experiment: what is trained.
      reserved: bytes on each device that are taken by cached slices.

    Raises:
      UserError: a step needs more memory than a device has.
    """

    def __init__(self, experiment: Experiment, reserved: int = 0):
        self._experiment = experiment
        self._jitted = steps.jit_train_step(experiment.recipe)
        self._state = abstract_state(experiment.config, experiment.recipe)
        specs = [dataset.spec for dataset in experiment.train_datasets]
        self._largest = max(specs, key=lambda spec: sum(math.prod(shape) for shape, _ in spec.values()))
        with memory.explain_out_of_memory(self.explain):
            self._compiled = {_shapes(spec): self._compile(spec, experiment.config.batch_size) for spec in specs}
        need = reserved + max(map(memory.needed_bytes, self._compiled.values()))
        limit = memory.available_bytes(experiment.mesh)
        if limit and need > limit:
            raise self.explain(need)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Run `train_step.train_step`."""
        return self._compiled[_shapes({name: (x.shape[1:], x.dtype) for name, x in batch.items()})](state, batch)

    def explain(self, need: int | None = None) -> UserError:
        """Return the error for a step that is too large, with the largest batch that fits."""
        compile_for = functools.partial(self._compile, self._largest)
        return memory.out_of_memory_error(self._experiment.config, self._experiment.mesh, compile_for, need)

    def _compile(self, spec: Spec, batch_size: int) -> Compiled:
        split = sharding.by_example(self._experiment.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)
            for name, (shape, dtype) in (spec | INDEX).items()
        }
        return self._jitted.lower(self._state, batch).compile()


def _shapes(spec: Spec) -> tuple[tuple[int, ...], ...]:
    """Tell batches of different shapes apart, whose step is compiled once for each."""
    return tuple(spec[name][0] for name in sorted(spec) if name not in INDEX)


def make_recipe(config: ConfigDict, mesh: Mesh) -> Recipe:
    """Build the network, task, loss and optimizer of a config."""
    known = models.attribute_names(config.model.name)
    attributes = {name: value for name, value in config.model.items() if name in known and name != "name"}
    return Recipe(
        mesh=mesh,
        model=models.build(config.model.name, dtype=jnp.dtype(config.precision), remat=config.remat, **attributes),
        task=TASKS[config.task](Acquisition(**config.acquisition), Augment(**config.augment)),
        normalisation=config.normalise,
        loss=losses.weighted_sum(config.loss),
        optimizer=optimizers.make_optimizer(config),
        learning_rate=optimizers.make_schedule(config),
        seed=config.seed,
        grad_accumulation_steps=config.grad_accumulation_steps,
        ema=config.ema,
    )


def initial_state(config: ConfigDict, recipe: Recipe) -> TrainState:
    """Draw the state that training starts from; a pure function, whose parameters do not depend on the image size."""
    side = max(smallest_side(config)[0], 16)
    return steps.init_state(recipe, (side, side), channels=1 + 2 * config.data.adjacent_slices)


def abstract_state(config: ConfigDict, recipe: Recipe) -> TrainState:
    """Return shapes and shardings of `initial_state`, without computing any of it."""
    shapes = jax.eval_shape(functools.partial(initial_state, config, recipe))
    return sharding.abstract_state(shapes, recipe.mesh)


def mesh_shape(config: ConfigDict, devices: int) -> tuple[int, int, int]:
    """Fill in the 0 of config.mesh.

    Raises:
      UserError: it does not multiply to the number of devices, or a batch does not split evenly.
    """
    mesh = list(config.mesh)
    rest = math.prod(n for n in mesh if n)
    if 0 in mesh and devices % rest == 0:
        mesh[mesh.index(0)] = devices // rest
    if math.prod(mesh) != devices:
        raise UserError(f"config.mesh is {tuple(config.mesh)}, expected numbers that multiply to the {devices} devices")
    data, model, spatial = mesh
    accumulation = config.grad_accumulation_steps
    if config.batch_size % (data * model * accumulation):
        shards = f"the {data * model} devices it is split over" if data * model > 1 else ""
        parts = f"config.grad_accumulation_steps = {accumulation}" if accumulation > 1 else ""
        raise UserError(
            f"config.batch_size is {config.batch_size}, expected a multiple of "
            + " times ".join(filter(None, (shards, parts)))
        )
    return data, model, spatial


def smallest_side(config: ConfigDict) -> tuple[int, str]:
    """Return the least height or width that the network takes, and the field it depends on."""
    depths = sorted({"levels", "sens_levels"} & set(models.attribute_names(config.model.name)))
    field = max(depths, key=config.model.get, default="levels")
    return models.MODELS[config.model.name].smallest_side(config.model[field]), field


def check_sizes(config: ConfigDict, sizes: Iterable[tuple[int, int]], spatial: int = 1) -> None:
    """Raise a `UserError` for a size that is too small for the network or the metrics, or whose rows cannot be split.

    Args:
      config: of the run.
      sizes: (height, width) of the files, which count unless config.data.image_size is set.
      spatial: devices over which the mesh splits the rows.
    """
    size = tuple(config.data.image_size)
    least, field = smallest_side(config)
    for height, width in [size] if size else sorted(sizes):
        found = f"config.data.image_size is {size}" if size else f"the files hold slices of {height}x{width}"
        way_out = "" if size else ", or config.data.image_size for all"
        if min(height, width) < max(least, metrics.WINDOW):
            raise UserError(
                f"{found}, expected at least {max(least, metrics.WINDOW)} a side for config.model.{field} = "
                f"{config.model[field]}; lower the levels or enlarge the images{way_out}"
            )
        if height % spatial:
            raise UserError(
                f"{found}, expected a height that is a multiple of {spatial}, over which config.mesh splits the rows"
                f"{way_out}"
            )


def prepare_data(config: ConfigDict) -> tuple[ConfigDict, list[Volume], list[Volume]]:
    """Find and check the files, make the demo data if no data are named, and settle the image size.

    Returns:
      The config with data.dir filled in, and data.image_size if the files have one; the training volumes and the
      validation volumes.
    """
    config = config.copy_and_resolve_references()
    if not (config.data.dir or config.data.train):
        config.data.dir = make_demo_data(config.task)
    started = time.perf_counter()
    train_set, val_set = (load_volumes(config, splits.find_split(config.data, split)) for split in ("train", "val"))
    logger.info("checked %d files in %.1f s", len(train_set) + len(val_set), time.perf_counter() - started)
    sizes = {volume.data_shape for volume in train_set + val_set}
    if not config.data.image_size and len(sizes) == 1:
        config.data.image_size = sizes.pop()
    return config, train_set, val_set


def load_volumes(config: ConfigDict, paths: list[str]) -> list[Volume]:
    """Describe and check the files of a split, as the config asks for.

    Raises:
      UserError: a faulty file, or none left.
    """
    volumes = splits.describe_split(
        paths,
        config.task,
        on_bad_file=config.data.on_bad_file,
        read_samples=config.data.check == "samples",
        mask=config.acquisition.mask,
    )
    if config.normalise == "volume":
        splits.require_maximum(volumes)
    return volumes


def make_demo_data(task: str) -> str:
    """Make the demo data for a task unless they are there, and return their folder."""
    repeated = task in splits.REPETITION_TASKS
    folder = f"{DEMO}-repeated" if repeated else DEMO
    with processes.first_process_first():
        if jax.process_index() == 0 and not os.path.isdir(folder):
            logger.info("config.data.dir is not set: making the demo data in %s", folder)
            demo.make(folder, demo.REPEATED if repeated else None)
    return folder


def make_datasets(config: ConfigDict, split: str, volumes: list[Volume]) -> Sequence[Dataset]:
    """Sort the slices of volumes by size, one dataset for each, kept in memory if config.data.cache is 'host'."""
    adjacent = config.data.adjacent_slices
    if size := tuple(config.data.image_size):
        datasets = [SliceDataset(volumes, size, config.data.resize, adjacent_slices=adjacent)]
    else:
        datasets = bucket_by_size(volumes, config.data.max_shapes, adjacent)
    logger.info("%s: %s", split, describe_buckets(datasets))
    return [HostCache(dataset) for dataset in datasets] if config.data.cache == "host" else datasets
