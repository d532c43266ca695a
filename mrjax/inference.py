"""A checkpoint, or a method that needs none, applied to volumes: at each file's own grid and in its units."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jax.sharding import Mesh
from jax.stages import Wrapped
from ml_collections import ConfigDict, config_flags

from mrjax import config as configs
from mrjax import train_step
from mrjax.baselines import METHODS as BASELINES
from mrjax.checkpoint import store
from mrjax.data import loader, resize, splits
from mrjax.data.dataset import SliceDataset
from mrjax.errors import expect
from mrjax.experiment import abstract_state, make_recipe
from mrjax.io import readers
from mrjax.io.volume import Volume
from mrjax.measures.evaluator import METHODS
from mrjax.mri.fourier import magnitude_host
from mrjax.mri.grid import Grid
from mrjax.mri.tasks import as_measured
from mrjax.parallel import sharding
from mrjax.report.html import Report
from mrjax.report.run_log import read_rows
from mrjax.train_step import Recipe

_INPUTS = {"kspace": "zero-filled", "paired": "input", "denoise": "one scan", "noise2noise": "one scan"}
_LABELS = {"unet": "U-Net", "unet_dc": "U-Net + DC", "varnet": "VarNet"}
_LABELS |= {"zero_filled": "zero-filled", "sense": "SENSE", "cs": "compressed sensing"}


@dataclasses.dataclass(frozen=True)
class Inference:
    """A checkpoint, or a method of `baselines.METHODS`, ready for use."""

    config: ConfigDict  # of the run that made the checkpoint; or how files are undersampled
    source: dict[str, Any]  # {"step": of the checkpoint} or {"method": name}
    mesh: Mesh
    params: Any  # the network's, or their average where the run kept one; a method has none
    predict: Wrapped  # `train_step.predict` of (params, batch), which simulates the task's corruption
    predict_measured: Wrapped  # the same for files that are corrupted already

    @classmethod
    def restore(cls, workdir: str, data_consistency: bool = True) -> "Inference":
        """Restore the best checkpoint of a run on all devices; `UserError` if there is none, or it is damaged.

        Files are reconstructed on their own grid (`mri.grid`); with `data_consistency`, reconstructions of undersampled
        k-space keep the samples that were measured.
        """
        mesh = sharding.make_mesh()
        config, progress, params = store.restore_best(
            workdir, lambda config: abstract_state(config, make_recipe(config, mesh))
        )
        recipe = make_recipe(config, mesh)
        if config.task != "paired":
            keep = data_consistency and config.task not in splits.REPETITION_TASKS
            recipe = dataclasses.replace(recipe, grid=Grid(tuple(config.data.image_size), config.data.resize, keep))
        return cls._compile(config, {"step": progress["step"]}, params, recipe)

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
        return cls._compile(config, {"method": name}, {}, recipe)

    @classmethod
    def _compile(cls, config: ConfigDict, source: dict[str, Any], params: Any, recipe: Recipe) -> "Inference":
        predict_measured = train_step.jit_predict(dataclasses.replace(recipe, task=as_measured))
        return cls(config, source, recipe.mesh, params, train_step.jit_predict(recipe), predict_measured)

    @property
    def labels(self) -> tuple[str, str]:
        """The names of input and reconstruction in tables."""
        name = self.source.get("method") or self.config.model.name
        return _INPUTS.get(self.config.task, "corrupted"), _LABELS.get(name, name)

    def reconstruct(self, volume: Volume) -> dict[str, np.ndarray]:
        """Reconstruct all slices of a volume.

        Fully sampled k-space is undersampled as in training first; undersampled k-space is taken as it is. Returns
        corrupted, reconstruction and, where it is known, target: (slices, height, width) float32 on the file's own grid
        and in its units.
        """
        simulated = volume.layout == "kspace" and not volume.undersampled
        if self.config.task in splits.REPETITION_TASKS:
            simulated = bool(volume.repetitions)
        undo = resize.undo_resize_image if volume.layout == "paired" else resize.crop_or_pad
        images = self._predict_slices(volume, simulated)
        images = {name: undo(image, volume.image_shape) for name, image in images.items()}
        target = self._read_target(volume, simulated)
        return images if target is None else images | {"target": target}

    def _predict_slices(self, volume: Volume, simulated: bool) -> dict[str, np.ndarray]:
        """Return the corrupted images and the reconstructions: of k-space on the file's grid, else at the network's."""
        data, mesh = self.config.data, self.mesh
        size = volume.data_shape
        if volume.layout == "paired":
            size = tuple(data.image_size) or size
        predict = self.predict if simulated else self.predict_measured
        # One batch size for files of any length: the network is compiled once.
        batch_size = -(-min(self.config.batch_size, 8) // mesh.size) * mesh.size
        volume = dataclasses.replace(volume, empty=())
        slices = SliceDataset([volume], size, data.resize, adjacent_slices=data.adjacent_slices)
        images = {name: np.zeros((volume.slices, *size), np.float32) for name in METHODS}
        with loader.evaluation_batches([slices], loader.LoaderOptions(batch_size)) as batches:
            for batch in sharding.to_devices(batches, mesh):
                predicted, _ = predict(self.params, batch)
                number = sharding.on_host(batch["slice"], mesh)
                for name, image in images.items():
                    image[number] = sharding.on_host(predicted[name], mesh)
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
