"""A model, mask, loss, optimizer, metric and file format from outside the package train and evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import coil_images, to_kspace

from mrjax import train
from mrjax.config import check, defaults
from mrjax.inference import Inference
from mrjax.io.readers import READERS
from mrjax.io.storage import NATIVE, Storage
from mrjax.io.volume import Volume, describe_arrays
from mrjax.measures.evaluator import score_volume
from mrjax.measures.losses import LOSSES
from mrjax.measures.metrics import METRICS
from mrjax.models import MODELS
from mrjax.mri.masks import MASKS, Scan
from mrjax.optimizers import OPTIMIZERS
from mrjax.report.run_log import read_rows


class Denoiser(nn.Module):
    """A residual convolution; its attribute `width` becomes config.model.width."""

    width: int = 3
    dtype: Any = jnp.float32
    remat: bool = False

    input_names = ("image",)

    @staticmethod
    def smallest_side(levels: int) -> int:
        return 1

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        return image[..., :1] + nn.Conv(1, (3, 3))(nn.relu(nn.Conv(self.width, (3, 3))(image)))


def odd_columns(key: jax.Array, scan: Scan) -> jax.Array:
    """Measure every second column and the centre."""
    column = jnp.arange(scan.sampled.shape[0])
    return (scan.sampled & ((column % 2 == 1) | (abs(column - column.size // 2) < 2)))[None]


class NpzReader:
    """Volumes in NumPy's .npz."""

    suffixes = (".npz",)
    image_suffix = ".npz"

    def recognises(self, path: str, start: bytes) -> bool:
        return path.endswith(".npz")

    def group(self, paths: list[str]) -> list[str]:
        return paths

    def describe(self, path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
        with np.load(path) as arrays:
            return describe_arrays(path, dict(arrays), {"acquisition": "T2"}, layout, storage)

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        with np.load(path) as arrays:
            return arrays[name][index]

    def write(
        self,
        path: Path,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, Any],
        source: Volume,
        keep_identity: bool = False,
    ) -> None:
        np.savez(path, **arrays)


def test_additions_to_every_registry_train_and_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "denoiser", Denoiser)
    monkeypatch.setitem(MASKS, "odd", odd_columns)
    monkeypatch.setitem(READERS, "npz", NpzReader())
    monkeypatch.setitem(LOSSES, "cubed", lambda prediction, target, offset: jnp.mean(abs(prediction - target) ** 3))
    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda learning_rate, config: optax.sgd(learning_rate))
    monkeypatch.setitem(METRICS, "nmse2", METRICS["nmse"])
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        np.savez(tmp_path / "data" / split / "0.npz", kspace=to_kspace(coil_images(3, 2, 32, 24)))
    config = defaults()
    config.data.dir, config.steps, config.log_every = str(tmp_path / "data"), 2, 1
    config.model.name, config.model.width = "denoiser", 5
    config.acquisition.mask, config.optimizer = "odd", "sgd"
    config.loss.mse, config.loss.cubed = 0.0, 1.0
    check(config)
    train.train(config, str(tmp_path / "run"))
    validated = next(row for row in read_rows(str(tmp_path / "run")) if "val/nmse" in row)
    assert validated["val/nmse2"] == validated["val/nmse"]
    inference = Inference.restore(str(tmp_path / "run"))
    assert inference.params["Conv_1"]["kernel"].shape == (3, 3, 1, 5)
    volume = READERS["npz"].describe(str(tmp_path / "data" / "val" / "0.npz"))
    images = inference.reconstruct(volume)
    assert images["reconstruction"].shape == (3, 32, 24)
    assert score_volume(images, volume)["reconstruction"]["nmse2"] > 0
