"""Each against NumPy in float64, for one coil and many, with and without empty ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace

from mrjax.errors import UserError
from mrjax.mri import coils

COUNTS = (1, 4, 16)


def with_noise(count: int, height: int = 20, width: int = 17, level: float = 0.02) -> np.ndarray:
    images = coil_images(1, count, height, width)[0]
    noise = np.random.default_rng(1).normal(size=(2, *images.shape)) * level
    return (images + noise[0] + 1j * noise[1]).astype(np.complex64)


def and_empty(x: np.ndarray) -> np.ndarray:
    """Two empty coils more."""
    return np.concatenate([x, np.zeros_like(x[:1]), np.zeros_like(x[:1])])


def some_covariance(count: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    mixing = rng.normal(size=(count, count)) + 1j * rng.normal(size=(count, count))
    return mixing @ mixing.conj().T + np.eye(count)


@pytest.mark.parametrize("count", COUNTS)
def test_combination_with_the_true_maps_recovers_the_object(count) -> None:
    images = coil_images(1, count, 20, 17)[0]
    body = rss(images)
    maps = np.where(body > 0, images / np.where(body > 0, body, 1), 0)
    assert np.allclose(coils.combine(jnp.asarray(images), jnp.asarray(maps)), body, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_adaptive_maps_are_the_dominant_eigenvectors_of_the_local_covariances(count) -> None:
    images = with_noise(count)
    maps = np.asarray(jax.jit(coils.adaptive_maps)(images))
    padded = np.pad(images.astype(np.complex128), ((0, 0), (2, 2), (2, 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (1, 2)).reshape(*images.shape, 25)
    values, vectors = np.linalg.eigh(np.einsum("ihwn,jhwn->hwij", windows, windows.conj()))
    overlap = np.abs(np.einsum("hwi,ihw->hw", vectors[..., -1].conj(), maps))
    distinct = values[..., -2] < 0.8 * values[..., -1] if count > 1 else np.ones(overlap.shape, bool)
    assert distinct.mean() > 0.5
    assert np.allclose(overlap[distinct], 1, atol=1e-4)
    assert np.allclose(rss(maps), 1, atol=1e-5)


def test_adaptive_combination_has_less_noise_in_the_background_than_the_root_sum_of_squares() -> None:
    images = with_noise(16, 40, 40)
    air = rss(coil_images(1, 16, 40, 40)[0]) == 0
    combined = np.abs(coils.combine(jnp.asarray(images), coils.adaptive_maps(jnp.asarray(images))))
    assert combined[air].mean() < 0.8 * rss(images)[air].mean()
    assert np.allclose(combined[~air], rss(images)[~air], rtol=0.1)


def test_the_phase_of_maps_is_smooth_whatever_coil_comes_first() -> None:
    images = coil_images(1, 4, 32, 32)[0]
    maps = np.asarray(coils.adaptive_maps(jnp.asarray(images)))
    turned = np.asarray(coils.adaptive_maps(jnp.asarray(np.roll(images, 1, 0))))
    ratio = (np.roll(turned, -1, 0) * maps.conj()).sum(0)[rss(images) > 0]
    assert np.ptp(np.angle(ratio / ratio[0])) < 1e-3


@pytest.mark.parametrize("count", COUNTS)
def test_whitened_noise_has_unit_covariance(count) -> None:
    rng, covariance = np.random.default_rng(3), some_covariance(count)
    white = rng.normal(size=(count, 100, 400)) + 1j * rng.normal(size=(count, 100, 400))
    noise = np.tensordot(np.linalg.cholesky(covariance / 2), white, 1)
    whitened = np.asarray(jax.jit(coils.prewhiten)(noise.astype(np.complex64), covariance.astype(np.complex64)))
    flat = whitened.reshape(count, -1)
    assert np.allclose(flat @ flat.conj().T / flat.shape[1], np.eye(count), atol=0.03)
    exact = np.linalg.solve(np.linalg.cholesky(covariance), noise.reshape(count, -1))
    assert np.allclose(flat, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", COUNTS)
def test_virtual_coils_are_the_principal_components(count) -> None:
    kspace = to_kspace(with_noise(count))
    kept = max(count // 2, 1)
    virtual = np.asarray(jax.jit(coils.compress, static_argnums=1)(kspace, kept)).reshape(kept, -1)
    left, values, _ = np.linalg.svd(kspace.reshape(count, -1).astype(np.complex128), full_matrices=False)
    expected = (left.conj().T @ kspace.reshape(count, -1))[:kept]
    phase = np.exp(1j * np.angle((virtual * expected.conj()).sum(1, keepdims=True)))
    assert np.allclose(virtual, phase * expected, atol=1e-3 * values[0])
    assert np.linalg.norm(virtual) ** 2 == pytest.approx((values[:kept] ** 2).sum(), rel=1e-5)
    everything = coils.compress(jnp.asarray(kspace), count)
    assert np.allclose(rss(np.asarray(everything)), rss(kspace), rtol=1e-4, atol=1e-5)


def test_volumes_share_their_virtual_coils_and_batches_do_not() -> None:
    kspace = np.stack([to_kspace(with_noise(4)), to_kspace(with_noise(4, level=0.2))])
    each = jax.vmap(lambda x: coils.compress(x, 2))(kspace)
    assert np.allclose(rss(np.asarray(each[1])), rss(np.asarray(coils.compress(jnp.asarray(kspace[1]), 2))), atol=1e-4)
    assert coils.compress(jnp.asarray(kspace.swapaxes(0, 1)), 2).shape == (2, 2, 20, 17)


@pytest.mark.parametrize("wanted", [0, 5])
def test_more_virtual_coils_than_there_are_is_an_error(wanted) -> None:
    with pytest.raises(UserError, match=f"found {wanted}, expected 1 to 4"):
        coils.compress(jnp.ones((4, 8, 8), jnp.complex64), wanted)


def test_empty_coils_change_nothing() -> None:
    images, covariance = with_noise(4), some_covariance(4).astype(np.complex64)
    padded = np.pad(covariance, ((0, 2), (0, 2)))
    maps, more = coils.adaptive_maps(jnp.asarray(images)), coils.adaptive_maps(jnp.asarray(and_empty(images)))
    assert np.allclose(more[:4], maps, atol=1e-4)
    assert not np.any(more[4:])
    white, whiter = coils.prewhiten(images, covariance), coils.prewhiten(and_empty(images), padded)
    assert np.allclose(whiter, and_empty(np.asarray(white)), atol=1e-6)
    few, many = coils.compress(jnp.asarray(images), 3), coils.compress(jnp.asarray(and_empty(images)), 6)
    assert np.allclose(np.abs(many[:3]), np.abs(few), atol=1e-4)
    assert np.allclose(many[4:], 0, atol=1e-4)


def test_nothing_measured_gives_nothing_and_no_nan() -> None:
    nothing = jnp.zeros((3, 9, 8), jnp.complex64)
    assert not np.any(coils.adaptive_maps(nothing))
    assert not np.any(coils.compress(nothing, 2))
