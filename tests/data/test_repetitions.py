import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import read_array, write_repetitions, write_scan
from scipy import ndimage
from test_loader import SKIP, describe, draw

from mrjax.data import repetitions, splits
from mrjax.data.cache import HostCache
from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.io import hdf5, readers
from mrjax.io.volume import Volume


def head(seed: int = 0, slices: int = 8, size: int = 64) -> np.ndarray:
    """(slices, size, size): a smooth head with structure in it."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (slices, size, size)), indexing="ij")
    inside = (y / 0.8) ** 2 + (x / 0.6) ** 2 + (z / 1.6) ** 2 < 1
    texture = ndimage.gaussian_filter(rng.normal(size=inside.shape), (1, 3, 3))
    return ndimage.gaussian_filter(inside * (1 + 0.3 * texture / texture.std()), (0.7, 1.5, 1.5))


def moved(image: np.ndarray, *, shift: tuple[float, float, float] = (0, 0, 0), degrees: float = 0) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    centre = (np.array(image.shape) - 1) / 2
    return ndimage.affine_transform(image, matrix, centre - matrix @ centre + shift, order=3, mode="nearest")


@pytest.mark.parametrize("shift", [(0, 0, 0.3), (0, -2, 0.5), (0, 6, -4), (0.3, 0, 0), (-1, 1, 0)])
def test_the_displacement_is_found_in_noise_and_at_another_intensity(shift) -> None:
    image, rng = head(), np.random.default_rng(1)
    one, other = (x + rng.normal(0, 0.02, x.shape) for x in (image, 1.2 * moved(image, shift=shift)))
    slices, rows, columns = np.abs(shift)
    for images in ((one, other), (other, one)):
        np.testing.assert_allclose(repetitions.displacement(*images, 20), (rows, columns, slices), atol=0.1, rtol=0.15)
        found = np.array(repetitions.displacement(*images, 1))
        assert found.max() > min(max(rows, columns, slices), 1) * 0.7


@pytest.mark.parametrize("degrees", [2, 10])
def test_a_rotation_displaces_by_its_angle_times_the_distance_from_the_centre(degrees) -> None:
    image = head()
    weight = image**2 / (image**2).sum()
    y, x = np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5, indexing="ij")
    distance = np.sqrt((weight * (x**2 + y**2)).sum())
    rows, columns, slices = repetitions.displacement(image, moved(image, degrees=degrees), 20)
    assert np.hypot(rows, columns) == pytest.approx(2 * np.sin(np.deg2rad(degrees / 2)) * distance, rel=0.05)
    assert slices < 0.05


def test_noise_alone_displaces_nothing_and_one_slice_is_enough() -> None:
    image, rng = head(slices=1), np.random.default_rng(2)
    assert max(repetitions.displacement(image, image, 1)) == 0
    found = repetitions.displacement(*(image + rng.normal(0, 0.2, image.shape) for _ in range(2)), 1)
    assert max(found) < 0.2
    assert repetitions.displacement(image, moved(image, shift=(0, 0, 2)), 20)[:2] == pytest.approx((0, 2), abs=0.1)


def describe_repetitions(folder: Path, task: str = "denoise", **options) -> list[Volume]:
    return describe(folder, task, **options)


def test_a_repetition_that_moved_is_left_out_and_listed_and_noisy_ones_are_kept(tmp_path: Path, caplog) -> None:
    write_repetitions(tmp_path, "1_T1", 3, size=(96, 80), moved={2: 2}, noise=0.02)
    write_repetitions(tmp_path, "1_T2", 3, size=(96, 80), noise=0.4, seed=1)
    write_repetitions(tmp_path, "2_FLAIR", 2, size=(96, 80), moved={1: -3}, noise=0.02, seed=2)
    kept = {volume.name: [Path(path).stem for path in volume.repetitions] for volume in describe_repetitions(tmp_path)}
    assert kept == {
        **{"1_T101": ["1_T103"], "1_T103": ["1_T101"]},
        **{"1_T201": ["1_T202", "1_T203"], "1_T202": ["1_T201", "1_T203"], "1_T203": ["1_T201", "1_T202"]},
    }
    listed = [message for message in caplog.messages if message.startswith("left out: ")]
    assert len(listed) == 3
    assert "1_T102.h5: moved by about 2.0 pixels and 0.0 slices against 1_T101" in listed[0]
    assert "2_FLAIR02.h5: moved by about 3.0" in listed[1]
    assert "2_FLAIR01.h5: has no other repetition" in listed[2]


def test_repetitions_share_folder_study_contrast_and_shape(tmp_path: Path, caplog) -> None:
    write_repetitions(tmp_path / "a", "1_T1", 2)
    write_repetitions(tmp_path / "b", "1_T1", 1)
    write_repetitions(tmp_path / "a", "2_T1", 1)
    write_repetitions(tmp_path / "a", "1_GRE", 2, seed=3)
    write_scan(tmp_path / "a" / "1_T103.h5", slices=4)
    write_scan(tmp_path / "a" / "scan.h5")
    assert [volume.name for volume in describe_repetitions(tmp_path)] == ["1_GRE01", "1_GRE02", "1_T101", "1_T102"]
    alone = {message.split("/")[-1].split(":")[0] for message in caplog.messages if "no other repetition" in message}
    assert alone == {"1_T101.h5", "2_T101.h5", "1_T103.h5", "scan.h5"}
    with pytest.raises(UserError, match="none of the 1 files can be used"):
        describe_repetitions(tmp_path / "b")
    assert [volume.repetitions for volume in describe(tmp_path / "b", "kspace")] == [()]


def test_examples_hold_the_repetitions_and_slices_that_any_of_them_lacks_are_left_out(tmp_path: Path) -> None:
    write_repetitions(tmp_path, "1_T1", 3)
    write_repetitions(tmp_path, "1_T2", 2, seed=1)
    lacking = str(tmp_path / "1_T102.h5")
    data = {name: read_array(lacking, name) for name in ("kspace", "reconstruction_rss")}
    for array in data.values():
        array[1] = 0
    hdf5.write(lacking, data)
    volumes = describe_repetitions(tmp_path, **SKIP)
    source = SliceDataset(volumes, (32, 32))
    assert len(source) == 3 * 2 + 2 * 3
    assert source.spec["repetitions"] == ((2, 2, 32, 32), np.complex64)
    example = {name: np.full(shape, 7, dtype) for name, (shape, dtype) in source.spec.items()}
    for place, (number, i) in enumerate(source.positions):
        source.read_into(place, example)
        assert np.array_equal(example["kspace"], read_array(volumes[number].path, "kspace")[i])
        expected = [read_array(path, "kspace")[i] for path in volumes[number].repetitions]
        assert volumes[number].path not in volumes[number].repetitions
        assert np.array_equal(example["repetitions"][: len(expected)], expected)
        assert not example["repetitions"][len(expected) :].any()
    assert splits.fingerprint(volumes) != splits.fingerprint(describe(tmp_path, "kspace", **SKIP))


def test_repetitions_in_the_folder_of_a_file_are_added(tmp_path: Path) -> None:
    write_repetitions(tmp_path, "1_T1", 4, moved={3: 3}, size=(64, 64), noise=0.02)
    (tmp_path / "1_T105.h5").write_bytes(b"damaged")
    found = repetitions.add_repetitions(readers.describe(str(tmp_path / "1_T102.h5")))
    assert [Path(path).stem for path in found.repetitions] == ["1_T101", "1_T104"]
    assert repetitions.add_repetitions(readers.describe(str(tmp_path / "1_T103.h5"))).repetitions == ()
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "1_T101.h5", tmp_path / "alone")
    assert repetitions.add_repetitions(readers.describe(str(tmp_path / "alone" / "1_T101.h5"))).repetitions == ()


def test_the_stream_of_repetitions_is_the_same_from_memory_and_resumed(tmp_path: Path) -> None:
    write_repetitions(tmp_path, "1_T1", 3)
    write_repetitions(tmp_path, "1_T2", 2, seed=1)
    source = SliceDataset(describe_repetitions(tmp_path), (32, 32), adjacent_slices=1)

    whole = draw(source, 6, 3)
    assert len({batch["kspace"].tobytes() for batch in whole}) == 6
    for other, first in (
        (draw(HostCache(source), 6, 3), 0),
        (draw(source, 3, 3, start=12), 3),
    ):
        for one, two in zip(whole[first:], other, strict=True):
            assert all(np.array_equal(one[name], two[name]) for name in one)
