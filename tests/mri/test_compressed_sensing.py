import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace
from scipy import sparse

from mrjax.baselines import CompressedSensing
from mrjax.mri import compressed_sensing as cs

WEIGHT = 0.02


def scan(coils: int, height: int, width: int, noise: float = 0.01, seed: int = 0):
    """A noisy scan, four times accelerated: k-space of peak about 1, mask and truth."""
    images = coil_images(1, coils, height, width, seed)[0]
    images /= rss(images).max()
    rng = np.random.default_rng(seed)
    added = rng.normal(size=(2, *images.shape)) * noise
    mask = rng.random((1, width)) < 0.18
    mask[:, width // 2 - 4 : width // 2 + 4] = True
    return (to_kspace(images + added[0] + 1j * added[1]) * mask).astype(np.complex64), mask, images


def maps_of(images: np.ndarray) -> np.ndarray:
    """The true sensitivities inside the object, of unit length."""
    length = rss(images)
    return np.where(length > 0, images / np.where(length > 0, length, 1), 0).astype(np.complex64)


solve = jax.jit(cs.reconstruct)  # for any number of iterations


def matrix(height: int, width: int) -> np.ndarray:
    """The differences (2 x pixels, pixels) in NumPy, float64: their values on every unit image."""
    units = np.eye(height * width).reshape(-1, height, width)
    gradients = [np.roll(units, -1, axis) - units for axis in (1, 2)]
    return np.concatenate([gradient.reshape(height * width, -1) for gradient in gradients], 1).T


def objective(image, kspace, mask, maps, operator) -> float:
    """1/2 |mask F(S x) - kspace|^2 + WEIGHT TV(x), in float64."""
    residual = to_kspace_64(maps * image) * mask - kspace
    gradients = (operator @ image.ravel()).reshape(2, -1)
    return 0.5 * (np.abs(residual) ** 2).sum() + WEIGHT * np.linalg.norm(gradients, axis=0).sum()


def to_kspace_64(images: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(images, (-2, -1))
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), (-2, -1))


def to_images_64(kspace: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(kspace, (-2, -1))
    return np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), (-2, -1))


def primal_dual(kspace, mask, maps, operator, iterations: int) -> np.ndarray:
    """The same problem by the primal-dual method of Condat and Vu, float64: another algorithm, no code in common."""
    size = kspace.shape[1:]
    image, dual = np.zeros(size, complex), np.zeros((2, kspace[0].size), complex)
    tau, sigma = 1.0, 0.5 / 8
    for _ in range(iterations):
        gradient = (maps.conj() * to_images_64(to_kspace_64(maps * image) * mask - kspace)).sum(0)
        new = image - tau * (gradient + (operator.T @ dual.ravel()).reshape(size))
        dual = dual + sigma * (operator @ (2 * new - image).ravel()).reshape(dual.shape)
        dual, image = dual / np.maximum(1, np.linalg.norm(dual, axis=0) / WEIGHT), new
    return image


@pytest.mark.slow
def test_the_solution_equals_a_primal_dual_solver_in_float64() -> None:
    """Within 1e-3 of the image's norm."""
    height, width = 12, 13
    kspace, mask, images = scan(3, height, width)
    maps = maps_of(images)
    problem = kspace, mask, maps, sparse.csr_array(matrix(height, width))
    exact = primal_dual(*problem, 2000)
    found = [np.asarray(solve(kspace, mask, maps, weight=WEIGHT, iterations=n)) for n in (0, 10, 30, 200)]
    values = [objective(image, *problem) for image in (*found, exact)]
    assert values[0] > values[1] > values[2] > values[3]
    assert values[3] == pytest.approx(values[4], rel=1e-3)
    assert np.linalg.norm(found[3] - exact) < 1e-3 * np.linalg.norm(exact)
    assert np.linalg.norm(found[0] - exact) > 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("size", [(16, 16), (7, 11)])
def test_differences_their_adjoint_and_norm_equal_numpy(size) -> None:
    rng, exact = np.random.default_rng(0), matrix(*size)
    x = rng.normal(size=size) + 1j * rng.normal(size=size)
    y = rng.normal(size=(2, *size)) * (1 + 2j)
    gradients = np.asarray(cs.differences(x.astype(np.complex64)))
    assert np.allclose(gradients.ravel(), exact @ x.ravel(), atol=1e-5)
    image = np.asarray(cs.differences_adjoint(y.astype(np.complex64)))
    assert np.allclose(image.ravel(), exact.T @ y.ravel(), atol=1e-4)
    assert np.linalg.norm(exact, 2) ** 2 <= 8 + 1e-6


@pytest.mark.slow
def test_it_beats_zero_filling_for_any_number_of_coils() -> None:
    for coils in (1, 8):
        kspace, mask, images = scan(coils, 32, 32)
        model = CompressedSensing(iterations=30, weight=0.005)
        offset = jnp.full((2, 1, 1), 0.1)
        empty = np.zeros_like(kspace[:1])
        twice = np.stack([kspace, kspace / 2]) if coils == 8 else np.stack([np.concatenate([kspace, empty])] * 2)
        apply = jax.jit(lambda *inputs, model=model: model.apply({"params": {}}, *inputs))
        result = np.asarray(apply(twice, np.stack([mask] * 2), offset))
        assert result.shape == (2, 32, 32, 1)
        assert result.dtype == np.float32
        truth, zero_filled = rss(images), rss(to_images_64(kspace))
        assert psnr(truth, result[0, ..., 0] + 0.1) > psnr(truth, zero_filled) + (1 if coils > 1 else 0.3)


@pytest.mark.slow
def test_too_few_central_columns_for_espirit_fall_back_to_adaptive_maps() -> None:
    images = scan(4, 16, 16)[2]
    mask = np.isin(np.arange(16), (2, 5, 7, 8, 12))[None]
    kspace = to_kspace(images) * mask
    apply = jax.jit(CompressedSensing(iterations=20).apply)
    result = apply({"params": {}}, kspace[None], mask[None], jnp.zeros((1, 1, 1)))
    truth = rss(images)
    assert psnr(truth, np.asarray(result)[0, ..., 0]) > psnr(truth, np.zeros_like(truth)) + 3


def psnr(truth: np.ndarray, image: np.ndarray) -> float:
    return 10 * np.log10(truth.max() ** 2 / np.mean((truth - image) ** 2))


def test_all_measured_and_no_penalty_is_the_combination_of_the_coils() -> None:
    images = scan(4, 16, 17)[2]
    everything, maps = np.ones((1, 17), bool), maps_of(images)
    image = solve(to_kspace(images), everything, maps, weight=0.0, iterations=150)
    assert np.allclose(maps * image, maps * (maps.conj() * images).sum(0), atol=1e-5)


def test_nothing_measured_gives_zeros() -> None:
    nothing = np.zeros((2, 16, 16), np.complex64)
    assert not np.any(solve(nothing, np.zeros((1, 16), bool), nothing, weight=0.01, iterations=10))
