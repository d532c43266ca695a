import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace

from mrjax.errors import UserError
from mrjax.mri.espirit import espirit


def noisy(count: int, height: int, width: int) -> np.ndarray:
    kspace, rng = to_kspace(coil_images(1, count, height, width)[0]), np.random.default_rng(0)
    noise = rng.normal(size=(2, *kspace.shape)) * 0.01
    return (kspace + noise[0] + 1j * noise[1]).astype(np.complex64)


@functools.cache
def compiled(**how):
    return jax.jit(functools.partial(espirit, **how))


def everywhere(width: int) -> np.ndarray:
    return np.ones((1, width), bool)


@pytest.mark.peer
@pytest.mark.parametrize(("count", "height", "width", "side"), [(1, 33, 40, 12), (4, 33, 40, 20), (16, 32, 32, 12)])
def test_maps_equal_sigpys_up_to_phase(count, height, width, side) -> None:
    """To 1e-4 of unit length; cropped at the same pixels, but those whose eigenvalue is within 1e-4 of the limit."""
    from sigpy.mri import app

    kspace = noisy(count, height, width)
    maps = np.asarray(compiled(calibration=side)(kspace, everywhere(width)))
    theirs, values = app.EspiritCalib(kspace, calib_width=side, show_pbar=False, output_eigenvalue=True).run()
    doubtful = np.abs(values[0] - 0.95) < 1e-4
    inside = rss(theirs) > 0
    assert inside.mean() > 0.2
    assert np.array_equal((rss(maps) > 0)[~doubtful], inside[~doubtful])
    both = inside & (rss(maps) > 0)
    phase = np.exp(1j * np.angle((theirs * maps.conj()).sum(0)))
    assert np.abs(maps * phase - theirs)[:, both].max() < 1e-4


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_maps_explain_the_coil_images_and_vanish_outside(count) -> None:
    images = coil_images(1, count, 48, 48)[0]
    maps = np.asarray(compiled(calibration=24)(to_kspace(images), everywhere(48)))
    inside = rss(maps) > 0
    assert np.allclose(rss(maps)[inside], 1, atol=1e-5)
    explained = maps * (maps.conj() * images).sum(0)
    assert np.linalg.norm((explained - images) * inside) < 0.03 * np.linalg.norm(images)
    if count > 1:  # One coil alone says little about where the object is.
        assert (rss(images) > 0)[inside].mean() > 0.75


@pytest.mark.slow
def test_only_blocks_measured_wholly_count() -> None:
    """A region twice as wide as what was sampled gives the maps of what was sampled, whatever lies outside of it."""
    kspace = noisy(4, 40, 40)
    mask = (np.abs(np.arange(40) - 20) <= 5)[None]
    mask[:, ::4] = True
    maps = compiled(calibration=24)(np.where(mask, kspace, 0), mask)
    filled = compiled(calibration=24)(np.where(mask, kspace, 7), mask)
    assert np.allclose(maps, filled, atol=1e-5)
    full = np.asarray(compiled(calibration=24)(kspace, everywhere(40)))
    both = (rss(np.asarray(maps)) > 0) & (rss(full) > 0)
    assert both.mean() > 0.2
    assert np.abs((full.conj() * maps).sum(0))[both].mean() > 0.98


def test_empty_coils_and_the_batch_change_nothing() -> None:
    kspace = np.stack([noisy(3, 24, 26), noisy(4, 24, 26)[:3]])
    padded = np.pad(kspace, ((0, 0), (0, 1), (0, 0), (0, 0)))
    how = functools.partial(espirit, calibration=16, kernel=4)
    alone = np.stack([jax.jit(how)(one, everywhere(26)) for one in kspace])
    masks = np.stack([everywhere(26)] * 2)
    batched = np.asarray(jax.jit(jax.vmap(how))(padded, masks))
    assert (rss(alone) > 0).mean() > 0.2
    assert np.allclose(batched[:, :3], alone, atol=2e-3)
    assert not batched[:, 3].any()


def test_nothing_measured_gives_zero_and_no_nan() -> None:
    maps = compiled(calibration=12)(jnp.zeros((2, 16, 16), jnp.complex64), jnp.zeros((1, 16), bool))
    assert not np.any(maps)


@pytest.mark.parametrize(("side", "size"), [(5, 32), (24, 10)])
def test_too_small_a_region_or_image_is_an_error(side, size) -> None:
    with pytest.raises(UserError, match=f"found {side} and {size}x{size}"):
        espirit(jnp.ones((2, size, size), jnp.complex64), jnp.ones((1, size), bool), calibration=side)
