"""K-space simulated from images: the image comes back, coils and phase are smooth, noise is as large as it says."""

import numpy as np
import pytest
from conftest import coil_images, rss

from mrjax.mri import simulate

IMAGE = 700 * rss(coil_images(1, 1, 40, 32))[0]


def to_images(kspace: np.ndarray) -> np.ndarray:
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes), norm="ortho"), axes)


def test_without_noise_the_root_sum_of_squares_is_the_image(monkeypatch) -> None:
    monkeypatch.setattr(simulate, "NOISE", 0)
    for image in (IMAGE, -IMAGE, (IMAGE * np.exp(1j)).astype(np.complex64), IMAGE.astype(np.int16)):
        kspace = simulate.simulate_kspace(image, "a", 1, 3)
        assert kspace.shape == (simulate.COILS, 40, 32)
        assert kspace.dtype == np.complex64
        assert np.allclose(rss(to_images(kspace)), np.abs(image), atol=1e-3)
    assert not simulate.simulate_kspace(np.zeros((40, 32)), "a", 1, 3).any()


def test_the_noise_is_white_and_a_share_of_the_maximum(monkeypatch) -> None:
    noisy = simulate.simulate_kspace(IMAGE, "a", 1, 3)
    monkeypatch.setattr(simulate, "NOISE", 0)
    noise = (noisy - simulate.simulate_kspace(IMAGE, "a", 1, 3)) / (0.001 * IMAGE.max())
    assert noise.real.std() == pytest.approx(1, rel=0.03)
    assert noise.imag.std() == pytest.approx(1, rel=0.03)
    covariance = np.cov(noise.reshape(simulate.COILS, -1))
    assert np.abs(covariance - 2 * np.eye(simulate.COILS)).max() < 0.3


def test_all_is_a_function_of_name_and_slice() -> None:
    first, again, other_slice, other_name = (
        simulate.simulate_kspace(IMAGE, name, index, 3) for name, index in (("a", 1), ("a", 1), ("a", 2), ("b", 1))
    )
    assert np.array_equal(first, again)
    assert not np.allclose(first, other_slice, atol=1)
    assert not np.allclose(first, other_name, atol=100)


def test_sensitivities_and_phase_are_smooth_within_slices_and_across() -> None:
    def maps(depth: float) -> np.ndarray:
        found = simulate.make_sensitivities(np.random.default_rng(0), (64, 48), depth)
        return found * np.exp(1j * simulate.make_phase(np.random.default_rng(1), (64, 48), depth))

    found = maps(0)
    assert np.allclose((np.abs(found) ** 2).sum(0), 1, atol=1e-5)
    steps = [np.abs(np.diff(found, axis=axis)).max() for axis in (-2, -1)] + [np.abs(maps(0.05) - found).max()]
    assert max(steps) < 0.25
    strongest = np.abs(found).argmax(0)  # each coil is the strongest somewhere, those of a ring in turn around the edge
    assert set(strongest.ravel().tolist()) == set(range(simulate.COILS))
    edge = np.concatenate([strongest[0], strongest[:, -1], strongest[-1, ::-1], strongest[::-1, 0]])
    assert np.count_nonzero(np.diff(edge)) <= simulate.COILS + 1


def test_the_seen_image_lies_where_it_was() -> None:
    image = np.zeros((31, 44), np.float32)
    image[7, 30] = 1
    found = rss(to_images(simulate.simulate_kspace(image, "a", 0, 1)))
    assert np.unravel_index(found.argmax(), found.shape) == (7, 30)
