"""Noise: levels, covariances and their estimates, against NumPy in float64 and against what was put in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace
from scipy import stats
from test_acquire import undersample

from mrjax.mri import fourier, noise
from mrjax.mri.acquire import Acquisition

# Hermitian and positive definite; its third coil is far louder than the others.
COVARIANCE = np.array([[2, 0.6 - 0.8j, 0.3j], [0.6 + 0.8j, 1, 0.4], [-0.3j, 0.4, 9]])


def noisy(size: tuple[int, int], sigma: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """K-space of a head with noise of `COVARIANCE` times 2 sigma**2, and the covariance."""
    rng = np.random.default_rng(seed)
    white = (rng.normal(size=(3, *size)) + 1j * rng.normal(size=(3, *size))) / np.sqrt(2)
    scaled = 2 * sigma**2 * COVARIANCE
    mixed = np.einsum("ij,jhw->ihw", np.linalg.cholesky(scaled), white)
    return (to_kspace(coil_images(1, 3, *size)[0]) + mixed).astype(np.complex64), scaled


def test_covariance_from_the_corners_of_kspace_is_that_of_the_noise() -> None:
    kspace, truth = noisy((128, 120), 0.05)
    found = np.asarray(jax.jit(noise.covariance)(jnp.asarray(kspace)))
    np.testing.assert_allclose(found, truth, atol=0.08 * abs(truth).max())
    corner = np.concatenate([kspace[:, a : a + 16, b : b + 15] for a in (0, 112) for b in (0, 105)], -1).reshape(3, -1)
    expected = corner.astype(np.complex128) @ corner.conj().T / corner.shape[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


def test_covariance_ignores_unmeasured_samples_and_empty_coils() -> None:
    kspace, truth = noisy((96, 160), 0.05)
    kspace[:, :, :20], kspace[:, :, 130:], kspace[:, :6] = 0, 0, 0
    found = np.asarray(jax.jit(noise.covariance)(np.pad(kspace, ((0, 2), (0, 0), (0, 0)))))
    np.testing.assert_allclose(found[:3, :3], truth, atol=0.08 * abs(truth).max())
    assert not found[3:].any()
    assert not np.asarray(jax.jit(noise.covariance)(np.zeros((2, 16, 16), np.complex64))).any()


def test_white_noise_is_normal_and_a_coils_own() -> None:
    found = np.asarray(noise.white_noise(jax.random.key(3), (4, 250, 300)))
    for part in (found.real, found.imag):
        assert stats.kstest(part.ravel() * np.sqrt(2), "norm").pvalue > 0.01
        assert np.isfinite(part).all()
        assert 4.5 < abs(part).max() * np.sqrt(2) < 5.5  # the tails of 300,000 numbers are there
    both = np.concatenate([found.real.reshape(4, -1), found.imag.reshape(4, -1)])
    assert abs(np.corrcoef(both) - np.eye(8)).max() < 0.02
    assert abs(np.corrcoef(both[:, 1:].ravel(), both[:, :-1].ravel())[0, 1]) < 0.01
    np.testing.assert_array_equal(noise.white_noise(jax.random.key(3), (2, 250, 300)), found[:2])


def test_correlated_noise_has_the_shape_of_the_covariance() -> None:
    white = noise.white_noise(jax.random.key(0), (3, 200, 200))
    samples = np.asarray(noise.correlate(white, jnp.asarray(COVARIANCE, jnp.complex64)), np.complex128).reshape(3, -1)
    np.testing.assert_allclose(samples @ samples.conj().T / samples.shape[1], COVARIANCE / 4, atol=0.03)
    assert abs((samples @ samples.T) / samples.shape[1]).max() < 0.03  # circular: no preferred phase


def test_zero_or_singular_covariances_leave_finite_noise() -> None:
    white = noise.white_noise(jax.random.key(0), (3, 16, 16))
    np.testing.assert_allclose(noise.correlate(white, jnp.zeros((3, 3), jnp.complex64)), white, rtol=1e-5)
    singular = jnp.asarray(np.pad(np.ones((2, 2)), (0, 1)), jnp.complex64)
    mixed = np.asarray(noise.correlate(white, singular))
    assert np.isfinite(mixed).all()
    np.testing.assert_allclose(mixed[0], mixed[1], atol=0.01)


def acquired(how: Acquisition) -> tuple[np.ndarray, np.ndarray]:
    """Images of the noise that was added to a head with noise of its own, and its truth."""
    kspace = jnp.asarray(noisy((96, 96), 0.1)[0])
    images = fourier.ifft2c(kspace)
    truth = jnp.asarray(rss(np.asarray(images)))
    measured = undersample(kspace, truth, how)
    return np.asarray(fourier.ifft2c(measured) - images), np.asarray(truth, np.float64)


def test_noise_reaches_the_configured_signal_to_noise_ratio() -> None:
    added, truth = acquired(Acquisition((1.0,), (0.5,), (0.0, 0.0), snr=(20.0, 20.0)))
    sigma = np.sqrt((abs(added) ** 2).mean() / 2)
    assert (truth**2).sum() / truth.sum() / sigma == pytest.approx(20, rel=0.02)
    bright = truth > 0.2 * truth.max()
    assert truth[bright].mean() / sigma == pytest.approx(20, rel=0.4)  # close to the mean over tissue


def test_added_noise_has_the_measured_covariance() -> None:
    added, truth = acquired(Acquisition((1.0,), (0.5,), (0.03, 0.03), noise_covariance="measured"))
    found = added.reshape(3, -1) @ added.reshape(3, -1).conj().T / added[0].size
    expected = COVARIANCE / 4 * 2 * (0.03 * truth.max()) ** 2
    np.testing.assert_allclose(found, expected, atol=0.1 * abs(expected).max())
    white, _ = acquired(Acquisition((1.0,), (0.5,), (0.03, 0.03)))
    assert np.sqrt((abs(added) ** 2).mean()) == pytest.approx(np.sqrt((abs(white) ** 2).mean()), rel=0.05)
