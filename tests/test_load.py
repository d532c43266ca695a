"""Two lines of Python: `mrjax.load`, and a network called with arrays."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace, write_volume

from mrjax import load
from mrjax.data import checks
from mrjax.errors import UserError
from mrjax.inference import Inference
from mrjax.io import readers

COLUMNS = np.arange(40) % 2 == 0
COLUMNS[14:26] = True


@pytest.fixture(scope="module")
def reconstruct(trained: Path) -> Inference:
    return load(trained)


@pytest.fixture(scope="module")
def for_images(reconstruct: Inference) -> Inference:
    """The same network for the task 'paired', at 32 x 32 pixels."""
    config = reconstruct.config.copy_and_resolve_references()
    config.task, config.data.image_size = "paired", (32, 32)
    recipe = dataclasses.replace(reconstruct.recipe, grid=None)
    return Inference._compile(config, reconstruct.source, {}, reconstruct.params, recipe)


def of_file(inference: Inference, path: Path, layout: str) -> np.ndarray:
    volume, faults = checks.check(readers.describe(str(path), layout))
    assert faults == []
    return inference.reconstruct(volume)["reconstruction"]


def test_the_package_is_imported_without_jax() -> None:
    code = "import sys, mrjax; assert callable(mrjax.load); assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arrays_give_what_a_file_with_them_gives(reconstruct: Inference, tmp_path: Path) -> None:
    kspace, samples = to_kspace(coil_images(3, 2, 32, 40)), np.random.default_rng(0).random((3, 32, 40)) < 0.5
    samples[:, 10:22, 14:26] = True
    for name, mask in {"columns": COLUMNS, "samples": samples[0], "of_each_slice": samples}.items():
        path = write_volume(tmp_path / f"{name}.t5", {"kspace": kspace, "mask": mask})
        expected = of_file(reconstruct, path, "kspace")
        for found in (reconstruct(kspace, mask), reconstruct(kspace * (mask[:, None] if mask.ndim == 3 else mask))):
            assert (found.shape, found.dtype) == ((3, 32, 40), np.float32), name
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * expected.max(), err_msg=name)
    image = reconstruct(jnp.asarray(kspace[1]), jnp.asarray(samples[1]))
    assert (type(image), image.shape) == (np.ndarray, (32, 40))
    np.testing.assert_allclose(image, expected[1], rtol=0, atol=1e-6 * expected.max())


def test_a_shape_is_compiled_once_and_units_and_fully_sampled_data_are_kept(reconstruct: Inference) -> None:
    kspace = to_kspace(coil_images(9, 2, 32, 40))
    images, compiled = reconstruct(kspace), reconstruct.predict_measured._cache_size()
    assert images.shape == (9, 32, 40)  # two batches
    np.testing.assert_allclose(reconstruct(1000 * kspace), 1000 * images, rtol=0, atol=1e-3 * images.max())
    assert reconstruct.predict_measured._cache_size() == compiled
    truth = rss(coil_images(9, 2, 32, 40))
    assert np.linalg.norm(images - truth) < 0.02 * np.linalg.norm(truth)


def test_paired_images_are_improved_as_those_of_a_file(for_images: Inference, tmp_path: Path) -> None:
    images = rss(coil_images(2, 1, 50, 30))
    expected = of_file(for_images, write_volume(tmp_path / "x.t5", {"input": images}), "paired")
    np.testing.assert_allclose(for_images(images), expected, rtol=0, atol=1e-6 * expected.max())
    np.testing.assert_allclose(for_images(images[0]), expected[0], rtol=0, atol=1e-6 * expected.max())


def test_metrics_are_those_of_the_step_that_is_loaded(reconstruct: Inference, trained: Path, tmp_path: Path) -> None:
    best = json.loads((trained / "checkpoints" / "best.json").read_text())
    assert reconstruct.metrics["validation"] == {"ssim": best["ssim"]}
    summary = {"all": {"reconstruction": {"ssim": {"mean": 0.5, "std": 0.1}}}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(trained / "checkpoints")
    for step, found in ((best["step"], summary), (best["step"] + 1, None)):
        (tmp_path / "run" / "metrics.json").write_text(json.dumps({"step": step, "summary": summary, "volumes": []}))
        assert load(tmp_path / "run").metrics.get("test") == found


@pytest.mark.parametrize(
    ("shape", "dtype", "mask", "message"),
    [
        (
            (32, 32),
            "c8",
            None,
            r"the k-space has shape \(32, 32\), expected \(coils, height, width\) or .*kspace\[None\]",
        ),
        ((2, 32, 32), "f4", None, "the k-space is float32, expected complex numbers"),
        ((2, 32, 32), "c8", np.ones(32), "the mask is float64, expected bool"),
        ((2, 32, 32), "c8", np.ones(31, bool), r"the mask has shape \(31,\), expected \(32,\)"),
        ((2, 32, 32), "c8", np.zeros(32, bool), "the mask keeps no sample"),
        ((2, 4, 4), "c8", None, "slices of 4x4, expected at least 8 a side"),
    ],
)
def test_arrays_that_do_not_fit_are_one_sentence(reconstruct, shape, dtype, mask, message) -> None:
    with pytest.raises(UserError, match=message):
        reconstruct(np.ones(shape, dtype), mask)


def test_values_that_are_not_finite_and_a_maximum_that_is_missing_are_one_sentence(reconstruct, for_images) -> None:
    with pytest.raises(UserError, match="the k-space holds nan, expected finite numbers"):
        reconstruct(np.full((2, 32, 32), np.nan, np.complex64))
    with pytest.raises(UserError, match="a mask is given to a network for images, expected none"):
        for_images(np.ones((32, 32)), np.ones(32, bool))
    config = for_images.config.copy_and_resolve_references()
    config.normalise = "volume"
    with pytest.raises(UserError, match="maximum is None, expected that of the volume"):
        dataclasses.replace(for_images, config=config)(np.ones((32, 32)))
