import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from conftest import coil_images, rss, to_kspace

from mrjax.baselines import compressed_sensing as cs
from mrjax.errors import UserError

WEIGHTS = {"tv": 0.02, "wavelet": 0.01}


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


@functools.cache
def compiled(regulariser: str):
    return jax.jit(functools.partial(cs.reconstruct, regulariser=regulariser))


def matrix(regulariser: str, height: int, width: int) -> scipy.sparse.csr_array:
    """The analysis operator (bands x pixels, pixels) in NumPy, float64: its values on every unit image."""
    units = np.eye(height * width).reshape(-1, height, width)
    if regulariser == "tv":
        bands = [np.roll(units, -1, 1) - units, np.roll(units, -1, 2) - units]
    else:
        root, bands = np.sqrt(3), []
        low = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / 8
        filters = low, low[::-1] * [1, -1, 1, -1]
        for level in range(cs.LEVELS):
            rows = [filtered(units, taps, level, 1) for taps in filters]
            units, *details = (filtered(row, taps, level, 2) for row in rows for taps in filters)
            bands += details
    return scipy.sparse.csr_array(np.concatenate([band.reshape(height * width, -1) for band in bands], 1).T)


def filtered(x: np.ndarray, taps: np.ndarray, level: int, axis: int) -> np.ndarray:
    return sum(tap * np.roll(x, -(k << level), axis) for k, tap in enumerate(taps))


def objective(image, kspace, mask, maps, operator, joint: bool, weight: float) -> float:
    """1/2 |mask F(S x) - kspace|^2 + weight |D x|_1, in float64."""
    residual = to_kspace_64(maps * image) * mask - kspace
    bands = (operator @ image.ravel()).reshape(-1, image.size)
    return 0.5 * (np.abs(residual) ** 2).sum() + weight * lengths(bands, joint).sum()


def lengths(bands: np.ndarray, joint: bool) -> np.ndarray:
    return np.sqrt((np.abs(bands) ** 2).sum(0, keepdims=True)) if joint else np.abs(bands)


def to_kspace_64(images: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(images, (-2, -1))
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), (-2, -1))


def to_images_64(kspace: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(kspace, (-2, -1))
    return np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), (-2, -1))


