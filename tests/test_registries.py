"""A model, mask, loss, optimizer, metric and file format from outside the package, as docs/extending.md adds them."""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, coil_images, to_kspace
from safetensors.numpy import save_file

from mrjax import train
from mrjax.config import check
from mrjax.inference import Inference
from mrjax.io.readers import READERS
from mrjax.measures.evaluator import score_volume
from mrjax.measures.losses import LOSSES
from mrjax.measures.metrics import METRICS
from mrjax.models import MODELS
from mrjax.mri.masks import MASKS
from mrjax.optimizers import OPTIMIZERS
from mrjax.report.run_log import read_rows

REGISTRIES = (MODELS, MASKS, LOSSES, METRICS, OPTIMIZERS, READERS)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's code, imported; the registries are as before afterwards."""
    page = (ROOT / "docs/extending.md").read_text()
    (tmp_path / "mine.py").write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)))
    monkeypatch.syspath_prepend(tmp_path)
    with contextlib.ExitStack() as stack:
        for registry in REGISTRIES:
            stack.enter_context(mock.patch.dict(registry))
        yield importlib.import_module("mine")
    del sys.modules["mine"]


@pytest.mark.slow
def test_additions_to_every_registry_train_and_evaluate(tmp_path: Path, mine: ModuleType) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        save_file({"kspace": to_kspace(coil_images(3, 2, 32, 24))}, tmp_path / "data" / split / "0.safetensors")
    config = mine.get_config()
    config.data.dir, config.steps, config.log_every = str(tmp_path / "data"), 2, 1
    config.model.channels, config.model.kernel = 5, 5
    check(config)
    train.train(config, str(tmp_path / "run"))
    validated = next(row for row in read_rows(str(tmp_path / "run")) if "val/nmse" in row)
    assert validated["val/mae"] > 0
    inference = Inference.restore(str(tmp_path / "run"))
    assert inference.params["Conv_1"]["kernel"].shape == (5, 5, 5, 1)
    volume = READERS["safetensors"].describe(str(tmp_path / "data" / "val" / "0.safetensors"))
    images = inference.reconstruct(volume)
    target, reconstruction = images["target"], images["reconstruction"]
    assert reconstruction.shape == (3, 32, 24)
    error = np.abs(reconstruction - target).mean() / target.max()
    np.testing.assert_allclose(score_volume(images, volume)["reconstruction"]["mae"], error, rtol=1e-5)
