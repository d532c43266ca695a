import functools

import jax
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace
from scipy.ndimage import gaussian_filter
from scipy.sparse.linalg import LinearOperator, cg

from mrjax.mri import compressed_sensing, noise, sense
from mrjax.mri.espirit import espirit
from mrjax.mri.fourier import centred_fft2_host, centred_ifft2_host

estimate_sigma = jax.jit(noise.estimate_sigma)


def test_the_solution_equals_numpys_of_the_normal_equations_in_float64() -> None:
    """Every column of F S as a matrix; a mask of samples, and one of columns."""
    height, width, weight = 7, 6, 0.05
    rng, pixels = np.random.default_rng(0), height * width
    maps = (rng.normal(size=(2, 3, height, width)) * [[[[1]]], [[[1j]]]]).sum(0)
    columns = np.fft.fft2(np.fft.ifftshift(maps * np.eye(pixels).reshape(pixels, 1, height, width), (-2, -1)))
    encoding = np.fft.fftshift(columns, (-2, -1)).reshape(pixels, -1).T / np.sqrt(pixels)
    kspace = rng.normal(size=maps.shape) + 1j * rng.normal(size=maps.shape)
    solve = jax.jit(functools.partial(sense.conjugate_gradient, weight=weight, iterations=60))
    for mask in (rng.random((height, width)) < 0.4, np.arange(width)[None] % 2 == 0):
        sampled = encoding[np.broadcast_to(mask, maps.shape).ravel()]
        measured = kspace[np.broadcast_to(mask, maps.shape)]
        normal = sampled.conj().T @ sampled + weight * np.eye(pixels)
        inputs = kspace.astype(np.complex64), mask, maps.astype(np.complex64)
        for prior in (np.zeros((height, width)), rng.normal(size=(height, width))):
            right = sampled.conj().T @ measured + weight * prior.ravel()
            exact = np.linalg.solve(normal, right).reshape(height, width)
            found = solve(*inputs, prior=prior.astype(np.float32))
            assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)