def primal_dual(kspace, mask, maps, operator, joint: bool, weight: float, iterations: int) -> np.ndarray:
    """The same problem by the primal-dual method of Condat and Vu, float64: another algorithm, no code in common."""
    size, image_size = kspace.shape[1:], kspace[0].size
    image, dual = np.zeros(size, complex), np.zeros((operator.shape[0] // image_size, image_size), complex)
    tau, sigma = 1.0, 0.5 / (8 if joint else 1)
    for _ in range(iterations):
        gradient = (maps.conj() * to_images_64(to_kspace_64(maps * image) * mask - kspace)).sum(0)
        new = image - tau * (gradient + (operator.T @ dual.ravel()).reshape(size))
        dual = dual + sigma * (operator @ (2 * new - image).ravel()).reshape(dual.shape)
        dual, image = dual / np.maximum(1, lengths(dual, joint) / weight), new
    return image


@pytest.mark.parametrize("regulariser", list(WEIGHTS))
def test_the_solution_equals_a_primal_dual_solver_in_float64(regulariser) -> None:
    """Within 1e-3 of the image's norm."""
    height, width = 12, 13
    kspace, mask, images = scan(3, height, width)
    maps, weight, joint = maps_of(images), WEIGHTS[regulariser], regulariser == "tv"
    problem = kspace, mask, maps, matrix(regulariser, height, width), joint, weight
    exact = primal_dual(*problem, 2000 if joint else 600)
    found = [
        np.asarray(compiled(regulariser)(kspace, mask, maps, weight=weight, iterations=n)) for n in (0, 10, 30, 200)
    ]
    values = [objective(image, *problem) for image in (*found, exact)]
    assert values[0] > values[1] > values[2] > values[3]
    assert values[3] == pytest.approx(values[4], rel=1e-3)
    assert np.linalg.norm(found[3] - exact) < 1e-3 * np.linalg.norm(exact)
    assert np.linalg.norm(found[0] - exact) > 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("regulariser", list(WEIGHTS))
@pytest.mark.parametrize("size", [(16, 16), (7, 11)])
def test_analysis_operators_adjoints_and_norms_equal_numpy(regulariser, size) -> None:
    analysis, rng = cs.ANALYSES[regulariser], np.random.default_rng(0)
    exact = matrix(regulariser, *size)
    x = rng.normal(size=size) + 1j * rng.normal(size=size)
    y = rng.normal(size=(exact.shape[0] // x.size, *size)) * (1 + 2j)
    bands = np.asarray(jax.jit(analysis.forward)(x.astype(np.complex64)))
    assert np.allclose(bands.ravel(), exact @ x.ravel(), atol=1e-5)
    image = np.asarray(jax.jit(analysis.adjoint)(y.astype(np.complex64)))
    assert np.allclose(image.ravel(), exact.T @ y.ravel(), atol=1e-4)
    assert np.linalg.norm(exact.toarray(), 2) ** 2 <= analysis.norm + 1e-6


@pytest.mark.peer
def test_wavelets_equal_pywavelets() -> None:
    """Up to where each band begins: its values in order of size."""
    import pywt

    x = np.random.default_rng(0).normal(size=(16, 24))
    theirs = pywt.swt2(x, "db2", cs.LEVELS, norm=True, trim_approx=True)
    bands = np.asarray(jax.jit(cs.wavelets)(x.astype(np.complex64))).real
    for level in range(cs.LEVELS):
        ours = np.sort(np.abs(bands[3 * level : 3 * level + 3]).reshape(3, -1))
        expected = np.sort(np.abs(np.stack(theirs[cs.LEVELS - level])).reshape(3, -1))
        for band in ours:
            assert np.abs(expected - band).max(1).min() < 1e-5


@pytest.mark.parametrize("regulariser", list(WEIGHTS))
def test_it_beats_zero_filling_for_any_number_of_coils(regulariser) -> None:
    for coils in (1, 16) if regulariser == "tv" else (4,):
        kspace, mask, images = scan(coils, 32, 32)
        model = cs.CompressedSensing(regulariser=regulariser, iterations=30, weight=0.005)
        offset = jnp.full((2, 1, 1), 0.1)
        empty = np.zeros_like(kspace[:1])
        twice = np.stack([kspace, kspace / 2]) if coils == 16 else np.stack([np.concatenate([kspace, empty])] * 2)
        apply = jax.jit(lambda *inputs, model=model: model.apply({"params": {}}, *inputs))
        result = np.asarray(apply(twice, np.stack([mask] * 2), offset))
        assert result.shape == (2, 32, 32, 1)
        assert result.dtype == np.float32
        truth, zero_filled = rss(images), rss(to_images_64(kspace))
        assert psnr(truth, result[0, ..., 0] + 0.1) > psnr(truth, zero_filled) + (1 if coils > 1 else 0.3)


def test_too_few_central_columns_for_espirit_fall_back_to_adaptive_maps() -> None:
    images = scan(4, 16, 16)[2]
    mask = np.isin(np.arange(16), (2, 5, 7, 8, 12))[None]
    kspace = to_kspace(images) * mask
    result = cs.CompressedSensing(iterations=20).apply({"params": {}}, kspace[None], mask[None], jnp.zeros((1, 1, 1)))
    truth = rss(images)
    assert psnr(truth, np.asarray(result)[0, ..., 0]) > psnr(truth, np.zeros_like(truth)) + 3


def psnr(truth: np.ndarray, image: np.ndarray) -> float:
    return 10 * np.log10(truth.max() ** 2 / np.mean((truth - image) ** 2))


def test_all_measured_and_no_penalty_is_the_combination_of_the_coils() -> None:
    images = scan(4, 16, 17)[2]
    everything, maps = np.ones((1, 17), bool), maps_of(images)
    image = compiled("tv")(to_kspace(images), everything, maps, weight=0.0, iterations=5)
    assert np.allclose(image, (maps.conj() * images).sum(0), atol=1e-5)


@pytest.mark.parametrize("regulariser", list(WEIGHTS))
def test_nothing_measured_gives_zeros(regulariser) -> None:
    nothing = np.zeros((2, 16, 16), np.complex64)
    assert not np.any(compiled(regulariser)(nothing, np.zeros((1, 16), bool), nothing, weight=0.01, iterations=10))


def test_an_unknown_regulariser_is_an_error() -> None:
    nothing = jnp.zeros((1, 8, 8), jnp.complex64)
    with pytest.raises(UserError, match="'l2', expected one of: tv, wavelet"):
        cs.reconstruct(nothing, jnp.ones((1, 8), bool), nothing, regulariser="l2", weight=1.0, iterations=1)
