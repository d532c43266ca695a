"""Augmentation draws what was asked for, and warps like SciPy does, every coil alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mrjax.mri.augment import (
    Augment,
    draw_affine,
    interpolate,
    interpolate_row_pairs,
    mix_by_sum,
    mix_coil_by_coil,
    vary,
    warp,
)

EVERYTHING = Augment(rotation_p=0.5, scale_p=0.5, anisotropy_p=0.5, translation_p=0.5, flip_p=0.5, flip_vertical_p=0.5)
IDENTITY = np.eye(2, 3, dtype=np.float32)


def draw_many(augment, height=48, width=30, number=2000, seed=0):
    keys = jax.random.split(jax.random.key(seed), number)
    return np.asarray(jax.jit(jax.vmap(lambda key: draw_affine(key, augment, height, width)))(keys))


def noise(*shape):
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def by_scipy(image, affine):
    affine = affine.astype(np.float64)
    return ndimage.affine_transform(image, affine[:, :2], affine[:, 2], order=1, mode="grid-constant")


@pytest.mark.parametrize("shape", [(1, 33, 64), (16, 40, 24), (4, 31, 31)])
def test_warp_is_scipys_bilinear_interpolation_in_every_coil(shape):
    affines, images = draw_many(EVERYTHING, *shape[1:], number=6), noise(6, *shape)
    warped = jax.jit(jax.vmap(warp))(images, affines)
    assert (warped.shape, warped.dtype) == (images.shape, images.dtype)
    expected = [[by_scipy(coil, affine) for coil in coils] for coils, affine in zip(images, affines, strict=True)]
    np.testing.assert_allclose(warped, expected, atol=1e-4)  # coordinates of float32 in noise of 1


@pytest.mark.parametrize("dtype", [np.complex64, np.float32, jnp.bfloat16])
def test_interpolation_for_tpus_equals_the_plain_one(dtype):
    """Within, across and beyond every edge, and exactly on pixels."""
    images = jnp.asarray(noise(3, 17, 24) if dtype == np.complex64 else noise(3, 17, 24).real, dtype)
    rng = np.random.default_rng(1)
    y, x = (rng.uniform(-3, side + 2, (17, 24)).astype(np.float32) for side in (17, 24))
    y[:5], x[:, :5] = y[:5].round(), x[:, :5].round()
    ours, plain = (np.asarray(jax.jit(form)(images, y, x)) for form in (interpolate_row_pairs, interpolate))
    assert ours.dtype == plain.dtype == dtype
    np.testing.assert_allclose(ours.astype(np.complex64), plain.astype(np.complex64), atol=1e-6)
    assert (plain != 0).any()
    assert (plain == 0).any()


def test_rotation_is_about_the_centre_and_keeps_pixels_square():
    image = noise(1, 48, 31).real
    affine = draw_many(Augment(rotation_p=1.0), 48, 31, number=1)[0]
    angle = np.rad2deg(np.arctan2(affine[1, 0], affine[0, 0]))
    expected = ndimage.rotate(image[0], -angle, reshape=False, order=1, mode="grid-constant")
    np.testing.assert_allclose(jax.jit(warp)(image, affine)[0], expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.complex64, np.float32, jnp.bfloat16])
def test_identity_and_flips_are_exact(dtype):
    images = jnp.asarray(noise(3, 18, 25)).real.astype(dtype)
    for augment, expected in (
        (Augment(flip_p=1.0), images[:, :, ::-1]),
        (Augment(flip_vertical_p=1.0), images[:, ::-1]),
    ):
        flip = lambda images, augment=augment: warp(images, draw_affine(jax.random.key(0), augment, 18, 25))  # noqa: E731
        warped = jax.jit(flip)(images)
        assert warped.dtype == dtype
        np.testing.assert_array_equal(warped, expected)


def test_input_and_target_move_alike_stacked_or_not():
    stack, affine = noise(2, 20, 20).real, draw_many(EVERYTHING, 20, 20, number=1)[0]
    warp_images = jax.jit(warp)
    together = warp_images(stack, affine)
    for channel in range(2):
        np.testing.assert_allclose(together[channel], warp_images(stack[channel, None], affine)[0], atol=1e-6)


def test_no_augmentation_is_exactly_the_identity():
    assert draw_affine(jax.random.key(0), Augment(), 48, 30) is None
    assert draw_affine(None, EVERYTHING, 48, 30) is None
    probabilities = ("rotation_p", "scale_p", "anisotropy_p", "translation_p", "flip_p", "flip_vertical_p")
    rarely = draw_many(Augment(**dict.fromkeys(probabilities, 0.1)))
    untouched = (rarely == IDENTITY).all((1, 2)).mean()
    assert untouched == pytest.approx(0.9**6, abs=0.04)


def test_rotation_fills_its_range():
    affine = draw_many(Augment(rotation=30.0, rotation_p=1.0))
    angles = np.rad2deg(np.arctan2(affine[:, 1, 0], affine[:, 0, 0]))
    assert -30.001 < angles.min() < -29
    assert 29 < angles.max() < 30.001
    assert abs(angles.mean()) < 1.5


@pytest.mark.parametrize(
    ("augment", "low", "high"),
    [
        (Augment(scale=(0.8, 1.1), scale_p=1.0), (0.8, 1), (1.1, 1)),
        (Augment(anisotropy=(0.5, 1.2), anisotropy_p=1.0), (1, 0.5), (1, 1.2)),
    ],
)
def test_scalings_fill_their_ranges_independently(augment, low, high):
    affine = draw_many(augment)
    size = 1 / affine[:, (0, 1), (0, 1)]
    drawn = np.stack([np.sqrt(size[:, 0] * size[:, 1]), size[:, 0] / size[:, 1]])
    np.testing.assert_allclose(drawn.min(1), low, atol=0.005)
    np.testing.assert_allclose(drawn.max(1), high, atol=0.005)
    centre = np.array([23.5, 14.5])
    np.testing.assert_allclose(affine[:, :, :2] @ centre + affine[:, :, 2], np.tile(centre, (2000, 1)), atol=1e-5)


def test_translation_is_a_fraction_of_each_side_in_both_directions():
    affine = draw_many(Augment(translation=0.25, translation_p=0.7))
    shift = affine[:, :, 2] / (48, 30)
    moved = (shift != 0).all(1)
    assert moved.mean() == pytest.approx(0.7, abs=0.04)
    np.testing.assert_array_equal(affine[~moved], np.broadcast_to(IDENTITY, ((~moved).sum(), 2, 3)))
    np.testing.assert_allclose(shift.min(0), -0.25, atol=0.005)
    np.testing.assert_allclose(shift.max(0), 0.25, atol=0.005)
    assert abs(np.corrcoef(shift[moved].T)[0, 1]) < 0.1


def test_flips_happen_independently_with_their_probabilities():
    affine = draw_many(Augment(flip_p=0.3, flip_vertical_p=0.6))
    horizontal, vertical = affine[:, 1, 1] < 0, affine[:, 0, 0] < 0
    assert horizontal.mean() == pytest.approx(0.3, abs=0.04)
    assert vertical.mean() == pytest.approx(0.6, abs=0.04)
    assert (horizontal & vertical).mean() == pytest.approx(0.18, abs=0.04)


def test_an_example_depends_on_its_key_alone():
    keys, images = jax.random.split(jax.random.key(3), 8), noise(8, 2, 24, 17)

    @jax.jit
    def augmented(keys, images):
        return jax.vmap(warp)(images, jax.vmap(lambda key: draw_affine(key, EVERYTHING, 24, 17))(keys))

    batch = np.asarray(augmented(keys, images))
    np.testing.assert_array_equal(np.asarray(augmented(keys[::-1], images[::-1]))[::-1], batch)
    for i in range(8):
        np.testing.assert_array_equal(np.asarray(augmented(keys[i : i + 1], images[i : i + 1]))[0], batch[i])


def rss(images):
    return np.sqrt((np.abs(images).astype(float) ** 2).sum(-3))


def vary_many(augment, images, number=64):
    """The images (number, ..., coils, height, width); which of their coils are present is told rightly."""
    keys = jax.random.split(jax.random.key(0), number)
    run = jax.jit(jax.vmap(lambda key: vary(key, augment, images, jnp.asarray(images.any((-2, -1))))))
    found, present = map(np.asarray, run(keys))
    np.testing.assert_array_equal(present, found.any((-2, -1)))
    return found


@pytest.mark.parametrize("mix", [mix_by_sum, mix_coil_by_coil])
def test_both_ways_to_mix_coils_are_the_matrix_product(mix):
    images, mixture = noise(2, 3, 6, 5), noise(3, 3, 1, 1)
    expected = np.einsum("ij,rjyx->riyx", mixture[..., 0, 0].astype(complex), images)
    np.testing.assert_allclose(mix(jnp.asarray(mixture), jnp.asarray(images)), expected, atol=1e-5)


def test_contrast_is_a_polynomial_of_the_signal_that_turns_bright_pixels_dark():
    """s |1 - c s| in units of the maximum, which stays: c is found again from one pixel, and the phase is kept."""
    images = noise(2, 2, 6, 5)
    signal = rss(images)
    brightest = signal.max((-2, -1), keepdims=True)
    found = vary_many(Augment(contrast=(-1.0, 1.3), contrast_p=1.0), images)
    np.testing.assert_allclose(rss(found).max((-2, -1)), np.broadcast_to(brightest[..., 0, 0], (64, 2)), rtol=1e-5)
    assert np.abs(np.angle(found / images)).max() < 1e-3
    share = signal / brightest
    factors = rss(found) / signal
    candidates = np.linspace(-1, 1.3, 2301)[:, None, None, None]
    shapes = np.abs(1 - candidates * share)
    shapes *= 1 / (share * shapes).max((-2, -1), keepdims=True)
    errors = np.abs(factors[:, None] - shapes).max((2, 3, 4))
    assert errors.min(1).max() < 0.02
    strengths = candidates[errors.argmin(1)].ravel()
    assert strengths.min() < -0.85
    assert strengths.max() > 1.15


def test_other_coils_are_mixtures_of_those_that_are_there_and_of_any_number():
    images = noise(4, 6, 5)
    images[1] = 0
    found = vary_many(Augment(coils_p=1.0), images)
    assert not found[:, 1].any()
    assert set((np.abs(found) > 0).any((-2, -1)).sum(1)) == {1, 2, 3}
    basis = images[[0, 2, 3]].reshape(3, -1)
    for coil in found.reshape(-1, 30):
        weights = np.linalg.lstsq(basis.T, coil, rcond=None)[0]
        np.testing.assert_allclose(weights @ basis, coil, atol=1e-5)
    np.testing.assert_allclose(rss(found).max((-2, -1)), rss(images).max(), rtol=1e-5)


def test_contrast_and_coils_stay_in_evaluation_and_where_they_are_not_asked_for():
    images = noise(2, 6, 5)
    present = np.ones(2, bool)
    assert vary(None, Augment(contrast_p=1.0, coils_p=1.0), images, present) == (images, present)
    assert vary(jax.random.key(0), Augment(), images, present) == (images, present)
    rarely = vary_many(Augment(contrast_p=0.2, coils_p=0.2), images, 200)
    same = np.abs(rarely - images).max((1, 2, 3)) < 1e-5
    assert 0.5 < same.mean() < 0.8
