"""A residual VarNet's trust in itself: measured by samples held out, between compressed sensing and its own image."""

import jax
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace
from scipy.optimize import minimize_scalar

from mrjax.models import cross_validation
from mrjax.models.unet import UNet
from mrjax.models.varnet import VarNet
from mrjax.mri.coils import magnitude

PLAIN = VarNet(channels=4, levels=1, cascades=1, residual=True)
hold_out = jax.jit(cross_validation.hold_out)


def test_every_sixth_line_or_sample_is_held_out_and_nothing_of_the_centre() -> None:
    rng, side = np.random.default_rng(0), 64
    centre = np.s_[28:37, 28:37]
    columns, samples = rng.random(side) < 0.5, rng.random((side, side)) < 0.3
    columns[28:36] = True
    samples[centre] = True
    full = np.ones((side, side), bool)
    for mask in (
        columns[None],
        columns & full,
        columns & (np.arange(side) > 10)[:, None],
        columns[:, None] & full,
        columns[:, None] & (np.arange(side) > 10),
    ):
        held = np.asarray(hold_out(mask))
        assert held.any()
        assert (
            held == mask & (held.any(0) if mask.any(1).mean() >= mask.any(0).mean() else held.any(1)[:, None])
        ).all()
        assert not (held & ~mask).any()
        assert not held[-36:-28, 28:36].any()
        assert held.sum() / (mask.sum() * (1 - 8 / columns.sum())) == pytest.approx(1 / 6, rel=0.3)
    held = np.asarray(hold_out(samples))
    assert not (held & ~samples).any()
    assert not held[centre].any()
    assert held.sum() == pytest.approx((samples.sum() - 81) / 6, rel=0.05)
    assert not hold_out(full).any()


def fit(first: np.ndarray, second: np.ndarray, known: np.ndarray) -> tuple[float, float]:
    """The second's share and the scale of the mixture, in SciPy and float64."""
    ridge = 0.1 * (np.linalg.norm(first - known) ** 2 + np.linalg.norm(second - known) ** 2) / 2

    def cost(share: float) -> float:
        error = np.linalg.norm((1 - share) * first + share * second - known) ** 2
        return error + ridge * ((1 - share) ** 2 + share**2)

    share = minimize_scalar(cost, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).x
    predicted = (1 - share) * first + share * second
    return share, np.clip(np.linalg.lstsq(predicted[:, None], known)[0][0].real, 1, 1.25)


def test_shares_and_scale_are_scipys_ridge_regression_at_the_held_out_samples() -> None:
    rng = np.random.default_rng(0)
    # Of all samples of three examples, then of the rest.
    first, second = (rng.normal(size=(2, 6, 3, 8, 6, 2)) @ [1, 1j]).astype(np.complex64)
    held_out = rng.random((3, 1, 6)) < 0.5
    truth = first[3:] + np.array([0.3, 3, 0.5])[:, None, None, None] * (second - first)[3:]
    kspace = (np.array([0.7, 0.37, 3])[:, None, None, None] * truth).astype(np.complex64)
    mixed = jax.jit(cross_validation.mix_by_held_out)(first, second, kspace, held_out)
    fits = []
    for i in range(3):
        known = ((x * held_out[i]).ravel().astype(np.complex128) for x in (first[3 + i], second[3 + i], kspace[i]))
        share, scale = fit(*known)
        np.testing.assert_allclose(mixed[i], scale * ((1 - share) * first[i] + share * second[i]), atol=1e-4)
        fits.append((share, scale))
    shares, scales = np.transpose(fits)
    assert 0.1 < shares[0] < 0.9 < 0.99 < shares[1]
    assert scales[0] == 1 < scales[1] < scales[2] == 1.25
    nothing = np.zeros_like(held_out)
    mixed = cross_validation.mix_by_held_out(first, second, kspace, nothing)
    np.testing.assert_allclose(mixed, second[:3], atol=1e-6)


def scan(coils: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Undersampled k-space (2, coils, 48, 48) with noise, mask and offset; the image without either."""
    rng, images = np.random.default_rng(0), coil_images(2, coils, 48, 48)
    images /= rss(images).max()
    kspace = to_kspace(images + 0.005 * (rng.normal(size=(*images.shape, 2)) @ [1, 1j]))
    mask = rng.random((2, 1, 48)) < 0.3
    mask[..., 20:28] = True
    return (np.where(mask[:, None], kspace, 0).astype(np.complex64), mask, np.zeros((2, 1, 1), np.float32)), rss(images)


@pytest.mark.slow
def test_a_network_that_harms_is_not_trusted_and_keeps_what_was_measured() -> None:
    """Its corrections are random; compressed sensing is what an untrained network gives."""
    given, truth = scan(4)
    network = cross_validation.cross_validated(PLAIN)
    apply, apply_plain = jax.jit(network.apply), jax.jit(PLAIN.apply)
    untrained = jax.device_get(jax.jit(PLAIN.init)(jax.random.key(0), *given))
    rng = np.random.default_rng(1)
    harmful = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), untrained)

    def error(image: jax.Array) -> float:
        return float(np.linalg.norm(image[..., 0] - truth) / np.linalg.norm(truth))

    compressed_sensing = error(apply_plain(untrained, *given))
    assert error(apply_plain(harmful, *given)) > 2 * compressed_sensing
    assert error(apply(harmful, *given)) < 1.15 * compressed_sensing
    fully_sampled = given[0], np.ones_like(given[1]), given[2]
    np.testing.assert_allclose(apply(harmful, *fully_sampled)[..., 0], magnitude(given[0]), atol=1e-5)


def test_only_a_residual_varnet_is_cross_validated() -> None:
    for other in (UNet(), PLAIN.clone(residual=False)):
        assert cross_validation.cross_validated(other) is other
    made = cross_validation.cross_validated(PLAIN)
    assert (made.channels, made.cascades, made.residual) == (4, 1, True)
