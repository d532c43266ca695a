"""The training losses, against scikit-image and NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images
from skimage.metrics import structural_similarity

from mrjax.measures import losses


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make a prediction and a target (2, 24, 20), normalised by subtracting an offset, and the offset."""
    target = np.abs(coil_images(2, 1, 24, 20)[:, 0]) + 0.1
    prediction = target + 0.05 * np.random.default_rng(0).normal(size=target.shape).astype(np.float32)
    offset = np.full((2, 1, 1), 0.1, np.float32)
    return prediction - offset, target - offset, offset


def test_each_loss_is_its_definition_and_the_sum_is_weighted() -> None:
    prediction, target, offset = images()
    similar = [
        structural_similarity(t + 0.1, p + 0.1, data_range=float(t.max()) + 0.1)
        for t, p in zip(target.astype(np.float64), prediction.astype(np.float64), strict=True)
    ]
    difference = prediction.astype(np.float64) - target
    expected = {"mse": np.mean(difference**2), "l1": np.mean(np.abs(difference)), "ssim": 1 - np.mean(similar)}
    for name, value in expected.items():
        loss = losses.weighted_sum({"mse": 0.0, "l1": 0.0, "ssim": 0.0} | {name: 1.0})
        assert float(jax.jit(loss)(prediction, target, offset)) == pytest.approx(value, rel=1e-4), name
    mixed = jax.jit(losses.weighted_sum({"mse": 0.5, "l1": 2.0, "ssim": 0.1}))(prediction, target, offset)
    assert float(mixed) == pytest.approx(0.5 * expected["mse"] + 2 * expected["l1"] + 0.1 * expected["ssim"], rel=1e-4)


def test_the_gradient_of_ssim_is_finite_where_images_are_flat() -> None:
    loss = losses.weighted_sum({"ssim": 1.0})
    flat = jnp.zeros((1, 16, 16))
    gradient = jax.jit(jax.grad(loss))(flat, flat.at[0, 8, 8].set(1.0), jnp.zeros((1, 1, 1)))
    assert np.isfinite(gradient).all()


def test_a_loss_is_added_by_one_entry(monkeypatch) -> None:
    monkeypatch.setitem(losses.LOSSES, "bias", lambda prediction, target, offset: jnp.mean(prediction - target))
    loss = losses.weighted_sum({"bias": 2.0, "mse": 0.0})
    assert float(loss(jnp.full((1, 8, 8), 3.0), jnp.ones((1, 8, 8)), jnp.zeros((1, 1, 1)))) == pytest.approx(4.0)
