"""Motion against sums over pixels in float64: a k-space sample of a moved image, straight from its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import to_kspace
from scipy import ndimage

from mrjax.mri import fourier, motion

rotate, move, ifft2c = map(jax.jit, (motion.rotate, motion.move, fourier.ifft2c))


def blobs(height: int, width: int) -> np.ndarray:
    """(2, height, width) complex64, smooth (band-limited to 1e-6) and far from the borders."""
    y, x = (np.arange(n) - n // 2 for n in (height, width))
    images = [
        sum(
            a * np.exp(-((y[:, None] - v) ** 2 + (x - h) ** 2) / (2 * 1.6**2) + 0.3j * v)
            for a, v, h in ((1, -4 + c, 3), (0.6, 3, -2), (0.8j, 2, 4 - c))
        )
        for c in range(2)
    ]
    return np.asarray(images, np.complex64)


def sample_by_sample(image: np.ndarray, poses: motion.Motion) -> np.ndarray:
    """Each sample at its own time: the spectrum of the image at the frequency turned back, times the shift's phase."""
    height, width = image.shape
    times, angles, shifts = (np.asarray(part, np.float64) for part in poses)
    y, x = np.arange(height) - height // 2, np.arange(width) - width // 2
    out = np.zeros((height, width), complex)
    for i in range(height):
        for j in range(width):
            time = (j + i / height) / width
            angle = np.deg2rad(angles[max(n for n in range(len(angles)) if times[n] <= time)])
            ky, kx = (i - height // 2) / height, (j - width // 2) / width
            # scipy.ndimage.rotate: turned(y, x) = image(cos y + sin x, cos x - sin y), and spectra turn as images do.
            turned_y = np.cos(angle) * ky + np.sin(angle) * kx
            turned_x = np.cos(angle) * kx - np.sin(angle) * ky
            down, right = (np.interp(time, times, shifts[:, axis]) for axis in (0, 1))
            wave = np.exp(-2j * np.pi * turned_y * y) @ image @ np.exp(-2j * np.pi * turned_x * x)
            out[i, j] = wave * np.exp(-2j * np.pi * (ky * down + kx * right)) / np.sqrt(height * width)
    return out


@pytest.mark.parametrize("size", [(36, 40), (35, 33)])
def test_moved_kspace_equals_the_sum_over_pixels_at_each_samples_own_time(size) -> None:
    images = blobs(*size)
    poses = motion.Motion(
        jnp.asarray([0, 0.31, 0.6012, 1]),
        jnp.asarray([-9.0, 4.0, 17.0]),
        jnp.asarray([[0, 1.5], [-0.7, 0.2], [0.4, 0], [2.2, -1]]),
    )
    moved = move(jnp.asarray(to_kspace(images)), poses)
    expected = np.stack([sample_by_sample(image, poses) for image in images])
    assert np.abs(expected - to_kspace(images)).max() > 0.1 * np.abs(expected).max()
    np.testing.assert_allclose(moved, expected, atol=2e-5 * np.abs(expected).max())


def test_rotation_turns_as_scipy_does() -> None:
    image = blobs(41, 41)[0]
    turned = ifft2c(rotate(jnp.asarray(to_kspace(image)), jnp.float32(20)))
    expected = [
        ndimage.rotate(part.astype(np.float64), 20, reshape=False, order=5) for part in (image.real, image.imag)
    ]
    np.testing.assert_allclose(turned, expected[0] + 1j * expected[1], atol=2e-3)


def test_a_whole_number_of_pixels_rolls_the_image() -> None:
    images = blobs(32, 30)
    still = motion.Motion(jnp.asarray([0.0, 1.0]), jnp.zeros(1), jnp.asarray([[3.0, -2.0], [3.0, -2.0]]))
    moved = ifft2c(move(jnp.asarray(to_kspace(images)), still))
    np.testing.assert_allclose(moved, np.roll(images, (3, -2), (1, 2)), atol=1e-5)


def test_walks_stay_within_their_steps_and_start_from_rest() -> None:
    walks = jax.vmap(lambda key: motion.draw_walk(key, 2.0, (3.0, 0.5), jnp.float32(0.55)))
    walks = jax.jit(walks)(jax.random.split(jax.random.key(0), 200))
    times, angles, shifts = map(np.asarray, walks)
    assert np.all(np.diff(times) >= 0)
    assert np.all(times[:, [0, -1]] == [0, 1])
    assert 1.5 < abs(np.diff(angles)).max() <= 2.0001
    assert np.all(abs(np.diff(shifts, axis=1)).max((0, 1)) <= [3.0001, 0.5001])
    for time, angle, shift in zip(times, angles, shifts, strict=True):
        assert angle[np.searchsorted(time[1:-1], 0.55, side="right")] == 0
        np.testing.assert_allclose([np.interp(0.55, time, one) for one in shift.T], 0, atol=1e-5)
