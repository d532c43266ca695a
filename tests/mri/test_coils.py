"""Each against NumPy in float64, for one coil and many, with and without empty ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss

from mrjax.mri import coils

COUNTS = (1, 4, 16)
adaptive_maps = jax.jit(coils.adaptive_maps)


def with_noise(count: int, height: int = 20, width: int = 17, level: float = 0.02) -> np.ndarray:
    images = coil_images(1, count, height, width)[0]
    noise = np.random.default_rng(1).normal(size=(2, *images.shape)) * level
    return (images + noise[0] + 1j * noise[1]).astype(np.complex64)


def and_empty(x: np.ndarray) -> np.ndarray:
    """Two empty coils more."""
    return np.concatenate([x, np.zeros_like(x[:1]), np.zeros_like(x[:1])])


@pytest.mark.parametrize("count", COUNTS)
def test_combination_with_the_true_maps_recovers_the_object(count) -> None:
    images = coil_images(1, count, 20, 17)[0]
    body = rss(images)
    maps = np.where(body > 0, images / np.where(body > 0, body, 1), 0)
    assert np.allclose(coils.combine(jnp.asarray(images), jnp.asarray(maps)), body, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_adaptive_maps_are_the_dominant_eigenvectors_of_the_local_covariances(count) -> None:
    images = with_noise(count)
    maps = np.asarray(adaptive_maps(images))
    padded = np.pad(images.astype(np.complex128), ((0, 0), (2, 2), (2, 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (1, 2)).reshape(*images.shape, 25)
    values, vectors = np.linalg.eigh(np.einsum("ihwn,jhwn->hwij", windows, windows.conj()))
    overlap = np.abs(np.einsum("hwi,ihw->hw", vectors[..., -1].conj(), maps))
    distinct = values[..., -2] < 0.8 * values[..., -1] if count > 1 else np.ones(overlap.shape, bool)
    assert distinct.mean() > 0.5
    assert np.allclose(overlap[distinct], 1, atol=1e-4)
    assert np.allclose(rss(maps), 1, atol=1e-5)


def test_coils_of_opposite_sign_have_adaptive_maps() -> None:
    image = coil_images(1, 1, 24, 24)[0, 0]
    maps = np.asarray(adaptive_maps(jnp.asarray(np.stack([image, -image]))))
    inside = np.abs(image) > 0.1
    np.testing.assert_allclose(np.abs(maps[:, inside]), np.sqrt(0.5), atol=1e-4)
    np.testing.assert_allclose(maps[0, inside], -maps[1, inside], atol=1e-4)


def test_adaptive_combination_has_less_noise_in_the_background_than_the_root_sum_of_squares() -> None:
    images = with_noise(16, 40, 40)
    air = rss(coil_images(1, 16, 40, 40)[0]) == 0
    combined = np.abs(coils.combine(jnp.asarray(images), adaptive_maps(jnp.asarray(images))))
    assert combined[air].mean() < 0.8 * rss(images)[air].mean()
    assert np.allclose(combined[~air], rss(images)[~air], rtol=0.1)


def test_the_phase_of_maps_is_smooth_whatever_coil_comes_first() -> None:
    images = coil_images(1, 4, 32, 32)[0]
    maps = np.asarray(adaptive_maps(jnp.asarray(images)))
    turned = np.asarray(adaptive_maps(jnp.asarray(np.roll(images, 1, 0))))
    ratio = (np.roll(turned, -1, 0) * maps.conj()).sum(0)[rss(images) > 0]
    assert np.ptp(np.angle(ratio / ratio[0])) < 1e-3


def test_empty_coils_change_nothing() -> None:
    images = with_noise(4)
    maps, more = adaptive_maps(jnp.asarray(images)), adaptive_maps(jnp.asarray(and_empty(images)))
    assert np.allclose(more[:4], maps, atol=1e-4)
    assert not np.any(more[4:])


def test_nothing_measured_gives_nothing_and_no_nan() -> None:
    nothing = jnp.zeros((3, 9, 8), jnp.complex64)
    assert not np.any(coils.adaptive_maps(nothing))
