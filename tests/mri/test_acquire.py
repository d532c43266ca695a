import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace

from mrjax.mri import fourier, masks, normalise, tasks
from mrjax.mri.acquire import Acquisition, draw_protocol, measure
from mrjax.mri.augment import Augment
from mrjax.mri.coils import magnitude, root_sum_of_squares


@pytest.mark.parametrize("size", [(16, 16), (15, 22), (9, 7)])
def test_fourier_transforms_are_centred_and_orthonormal(size) -> None:
    image = coil_images(1, 2, *size)[0]
    assert np.allclose(fourier.fft2c(jnp.asarray(image)), to_kspace(image), atol=1e-5)
    assert np.allclose(fourier.ifft2c(jnp.asarray(to_kspace(image))), image, atol=1e-5)
    assert np.allclose(fourier.centred_ifft2_host(fourier.centred_fft2_host(image)), image, atol=1e-6)


def random_columns(count: int, sampled: np.ndarray, acceleration: float, centre: float) -> np.ndarray:
    width = len(sampled)
    scan = masks.Scan(jnp.asarray(sampled), 1, jnp.asarray(acceleration), jnp.asarray(centre), (0, width // 2))
    return np.asarray(
        jax.jit(jax.vmap(lambda key: masks.random_columns(key, scan)))(jax.random.split(jax.random.key(0), count))
    )[:, 0]


def undersample(kspace, target, how: Acquisition, protocol_key: int = 1, noise_key: int = 2) -> jax.Array:
    """K-space (coils, height, width) of a scan that measured every column."""

    @jax.jit
    def run(kspace, target):
        every = jnp.ones(kspace.shape[-1], bool)
        protocol = draw_protocol(jax.random.key(protocol_key), kspace, every, target, how)
        return measure(jax.random.key(noise_key), kspace, (kspace != 0).any((1, 2)), protocol, how)

    return run(jnp.asarray(kspace), jnp.asarray(target, jnp.float32))


@pytest.mark.parametrize(("acceleration", "centre"), [(4, 0.08), (8, 0.04), (2, 0.0), (1, 0.1)])
def test_masks_keep_the_centre_and_on_average_one_column_in_acceleration(acceleration, centre) -> None:
    drawn = random_columns(2000, np.ones(128, bool), acceleration, centre)
    low = round(128 * centre)
    start = (128 - low + 1) // 2
    assert drawn[:, start : start + low].all()
    assert drawn.sum(1).mean() == pytest.approx(128 / acceleration, rel=0.02)
    if acceleration > 1:
        outside = np.delete(drawn, range(start, start + low), 1)
        assert 0 < outside.mean(0).min() < outside.mean(0).max() < 0.65


@pytest.mark.peer
def test_the_centre_equals_fastmris() -> None:
    from fastmri.data import subsample

    for width in (64, 65, 320, 368):
        func = subsample.RandomMaskFunc(center_fractions=[0.08], accelerations=[1e6])
        theirs = func.calculate_center_mask((1, width, 1), round(width * 0.08))
        ours = random_columns(1, np.ones(width, bool), 1e6, 0.08)[0]
        assert np.array_equal(ours, np.asarray(theirs).astype(bool).ravel())


def test_columns_never_measured_are_neither_kept_nor_counted() -> None:
    sampled = (np.arange(256) >= 30) & (np.arange(256) <= 225)
    drawn = random_columns(1000, sampled, 4, 0.08)
    assert not drawn[:, ~sampled].any()
    assert drawn.sum(1).mean() == pytest.approx(196 / 4, rel=0.02)


def test_noise_has_the_configured_level_and_spares_empty_coils() -> None:
    kspace = jnp.asarray(np.pad(to_kspace(coil_images(1, 2, 64, 64))[0], ((0, 1), (0, 0), (0, 0))))
    how = Acquisition((1.0,), (0.5,), (0.05, 0.05))
    noise = np.asarray(undersample(kspace, 3, how) - kspace)
    assert noise[:2].real.std() == pytest.approx(0.15, rel=0.03)
    assert noise[:2].imag.std() == pytest.approx(0.15, rel=0.03)
    assert not noise[2].any()


def test_noise_of_a_coil_does_not_depend_on_how_many_there_are() -> None:
    kspace = jnp.asarray(to_kspace(coil_images(1, 3, 16, 16))[0])
    how = Acquisition((1.0,), (0.5,), (0.05, 0.05))
    few, many = (undersample(coils, 1, how) for coils in (kspace[:2], kspace))
    assert np.array_equal(few, many[:2])


def test_no_key_of_an_evaluation_is_used_twice() -> None:
    keys = tasks.evaluation_keys(jnp.zeros(3, jnp.uint32), jnp.arange(3))
    data = [jax.random.key_data(k).tolist() for k in (*jax.random.split(keys.protocol[0], 3), *keys.noise)]
    assert len(set(map(tuple, data))) == 6


def pair(images: np.ndarray, index: list[int], augment: Augment | None = None):
    task = tasks.kspace(Acquisition((4.0, 8.0), (0.08, 0.04), (0.0, 0.02)), augment or Augment())
    keys = tasks.training_keys(3, jnp.asarray(index, jnp.uint32))
    return jax.jit(task)({"kspace": jnp.asarray(to_kspace(images))}, keys)[:2]


@pytest.mark.parametrize("coils", [1, 16])
def test_the_target_is_the_root_sum_of_squares_and_the_input_is_aliased(coils) -> None:
    images = coil_images(2, coils, 31, 40)
    corrupted, target = pair(images, [0, 1])
    assert np.allclose(target, rss(images), atol=1e-5)
    assert 0.05 < np.linalg.norm(corrupted - target) / np.linalg.norm(target) < 1


def test_corruption_depends_on_the_index_in_the_stream_and_not_on_the_batch() -> None:
    images = np.repeat(coil_images(1, 2, 32, 32), 4, 0)
    everything = Augment(rotation_p=1, scale_p=1, translation_p=1, flip_p=0.5)
    corrupted, target = pair(images, [5, 6, 7, 8], everything)
    again, same = pair(images[:2], [7, 5], everything)
    assert np.allclose(again, np.asarray(corrupted)[[2, 0]], atol=1e-6)
    assert np.allclose(same, np.asarray(target)[[2, 0]], atol=1e-6)
    assert len({float(x.sum()) for x in corrupted}) == len({float(x.sum()) for x in target}) == 4


def test_evaluation_masks_are_shared_by_a_volume_and_differ_between_volumes() -> None:
    keys = tasks.evaluation_keys(jnp.asarray([1, 1, 2], jnp.uint32), jnp.asarray([0, 1, 0]))
    task = tasks.kspace(Acquisition((4.0,), (0.08,), (0.0, 0.0)), Augment(rotation_p=1.0))
    images = np.repeat(coil_images(1, 1, 32, 32), 3, 0)
    corrupted, target, *_ = jax.jit(task)({"kspace": jnp.asarray(to_kspace(images))}, keys)
    assert np.array_equal(corrupted[0], corrupted[1])
    assert not np.allclose(corrupted[0], corrupted[2])
    assert np.allclose(target, rss(images), atol=1e-5)


@pytest.mark.parametrize("kind", ["equispaced_fraction", "gaussian2d", "spiral"])
def test_masks_of_every_kind_are_a_function_of_the_volumes_name(kind) -> None:
    keys = tasks.evaluation_keys(jnp.asarray([1, 1, 2], jnp.uint32), jnp.asarray([0, 1, 0]))
    task = tasks.kspace(Acquisition((8.0,), (0.04,), (0.0, 0.0), mask=kind), Augment())
    images = np.repeat(coil_images(1, 1, 24, 32), 3, 0)
    example = jax.jit(task)({"kspace": jnp.asarray(to_kspace(images))}, keys)
    assert example.mask.shape == (3, 1 if kind.startswith("equispaced") else 24, 32)
    assert np.array_equal(example.mask[0], example.mask[1])
    assert not np.array_equal(example.mask[0], example.mask[2])
    assert np.array_equal(example.kspace, np.where(example.mask[:, None], to_kspace(images), 0))
    scan = masks.Scan(jnp.ones(32, bool), 24, jnp.asarray(8.0), jnp.asarray(0.04), (12, 16))
    again = jax.jit(lambda key: masks.MASKS[kind](jax.random.split(key, 3)[1], scan))(keys.protocol[2])
    assert np.array_equal(example.mask[2], again)


def acquired(**motion: float) -> jax.Array:
    """(24, 1, 32, 32) complex64, fully sampled, of one slice under as many keys."""
    kspace = jnp.asarray(to_kspace(coil_images(1, 1, 32, 32))[0])
    how = Acquisition((1.0,), (0.5,), (0.0, 0.0), **motion)

    def run(key: jax.Array) -> jax.Array:
        protocol = draw_protocol(key, kspace, jnp.ones(32, bool), jnp.ones((32, 32)), how)
        return measure(key, kspace, jnp.ones(1, bool), protocol, how)

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 24)) - kspace


