"""The U-Net with data consistency keeps what was measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace

from mrjax.models.unet import UNet
from mrjax.models.unet_dc import ConsistentUNet
from mrjax.mri.fourier import centred_ifft2_host as from_kspace

TINY = UNet(channels=2, levels=1)


def _measured(empty: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A network's inputs of two slices of two coils, and as many `empty` ones more."""
    rng = np.random.default_rng(0)
    mask = rng.random((2, 1, 20)) < 0.5
    # With noise, as any scan: an image of nothing has no phase.
    noise = rng.normal(size=(2, 2, 16, 20, 2)).astype(np.float32).view(np.complex64)[..., 0]
    kspace = np.where(mask[:, None], to_kspace(coil_images(2, 2, 16, 20)) + 0.02 * noise, 0)
    kspace = np.concatenate([kspace, np.zeros((2, empty, 16, 20), np.complex64)], 1)
    image = np.abs(np.fft.ifft2(np.fft.ifftshift(kspace, (-2, -1)), norm="ortho"))
    offset = np.full((2, 1, 1), 0.05, np.float32)
    return np.fft.fftshift(rss(image), (-2, -1))[..., None] - offset[..., None], kspace, mask, offset


def test_data_consistency_keeps_what_was_measured() -> None:
    """Against NumPy: measured samples are the measurement's, the others the network's, with the coils' own phase."""
    image, kspace, mask, offset = _measured()
    model = ConsistentUNet(channels=2, levels=1)
    params = jax.jit(model.init)(jax.random.key(0), image, kspace, mask, offset)["params"]
    for weight in (0.7, 1.0):
        params = params | {"consistency": np.float32([weight])}
        output = jax.jit(model.apply)({"params": params}, image, kspace, mask, offset)[..., 0]
        unet = {name: value for name, value in params.items() if name != "consistency"}
        estimate = np.asarray(jax.jit(TINY.apply)({"params": unet}, image))[..., 0] + offset
        coils = from_kspace(kspace)
        predicted = to_kspace(coils / rss(coils)[:, None] * estimate[:, None])
        mixed = np.where(mask[:, None], (1 - weight) * predicted + weight * kspace, predicted)
        expected = rss(from_kspace(mixed)) - offset
        assert np.abs(expected - np.abs(estimate) + offset).max() > 0.01
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_data_consistency_with_empty_coils_empty_slices_and_bfloat16() -> None:
    """Nothing changes, no gradient is NaN, and errors are of bfloat16's size."""
    inputs, more = _measured(), _measured(empty=2)
    model = ConsistentUNet(channels=2, levels=1)
    params = jax.jit(model.init)(jax.random.key(0), *inputs)
    output = jax.jit(model.apply)(params, *inputs)
    np.testing.assert_allclose(jax.jit(model.apply)(params, *more), output, rtol=1e-5, atol=1e-6)
    half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(params, *inputs)
    assert half.dtype == jnp.float32
    assert 0 < np.linalg.norm(half - output) < 0.05 * np.linalg.norm(output)
    image, kspace, mask, offset = inputs
    kspace[1], image[1], offset[1] = 0, 0, 0
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, image, kspace, mask, offset).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
