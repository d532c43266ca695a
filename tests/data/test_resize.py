import jax
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace

from mrjax.data import resize

SIZES = [(64, 64), (48, 80), (33, 40), (20, 21), (63, 65)]


@pytest.mark.parametrize("rule", ["kspace", "image"])
@pytest.mark.parametrize("size", SIZES)
def test_kspace_of_any_size_arrives_in_the_files_units(size, rule) -> None:
    images = coil_images(1, 1, *size)[0]
    kspace = resize.resize_kspace(to_kspace(images), (48, 48), rule)
    assert kspace.shape[-2:] == (48, 48)
    image = np.abs(resize.centred_ifft2_host(kspace))[0]
    if rule == "kspace":
        # The zero frequency is the mean of the image, which no change of resolution may touch.
        zero = resize.centred_ifft2_host(kspace).mean()
        assert np.allclose(zero, images.mean(), rtol=1e-4)
    else:
        both = [min(a, b) for a, b in zip(size, (48, 48), strict=True)]
        assert np.allclose(resize.crop_or_pad(image, both), resize.crop_or_pad(np.abs(images[0]), both), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_paired_images_keep_their_aspect_ratio_and_equal_jax_image_resize(size) -> None:
    image = rss(coil_images(1, 1, *size))[0]
    scaled = resize.resize_image(image, (48, 48))
    factor = min(48 / size[0], 48 / size[1])
    inner = tuple(round(n * factor) for n in size)
    expected = jax.image.resize(image, inner, "linear", antialias=True)
    assert np.allclose(resize.crop_or_pad(scaled, inner), expected, atol=1e-5)
    assert resize.undo_resize_image(scaled, size).shape == size
    assert np.isclose(scaled.sum(), resize.crop_or_pad(scaled, inner).sum())


def test_cropping_the_image_leaves_unmeasured_columns_empty() -> None:
    kspace = to_kspace(coil_images(1, 2, 64, 64))
    kspace[..., :8] = 0
    cropped = resize.resize_kspace(kspace, (48, 48), "image")
    columns = cropped.reshape(-1, 48).any(0)
    assert columns.tolist() == [i >= 6 for i in range(48)]


def test_fit_keeps_the_zero_frequency_at_the_centre_for_odd_and_even_sizes() -> None:
    for old in (7, 8):
        for new in (4, 5, 11, 12):
            x = np.zeros((old, old))
            x[old // 2, old // 2] = 1
            fitted = resize.crop_or_pad(x, (new, new))
            assert fitted.shape == (new, new)
            assert fitted[new // 2, new // 2] == 1