def test_heads_move_with_their_probability_and_rest_at_the_centre_of_kspace() -> None:
    change = np.abs(acquired(motion_p=0.5, motion_rotation=3.0, motion_translation=0.03))[:, 0]
    moved = change.max((1, 2)) > 1e-3
    assert 5 < moved.sum() < 19
    assert not change[~moved].any()
    assert change[moved][:, 16, 16].max() < 0.05 * change[moved].max()


def test_pairs_are_augmented_alike() -> None:
    image = jnp.asarray(rss(coil_images(2, 1, 32, 32)))
    task = tasks.paired(Acquisition((1.0,), (0.0,), (0.0, 0.0)), Augment(rotation_p=1, scale_p=1))
    keys = tasks.training_keys(0, jnp.asarray([0, 1], jnp.uint32))
    corrupted, target, *_ = jax.jit(task)({"input": image, "target": 2 * image}, keys)
    assert np.allclose(2 * corrupted, target, atol=1e-5)
    assert not np.allclose(corrupted, image, atol=1e-2)


def test_normalisation_spans_0_to_1_and_is_undone_exactly() -> None:
    image = 1e-5 * (3 + np.random.default_rng(0).random((3, 8, 8)).astype(np.float32))
    image[2] = 0
    scaling = normalise.scale_by_slice(jnp.asarray(image), jnp.ones(3))
    inside = scaling.apply(jnp.asarray(image))
    assert np.allclose(inside[:2].min((1, 2)), 0)
    assert np.allclose(inside[:2].max((1, 2)), 1)
    assert np.isfinite(inside).all()
    assert np.allclose(scaling.invert(inside), image, rtol=1e-6)
    volume = normalise.scale_by_volume(jnp.asarray(image), jnp.asarray([2.0, 4.0, 0.0]))
    assert np.allclose(volume.apply(jnp.ones((3, 1, 1)))[:, 0, 0], [0.5, 0.25, 1])


def test_the_magnitude_of_k_space_is_that_of_its_centred_images_at_odd_sizes_too() -> None:
    rng = np.random.default_rng(0)
    for size in ((8, 6), (7, 9)):
        kspace = (rng.normal(size=(3, *size)) + 1j * rng.normal(size=(3, *size))).astype(np.complex64)
        np.testing.assert_allclose(magnitude(kspace), root_sum_of_squares(fourier.ifft2c(kspace)), rtol=1e-5)
