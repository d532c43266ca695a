"""A checkpoint, or a method that needs none, applied to files and arrays: at their own grid and in their units."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jax.stages import Wrapped
from ml_collections import ConfigDict, config_flags
from numpy.typing import ArrayLike

from mrjax import config as configs
from mrjax import train_step
from mrjax.baselines import METHODS as BASELINES
from mrjax.checkpoint import store
from mrjax.data import arrays, loader, resize, splits
from mrjax.data.buffers import Batch
from mrjax.data.dataset import SliceDataset
from mrjax.errors import expect
from mrjax.experiment import abstract_state, check_sizes, make_recipe
from mrjax.export import folder
from mrjax.io import readers
from mrjax.io.volume import Volume
from mrjax.measures.evaluator import INPUT_LABELS, METHODS
from mrjax.models.cross_validation import cross_validated
from mrjax.mri.fourier import magnitude_host
from mrjax.mri.grid import Grid
from mrjax.mri.tasks import as_measured
from mrjax.parallel import sharding
from mrjax.report.html import Report
from mrjax.report.run_log import read_rows
from mrjax.train_step import Recipe

_LABELS = {"unet": "U-Net", "unet_dc": "U-Net + DC", "varnet": "VarNet"}
_OVERSAMPLED = 1.9  # rows over those of the image, from which on a readout is taken for oversampled twofold
_LABELS |= {"zero_filled": "zero-filled", "sense": "SENSE", "cs": "compressed sensing"}


@dataclasses.dataclass(frozen=True)
class Inference:
    """A network, or a method of `baselines.METHODS`, ready for use: called with arrays, or applied to files."""

    config: ConfigDict  # of the run that made the checkpoint; or how files are undersampled
    source: dict[str, Any]  # {"step": of the checkpoint} or {"method": name}
    metrics: dict[str, Any]  # of this step where they were measured, see `export.folder.read_metrics`
    recipe: Recipe
    params: Any  # the network's, or their average where the run kept one; a method has none
    predict: Wrapped  # `train_step.predict` of (params, batch), which simulates the task's corruption
    predict_measured: Wrapped  # the same for files that are corrupted already

    @classmethod
    def restore(cls, workdir: str, data_consistency: bool = True) -> "Inference":
        """Restore the best checkpoint of a run on all devices; `UserError` if there is none, or it is damaged.

        `workdir` may be a folder that `mrjax.export` has written. Files are reconstructed on their own grid
        (`mri.grid`); with `data_consistency`, reconstructions of undersampled k-space keep the samples that were
        measured.
        """
        mesh = sharding.make_mesh()
        restore = folder.read if folder.is_model(workdir) else store.restore_best
        config, progress, params = restore(workdir, lambda config: abstract_state(config, make_recipe(config, mesh)))
        recipe = make_recipe(config, mesh)
        if config.task != "paired":
            keep = data_consistency and config.task not in splits.REPETITION_TASKS
            model = cross_validated(recipe.model) if keep else recipe.model
            grid = Grid(tuple(config.data.image_size), config.data.resize, keep, model is not recipe.model)
            recipe = dataclasses.replace(recipe, grid=grid, model=model)
        step = progress["step"]
        return cls._compile(config, {"step": step}, folder.read_metrics(workdir, step), params, recipe)

    @classmethod
    def from_method(cls, name: str, config: ConfigDict, weight: float | None = None) -> "Inference":
        """Take a method of `baselines.METHODS` in the place of a network, with a weight of its own if one is given.

        The config says how fully sampled files are undersampled. Raises a `UserError` if it is of images, not k-space.
        """
        configs.check(config)
        expect(config.task != "paired", f"--method={name} with config.task = 'paired'", "a task on k-space")
        expect(weight is None or name != "zero_filled", "--weight is given with --method=zero_filled", "sense or cs")
        config = config.copy_and_resolve_references()
        # One slice a device at a time: ESPIRiT's projections are coils^2 images.
        config.batch_size, config.normalise, config.data.adjacent_slices = 1, "slice", 0
        model = BASELINES[name]() if weight is None else BASELINES[name](weight=weight)
        recipe = dataclasses.replace(make_recipe(config, sharding.make_mesh()), model=model)
        return cls._compile(config, {"method": name}, {}, {}, recipe)

    @classmethod
    def _compile(
        cls, config: ConfigDict, source: dict[str, Any], metrics: dict[str, Any], params: Any, recipe: Recipe
    ) -> "Inference":
        predict_measured = train_step.jit_predict(dataclasses.replace(recipe, task=as_measured))
        return cls(config, source, metrics, recipe, params, train_step.jit_predict(recipe), predict_measured)

    def __call__(self, data: ArrayLike, mask: ArrayLike | None = None, *, maximum: float | None = None) -> np.ndarray:
        """Reconstruct k-space as it was measured, or, with a network for the task 'paired', improve images.

        `data`, of NumPy or JAX, is k-space (coils, height, width) or (slices, coils, height, width) complex, its zero
        frequency at index n // 2 of each axis; that of one coil is `kspace[None]`. `mask` is bool, (width,), (height,
        width) or either with an axis of slices before it, and says what was measured; without it, what is not zero was:
        fully sampled k-space is taken as it is. For 'paired', `data` is (height, width) or (slices, height, width).

        Returns magnitude images, (height, width) or (slices, height, width) float32, in the units of `data` on its own
        grid: what `mrjax.reconstruct` makes of a file with the same data. Compiled once for each shape; slices are
        worked through in batches. `maximum`, of the volume's image, is for config.normalise = 'volume', and needed
        there. Raises a `UserError` for arrays of another shape or dtype, NaN or Inf.
        """
        config, paired = self.config, self.config.task == "paired"
        expect(mask is None or not paired, "a mask is given to a network for images", "none")
        stack = arrays.stack_images(data) if paired else arrays.stack_kspace(data, mask)
        size, alone = stack.shape[-2:], np.ndim(data) == (2 if paired else 3)
        check_sizes(config, [size])
        if config.normalise == "volume":
            found = f"maximum is {maximum}"
            expect(maximum and 0 < maximum < np.inf, found, "that of the volume, for config.normalise = 'volume'")
        if paired:
            stack = resize.resize_image(stack, tuple(config.data.image_size) or size)
        name, adjacent = "input" if paired else "kspace", config.data.adjacent_slices
        batches = arrays.batches(name, stack, self._batch_size(len(stack)), adjacent, maximum or 0)
        image = self._predict_batches(self.predict_measured, batches, (len(stack), *stack.shape[-2:]))["reconstruction"]
        image = resize.undo_resize_image(image, size) if paired else image
        return image[0] if alone else image

    def export(
        self, path: str | os.PathLike[str], size: tuple[int, int] | None = None, coils: int = folder.COILS
    ) -> None:
        """Write the network to a new folder, to hand it on: what `python -m mrjax.export` writes, see there."""
        expect("step" in self.source, f"{self.source} has no parameters", "a network to export")
        model = folder.Model(self.config, self.source["step"], self.metrics, self.recipe, self.params)
        folder.write(path, model, size, coils)

    def _batch_size(self, slices: int) -> int:
        """Return how many of so many slices are reconstructed at once: a multiple of the devices."""
        devices, grid = self.recipe.mesh.size, self.recipe.grid
        most = 4 if grid and grid.kept_by_network else 8  # a cross-validated network works on each slice twice
        return -(-min(self.config.batch_size, most, slices) // devices) * devices

    @property
    def labels(self) -> tuple[str, str]:
        """The names of input and reconstruction in tables."""
        name = self.source.get("method") or self.config.model.name
        return INPUT_LABELS.get(self.config.task, "corrupted"), _LABELS.get(name, name)

    def reconstruct(self, volume: Volume) -> dict[str, np.ndarray]:
        """Reconstruct all slices of a volume.

        Fully sampled k-space is undersampled as in training first; undersampled k-space is taken as it is. Returns
        corrupted, reconstruction and, where it is known, target: (slices, height, width) float32 on the file's own grid
        and in its units. Where oversampled readouts are cropped for training (config.data.resize = 'image') and no
        target nor affine tells the size of the image, images are cropped as there.
        """
        simulated = volume.layout == "kspace" and not volume.undersampled
        if self.config.task in splits.REPETITION_TASKS:
            simulated = bool(volume.repetitions)
        undo = resize.undo_resize_image if volume.layout == "paired" else resize.crop_or_pad
        images = self._predict_slices(volume, simulated)
        shape, data = volume.image_shape, self.config.data
        known = not volume.undersampled or volume.target or volume.affine is not None
        if data.resize == "image" and data.image_size and shape[0] >= _OVERSAMPLED * data.image_size[0] and not known:
            shape = tuple(np.minimum(shape, data.image_size))
        images = {name: undo(image, shape) for name, image in images.items()}
        target = self._read_target(volume, simulated)
        return images if target is None else images | {"target": target}

    def _predict_slices(self, volume: Volume, simulated: bool) -> dict[str, np.ndarray]:
        """Return the corrupted images and the reconstructions: of k-space on the file's grid, else at the network's."""
        data, size = self.config.data, volume.data_shape
        if volume.layout == "paired":
            size = tuple(data.image_size) or size
        predict = self.predict if simulated else self.predict_measured
        # One batch size for files of any length: the network is compiled once.
        batch_size = self._batch_size(8)
        volume = dataclasses.replace(volume, empty=())
        slices = SliceDataset([volume], size, data.resize, adjacent_slices=data.adjacent_slices)
        with loader.evaluation_batches([slices], loader.LoaderOptions(batch_size)) as batches:
            return self._predict_batches(predict, batches, (volume.slices, *size))

    def _predict_batches(
        self, predict: Wrapped, batches: Iterator[Batch], shape: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """Return the corrupted images and the reconstructions of all slices, (slices, height, width) float32."""
        images = {name: np.zeros(shape, np.float32) for name in METHODS}
        for batch in sharding.to_devices(batches, self.recipe.mesh):
            predicted, _ = predict(self.params, batch)
            number = sharding.on_host(batch["slice"], self.recipe.mesh)
            for name, image in images.items():
                image[number] = sharding.on_host(predicted[name], self.recipe.mesh)
        return images

    def _read_target(self, volume: Volume, simulated: bool) -> np.ndarray | None:
        """Return the file's own target at its own size, not what is left of it at the network's; None if unknown."""
        if simulated:
            scans = [
                [
                    magnitude_host(kspace.reshape(volume.shape[1:]))
                    for kspace in readers.iterate_slices(path, volume.data, volume.slices)
                ]
                for path in volume.repetitions or [volume.path]
            ]
            return resize.crop_or_pad(np.mean(scans, 0), volume.image_shape)
        # For a task on repetitions, the image of this very scan would be a target with the noise of the input.
        if volume.target and self.config.task not in splits.REPETITION_TASKS:
            return np.abs(readers.read_slices(volume.path, volume.target, volume.slices)).astype(np.float32)
        return None


def define_flags() -> None:
    """Define the flags that `from_flags` reads."""
    flags.DEFINE_string("workdir", None, "of a run of mrjax.main")
    flags.DEFINE_enum("method", None, list(BASELINES), "in the place of a network; with --workdir by the run's config")
    flags.DEFINE_float("weight", None, "of --method=cs or sense, instead of the one chosen by the noise", 0)
    flags.DEFINE_bool("data_consistency", True, "whether a network's reconstruction keeps the measured samples")
    config_flags.DEFINE_config_file("config", None, "for --method without --workdir, instead of the defaults")


def from_flags() -> Inference:
    """Restore the checkpoint of --workdir, or take --method; a `UserError` for flags that do not fit one another."""
    values = flags.FLAGS
    workdir, method, config = values.workdir, values.method, values.config
    expect(workdir or method, "neither --workdir nor --method is given", "a run of mrjax.main, or a method")
    expect(method or values.weight is None, "--weight is given without --method", "the method it is for")
    expect(not (workdir and config), "--config is given beside --workdir", "one of them: a run has a config")
    if not method:
        return Inference.restore(workdir, values.data_consistency)
    if workdir:
        config = Inference.restore(workdir).config
    return Inference.from_method(method, config or configs.defaults(), values.weight)


def write_report(report: Report, path: Path, inference: Inference, data: str) -> None:
    """Write the report of what the flags asked for, on `data`; with the learning curves of a run of --workdir."""
    workdir, weight, data_consistency = (flags.FLAGS[name].value for name in ("workdir", "weight", "data_consistency"))
    config, step, label = inference.config, inference.source.get("step"), inference.labels[1]
    facts = {"data": data, "method": label if step is None else f"{label}, step {step} of {workdir}"}
    if weight is not None:
        facts["method"] += f", weight {weight:g}"
    if config.task != "paired":
        acquisition = config.acquisition
        drawn = zip(acquisition.accelerations, acquisition.centre_fractions, strict=True)
        rates = " or ".join(f"{rate:g}x with {100 * centre:g} % in the centre" for rate, centre in drawn)
        stored = acquisition.mask == "stored"
        facts["undersampling"] = "by each file's own mask" if stored else f"{acquisition.mask}, {rates}"
        facts["undersampling"] += "; of k-space that is undersampled already, as it was measured"
    if config.task == "kspace" and step is not None:
        facts["data consistency"] = "measured samples are kept" if data_consistency else "none, the network's image"
    values, known = configs.flat(config), configs.flat(configs.defaults())
    fields = {name: (values[name], known[name]) for name in sorted(values)}
    title = f"{label} on {data}" if step is None else f"{label} after {step:,} steps on {data}"
    curves = read_rows(workdir) if workdir and step is not None else []
    report.write(path, title[:1].upper() + title[1:], inference.labels, facts, fields, curves)
