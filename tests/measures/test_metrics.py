"""The metrics equal fastMRI's `evaluate.py` where float32 is least able to; values of slices combine to them."""

import jax
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from mrjax.errors import UserError
from mrjax.measures import metrics

slice_values = jax.jit(metrics.slice_values)


def volume_metrics(target, prediction):
    return metrics.volume_values(slice_values(target, prediction, target.max()), target.max())


def reference(target, prediction):
    target, prediction = target.astype(np.float64), prediction.astype(np.float64)
    mean_squared_error = np.mean((target - prediction) ** 2)
    similarity = [structural_similarity(t, p, data_range=target.max()) for t, p in zip(target, prediction, strict=True)]
    return {
        "nmse": mean_squared_error / np.mean(target**2),
        "psnr": 10 * np.log10(target.max() ** 2 / mean_squared_error),
        "ssim": np.mean(similarity),
    }


def brain(slices, height, width):
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    z = np.linspace(0.5, 1, slices)[:, None, None]
    return ((x / 0.7) ** 2 + (y / 0.9) ** 2 < z) * (0.6 + 0.3 * np.sin(9 * x * z) * np.cos(7 * y))


def pair(kind, shape):
    rng = np.random.default_rng(0)
    image, noise, other = brain(*shape), rng.standard_normal(shape), rng.random(shape)
    target, prediction = {
        "random": (other, rng.random(shape)),
        "signed": (noise, other),
        "noisy": (image, image + 0.05 * noise),
        "fastMRI's 1e-6": (1e-6 * image, 1e-6 * (image + 0.05 * noise)),
        "1e-8": (1e-8 * image, 1e-8 * (image + 0.05 * noise)),
        "1e4": (1e4 * image, 1e4 * (image + 0.05 * noise)),
        "nearly identical": (1e-6 * image, 1e-6 * image * (1 + 1e-6 * noise)),
        "little contrast": (1 + 0.003 * other, 1 + 0.003 * rng.random(shape)),
        "offset": (1e4 + image, 1e4 + image + 0.05 * noise),
        "small range far below zero": (100 * image - 100, 100 * image - 100 + 0.05 * noise),
        "one bright pixel": (0.01 * image + 50 * (np.arange(np.prod(shape)).reshape(shape) == 40), 0.01 * other),
    }[kind]
    return target.astype(np.float32), prediction.astype(np.float32)


KINDS = (
    *("random", "signed", "noisy", "fastMRI's 1e-6", "1e-8", "1e4", "nearly identical"),
    *("little contrast", "offset", "small range far below zero", "one bright pixel"),
)


def assert_equal(found, expected):
    assert float(found["nmse"]) == pytest.approx(float(expected["nmse"]), rel=1e-5)
    assert float(found["psnr"]) == pytest.approx(float(expected["psnr"]), rel=1e-5)
    assert float(found["ssim"]) == pytest.approx(float(expected["ssim"]), abs=2e-6)


@pytest.mark.parametrize("shape", [(3, 7, 7), (2, 8, 13), (2, 96, 63)])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_scikit_image_in_float64(kind, shape):
    target, prediction = pair(kind, shape)
    assert_equal(volume_metrics(target, prediction), reference(target, prediction))


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_fastmri(kind):
    from fastmri import evaluate

    target, prediction = pair(kind, (2, 64, 51))
    # In float64: fastMRI's own float32 SSIM strays by more than 1e-5.
    expected = {
        n: np.asarray(getattr(evaluate, n)(target.astype(np.float64), prediction.astype(np.float64))).item()
        for n in metrics.METRICS
    }
    assert_equal(volume_metrics(target, prediction), expected)


def test_slice_values_are_float32_whatever_the_dtype_of_the_images():
    target, prediction = pair("noisy", (2, 9, 8))
    values = jax.eval_shape(metrics.slice_values, target.astype(np.float16), prediction, 1.0)
    assert {x.dtype for x in values.values()} == {np.dtype(np.float32)}
    assert {x.shape[0] for x in values.values()} == {2}


def test_slices_of_several_volumes_combine_to_each_volumes_metrics():
    pairs = [pair("noisy", (3, 32, 20)), pair("1e4", (2, 32, 20))]
    targets, predictions = (np.concatenate(side) for side in zip(*pairs, strict=True))
    ranges = np.repeat([t.max() for t, _ in pairs], [3, 2])
    values = slice_values(targets, predictions, ranges)
    for (target, prediction), part in zip(pairs, (slice(3), slice(3, 5)), strict=True):
        found = metrics.volume_values({name: x[part] for name, x in values.items()}, target.max())
        assert_equal(found, reference(target, prediction))


def test_identical_volumes_are_perfect():
    target, _ = pair("noisy", (3, 7, 7))
    assert volume_metrics(target, target) == {"nmse": 0, "psnr": np.inf, "ssim": 1}


def test_a_target_of_zeros_gives_what_the_module_says():
    zeros, other = np.zeros((3, 7, 7), np.float32), np.random.default_rng(0).random((3, 7, 7), np.float32)
    for prediction, expected in ((other, [np.inf, -np.inf, 0]), (zeros, [np.nan] * 3)):
        np.testing.assert_array_equal(list(volume_metrics(zeros, prediction).values()), expected)


def test_a_metric_is_added_by_one_entry(monkeypatch):
    peak_error = metrics.Metric(
        label="peak error",
        decimals=3,
        slice_values=lambda target, prediction, _: abs(target - prediction).max((1, 2)),
        volume_value=lambda values, _: values.max(),
    )
    monkeypatch.setitem(metrics.METRICS, "peak", peak_error)
    target, prediction = pair("noisy", (2, 9, 8))
    values = jax.jit(lambda *images: metrics.slice_values(*images))(target, prediction, target.max())
    values = metrics.volume_values(values, target.max())
    assert values["peak"] == pytest.approx(np.abs(target - prediction).max())


def test_the_gradient_of_ssim_is_finite_on_empty_background():
    target, prediction = pair("noisy", (1, 24, 24))
    gradient_of = jax.jit(jax.grad(lambda p: metrics.ssim_slices(target, p, target.max((1, 2))).mean()))
    gradient = gradient_of(prediction * (target > 0))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    ("target", "prediction", "message"),
    [
        (np.ones((2, 6, 9)), np.ones((2, 6, 9)), "at least 7x7 pixels, found 6x9"),
        (np.ones((2, 9, 9)), np.ones((1, 9, 9)), "one shape"),
        (np.ones((9, 9)), np.ones((9, 9)), "one shape"),
        (np.ones((2, 9, 9)), np.ones((2, 9, 9), np.complex64), "real volumes"),
    ],
)
def test_wrong_images_are_refused_while_tracing(target, prediction, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(metrics.slice_values, target, prediction, 1.0)
