"""Score reconstructions of volumes, for the benchmarks of quality."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mrjax import experiment, train_step
from mrjax.data import hdf5, loader, splits
from mrjax.evaluate import evaluate, summarise
from mrjax.mri.tasks import Task
from mrjax.parallel import sharding

# A batch to (corrupted, reconstruction and target, peak of each target).
Predict = Callable[[dict[str, jax.Array]], tuple[dict[str, jax.Array], jax.Array]]


def find_volumes(folder: Path, task: str) -> list[hdf5.Volume]:
    """Read and check every file of a folder."""
    return splits.volumes(hdf5.find(str(folder)), task=task, on_bad_file="error", read_all=True)


def restore_network(workdir: Path) -> tuple[Any, Any]:
    """Return the network of a run and the parameters of its best checkpoint."""
    mesh = sharding.make_mesh()
    restored = experiment.restore(str(workdir), mesh)
    return experiment.model(restored.config, mesh), restored.params


def jit_predict(model: Any, params: Any, task: Task, normalise: str) -> Predict:
    """Return the jitted step of inference, which corrupts a batch by the task and applies the network."""
    predict = train_step.compile_predict(sharding.make_mesh(), model=model, task=task, normalise_by=normalise)
    return functools.partial(predict, params)


def score_volumes(
    predict: Predict, volumes: list[hdf5.Volume], size: int, batch_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score volumes as `mrjax.evaluate` does.

    Returns:
      Mean metrics over the volumes of the corrupted images and of the reconstructions; and images of the first volumes'
      middle slices.
    """
    mesh = sharding.make_mesh()
    source = loader.Slices(volumes, (size, size), "kspace")

    def predict_without_params(params: Any, batch: dict[str, jax.Array]) -> Any:
        return predict(batch)

    score: Any = train_step.compile_score(mesh)
    with loader.evaluation_batches(source, batch_size=batch_size, workers=0, prefetch=2) as batches:
        rows, previews = evaluate(predict_without_params, score, {}, batches, volumes, mesh)  # type: ignore[arg-type]
    return summarise(rows)["all"], previews


def use_flips_only(config: ConfigDict) -> None:
    """Augment by flips only: a few hundred steps are too few to learn from resampled images."""
    for name in ("rotation_p", "scale_p", "anisotropy_p", "translation_p"):
        config.augment[name] = 0.0
