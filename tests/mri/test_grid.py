"""A network works on its own grid, and nothing that was measured beyond it is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace

from mrjax.data import resize
from mrjax.mri.coils import magnitude
from mrjax.mri.grid import Grid, crop_or_pad
from mrjax.mri.tasks import Example

OWN = (40, 37)  # of the file
KSPACE = to_kspace(coil_images(2, 3, *OWN))
TARGET = rss(coil_images(2, 3, *OWN))
COLUMNS = np.isin(np.arange(37), [*range(15, 23), *range(0, 37, 3)])[None]
SAMPLES = np.random.default_rng(0).random(OWN) < 0.4


def example(mask: np.ndarray) -> Example:
    kspace = np.where(mask, KSPACE, 0)
    return Example(magnitude(kspace), TARGET, jnp.asarray(kspace), jnp.asarray(np.stack([mask] * 2)))


@pytest.mark.parametrize("size", [(24, 20), (48, 41), (24, 41)])
@pytest.mark.parametrize("rule", ["kspace", "image"])
def test_the_network_is_given_what_the_loader_would_give_it(rule: str, size: tuple[int, int]) -> None:
    """Held to the host's resizing of fully sampled k-space, in NumPy."""
    given = jax.jit(Grid(size, rule, False).to_network)(example(np.ones((1, 37), bool)))
    expected = resize.resize_kspace(KSPACE, size, rule)
    np.testing.assert_allclose(given.kspace, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(given.corrupted, magnitude(expected), atol=1e-4)
    assert given.mask.shape == (2, 1, size[1])


def test_masks_follow_k_space_to_the_networks_grid() -> None:
    cropped = jax.jit(Grid((24, 20), "kspace", True).to_network)(example(SAMPLES))
    assert np.array_equal(cropped.mask[0], SAMPLES[8:32, 8:28])
    assert not np.asarray(cropped.kspace)[0][:, ~SAMPLES[8:32, 8:28]].any()
    columns = np.asarray(jax.jit(Grid((20, 20), "image", True).to_network)(example(COLUMNS)).mask)[0, 0]
    assert columns[9:13].all()  # the 8 of 37 central columns, as 20 columns see them
    assert 0.2 < columns.mean() < 0.7


@pytest.mark.parametrize(
    ("rule", "size", "mask"),
    [
        ("kspace", (), COLUMNS),
        ("kspace", (24, 20), SAMPLES),
        ("image", (48, 41), COLUMNS),
        *(
            pytest.param(*case, marks=pytest.mark.slow)  # ten seconds of compilation in all
            for case in (
                ("kspace", (), SAMPLES),
                ("kspace", (24, 20), COLUMNS),
                ("kspace", (48, 41), COLUMNS),
                ("kspace", (48, 41), SAMPLES),
                ("image", (48, 41), SAMPLES),
            )
        ),
    ],
)
def test_a_network_that_finds_nothing_gives_the_measured_samples_back(rule: str, size, mask: np.ndarray) -> None:
    grid, given = Grid(size, rule, True), example(mask)
    nothing = jnp.zeros((2, *(size or OWN)))
    image = jax.jit(lambda x: grid.from_network(x, given))(nothing)
    assert jnp.linalg.norm(image - TARGET) < jnp.linalg.norm(given.corrupted - TARGET)


@pytest.mark.slow
def test_reconstructions_of_low_resolution_gain_what_was_measured_beyond_it() -> None:
    given, size = example(COLUMNS), (24, 20)
    known = magnitude(resize.resize_kspace(KSPACE, size, "kspace"))  # a perfect network
    errors = []
    for keep in (False, True):
        image = jax.jit(Grid(size, "kspace", keep).from_network)(known, given)
        errors.append(float(jnp.linalg.norm(image - TARGET)))
    assert errors[1] < 0.8 * errors[0]
    assert errors[1] < float(jnp.linalg.norm(given.corrupted - TARGET))


def test_growing_an_image_by_k_space_and_going_back_is_the_identity() -> None:
    small, large = coil_images(2, 1, 33, 41), coil_images(2, 1, 64, 63)
    image, columns = jnp.asarray(rss(small)), jnp.ones((2, 1, 1), bool)
    on_small, on_large = (Example(rss(x), rss(x), jnp.asarray(to_kspace(x)), columns) for x in (small, large))
    grown = jax.jit(Grid((33, 41), "kspace", False).from_network)(image, on_large)
    assert grown.shape == (2, 64, 63)
    back = jax.jit(Grid((64, 63), "kspace", False).from_network)(grown, on_small)
    np.testing.assert_allclose(back, image, atol=1e-5)


def test_beyond_a_networks_field_of_view_lies_the_corrupted_image() -> None:
    given = example(COLUMNS)
    from_network = jax.jit(Grid((24, 20), "image", False).from_network)
    image = np.asarray(from_network(jnp.full((2, 24, 20), 7.0), given))
    inside = np.asarray(crop_or_pad(jnp.ones((24, 20), bool), OWN))
    assert (image[:, inside] == 7).all()
    assert np.array_equal(image[:, ~inside], np.asarray(given.corrupted)[:, ~inside])