def noisy_scan(coils: int, sigma: float, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undersampled k-space of an image of maximum 1, and its coil images."""
    images, rng = coil_images(1, coils, 48, 48)[0], np.random.default_rng(0)
    images /= rss(images).max()
    noise = sigma * (rng.normal(size=images.shape) + 1j * rng.normal(size=images.shape))
    return ((to_kspace(images) + noise) * mask).astype(np.complex64), images


def poisson_like(share: float = 0.3) -> np.ndarray:
    mask = np.random.default_rng(1).random((48, 48)) < share
    mask[16:32, 16:32] = True
    return mask


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_the_noise_is_found_in_columns_samples_and_beside_empty_coils_and_rows(sigma: float) -> None:
    for mask in (poisson_like(), np.arange(48)[None] % 4 == 0):
        kspace, _ = noisy_scan(4, sigma, mask)
        kspace[:, :2] = 0  # never measured
        padded = np.concatenate([kspace, np.zeros_like(kspace)])
        assert estimate_sigma(padded, np.broadcast_to(mask, (48, 48))) == pytest.approx(sigma, rel=0.15)
    assert estimate_sigma(np.zeros_like(kspace), mask) == 0


@pytest.mark.slow
def test_the_weight_of_the_noise_is_as_good_as_the_best_fixed_one() -> None:
    """Within 1 dB, for a mask of samples, with little noise and with much."""
    mask = poisson_like()
    solvers = {
        "sense": jax.jit(functools.partial(sense.conjugate_gradient, iterations=30)),
        "cs": jax.jit(functools.partial(compressed_sensing.reconstruct, iterations=60)),
    }
    for sigma in (0.01, 0.04):
        kspace, images = noisy_scan(4, sigma, mask)
        target, level = rss(images), estimate_sigma(kspace, mask)
        maps = (images / np.where(target > 0, target, 1)).astype(np.complex64)
        for name, solve in solvers.items():
            wiener, threshold = sense.wiener_weight(kspace, mask, level), compressed_sensing.noise_weight(mask, level)
            chosen = wiener if name == "sense" else threshold
            found = [np.abs(solve(kspace, mask, maps, weight=x)) for x in (chosen, 1e-4, 1e-3, 0.01, 0.1, 1.0)]
            psnr, *fixed = (-10 * np.log10(np.mean((image - target) ** 2)) for image in found)
            assert psnr > max(fixed) - 1 > min(fixed) + 3, (name, sigma, psnr, fixed)


@pytest.mark.slow
def test_noise_does_not_count_as_sensitivity() -> None:
    """ESPIRiT's subspace would hold all of k-space: any maps at all explain the coil images then."""
    kspace, images = noisy_scan(4, 0.1, poisson_like())
    inside = rss(images) > 0.3
    true = images / np.where(inside, rss(images), 1)
    estimate = jax.jit(functools.partial(espirit, kernel=3, crop=0.0))
    for sigma, alike in ((0.0, False), (0.1, True)):
        maps = estimate(kspace, poisson_like(), sigma=sigma)
        assert (np.abs((true.conj() * maps).sum(0))[inside].mean() > 0.95) == alike


@pytest.mark.parametrize("weight", [0.3, 0.01])
def test_a_good_prior_is_corrected_to_1e_6_of_the_solution_in_float64(weight: float) -> None:
    """A program compiled another way gives the same image then: rounding is that of the correction, not of the image.

    Solved for the image itself, pixels are 4e-6 off at the smaller weight; stopped at JAX's tolerance, 3e-4.
    """
    mask = poisson_like()
    kspace, images = noisy_scan(4, 0.001, mask)
    true = rss(images)
    maps = (images / np.where(true > 0, true, 1)).astype(np.complex64)
    prior = gaussian_filter(true, 0.7).astype(np.float32)

    def adjoint(samples: np.ndarray) -> np.ndarray:
        return (maps.conj() * centred_ifft2_host(samples.astype(np.complex128) * mask)).sum(0).ravel()

    def normal(image: np.ndarray) -> np.ndarray:
        return adjoint(centred_fft2_host(maps * image.reshape(48, 48))) + weight * image.ravel()

    operator = LinearOperator((48 * 48,) * 2, matvec=normal, dtype=np.complex128)
    exact, stopped = cg(operator, adjoint(kspace) + weight * prior.ravel(), rtol=1e-12)
    assert stopped == 0
    solve = jax.jit(functools.partial(sense.conjugate_gradient, weight=weight, iterations=150))
    found = solve(kspace, mask, maps, prior=prior)
    assert abs(found.ravel() - exact).max() < 1e-6 * abs(exact).max()


@pytest.mark.parametrize("coils", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_an_image_comes_nearer_to_the_truth_by_what_was_measured_and_a_perfect_one_stays(coils: int) -> None:
    """The less noise there is, the more; without much, measured again it gives the samples, within a few percent."""
    mask, explain = poisson_like(), jax.jit(sense.explain_measured)
    for sigma, share in ((0.001, 0.75), (0.05, 0.95)):
        kspace, images = noisy_scan(coils, sigma, mask)
        true = rss(images).astype(np.float32)
        blurred = gaussian_filter(true, 2)
        explained = np.asarray(explain(blurred, kspace, mask))
        error = np.linalg.norm(blurred - true)
        assert np.linalg.norm(explained - true) < share * error
        assert np.linalg.norm(explain(true, kspace, mask) - true) < 0.7 * error
        profiles = images / np.where(true > 0, true, 1)
        unexplained = [np.linalg.norm(to_kspace(x * profiles) * mask - kspace) for x in (blurred, explained)]
        assert unexplained[1] < unexplained[0]
        if sigma == 0.001:
            assert unexplained[1] < 0.1 * np.linalg.norm(kspace) < unexplained[0]
