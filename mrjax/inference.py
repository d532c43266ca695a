"""A checkpoint applied to volumes: restored from its workdir alone, at each file's own grid and in its units."""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped
from ml_collections import ConfigDict

from mrjax import checkpoint, train_step
from mrjax.data import loader, readers, resize, splits
from mrjax.data.dataset import SliceDataset
from mrjax.data.volume import Volume
from mrjax.experiment import abstract_state, make_recipe
from mrjax.measures.evaluator import METHODS
from mrjax.mri.fourier import magnitude_host
from mrjax.mri.grid import Grid
from mrjax.mri.tasks import as_measured
from mrjax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Inference:
    """A checkpoint ready for use."""

    config: ConfigDict  # of the run that made it, image size included
    progress: dict[str, Any]  # its step and validation scores
    mesh: Mesh
    params: Any  # the network's, or their average where the run kept one
    predict: Wrapped  # `train_step.predict` of (params, batch), which simulates the task's corruption
    predict_measured: Wrapped  # the same for files that are corrupted already

    @classmethod
    def restore(cls, workdir: str, data_consistency: bool = True) -> "Inference":
        """Restore the best checkpoint of a run on all devices; `UserError` if there is none, or it is damaged.

        Files are reconstructed on their own grid (`mri.grid`); with `data_consistency`, reconstructions of undersampled
        k-space keep the samples that were measured.
        """
        mesh = sharding.make_mesh()
        config, progress, params = checkpoint.restore_best(
            workdir, lambda config: abstract_state(config, make_recipe(config, mesh))
        )
        recipe = make_recipe(config, mesh)
        if config.task != "paired":
            keep = data_consistency and config.task not in splits.REPETITION_TASKS
            recipe = dataclasses.replace(recipe, grid=Grid(tuple(config.data.image_size), config.data.resize, keep))
        predict_measured = train_step.jit_predict(dataclasses.replace(recipe, task=as_measured))
        return cls(config, progress, mesh, params, train_step.jit_predict(recipe), predict_measured)

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
                magnitude_host(readers.read_slices(path, volume.data, volume.slices).reshape(volume.shape))
                for path in volume.repetitions or [volume.path]
            ]
            return resize.crop_or_pad(np.mean(scans, 0), volume.image_shape)
        # For a task on repetitions, the image of this very scan would be a target with the noise of the input.
        if volume.target and self.config.task not in splits.REPETITION_TASKS:
            return np.abs(readers.read_slices(volume.path, volume.target, volume.slices)).astype(np.float32)
        return None
