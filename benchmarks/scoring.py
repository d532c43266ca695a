"""Score reconstructions of volumes, for the benchmarks of quality."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mrjax import train_step
from mrjax.config import defaults
from mrjax.data import loader, splits
from mrjax.data.dataset import SliceDataset
from mrjax.io import readers
from mrjax.io.volume import Volume
from mrjax.measures import evaluator
from mrjax.parallel import sharding
from mrjax.train_step import Recipe

# A batch to (corrupted, reconstruction and target, peak of each target).
Predict = Callable[[dict[str, jax.Array]], tuple[dict[str, jax.Array], jax.Array]]


def find_volumes(folder: Path, task: str) -> list[Volume]:
    """Read and check every file of a folder."""
    config = defaults()
    config.task = task
    return splits.describe_split(config, readers.find(str(folder)))


def jit_predict(recipe: Recipe, params: Any) -> Predict:
    """Return the jitted step of inference, which corrupts a batch by the recipe's task and applies its network."""
    return functools.partial(train_step.jit_predict(recipe), params)


def score_volumes(
    predict: Predict, volumes: list[Volume], size: int, batch_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score volumes as `mrjax.evaluate` does.

    Returns:
      Mean metrics over the volumes of the corrupted images and of the reconstructions; and images of the first volumes'
      middle slices.
    """
    mesh = sharding.make_mesh()
    slices = SliceDataset(volumes, (size, size))
    with loader.evaluation_batches([slices], loader.LoaderOptions(batch_size)) as batches:
        rows, previews = evaluator.evaluate(predict, batches, volumes, mesh)
    return evaluator.summarise(rows)["all"], previews


def use_flips_only(config: ConfigDict) -> None:
    """Augment by flips only: a few hundred steps are too few to learn from resampled images."""
    for name in ("rotation_p", "scale_p", "anisotropy_p", "translation_p"):
        config.augment[name] = 0.0
