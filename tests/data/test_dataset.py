"""Examples of slices: coils, sizes, stored masks, adjacent slices."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import coil_images, read_array, read_example, rss, to_kspace, write_pair, write_scan
from test_loader import dataset, draw, positions

from mrjax.config import defaults
from mrjax.data import splits
from mrjax.data.buckets import bucket_by_size
from mrjax.data.dataset import ExampleIndices, SliceDataset
from mrjax.errors import UserError
from mrjax.io import hdf5, readers
from mrjax.mri.acquire import Acquisition
from mrjax.mri.augment import Augment
from mrjax.mri.tasks import TASKS, training_keys


def test_pairs_are_read_as_stored(tmp_path: Path) -> None:
    for number, dtype in enumerate(("f4", "f8")):
        write_pair(tmp_path / f"{number}.t5", 3, seed=number, dtype=dtype)
    for batch in draw(dataset(tmp_path, task="paired"), 3):
        for row, (number, i) in enumerate(positions([batch])):
            for name in ("input", "target"):
                stored = read_array(tmp_path / f"{number}.t5", name)[i].astype(np.float32)
                assert np.array_equal(batch[name][row], stored)


def test_fewer_coils_are_zero_padded(tmp_path: Path) -> None:
    for coils in (1, 3):
        write_scan(tmp_path / f"{coils}.t5", 1, coils)
    one, three = (read_example(dataset(tmp_path), number)["kspace"] for number in (0, 1))
    assert one.shape == three.shape == (3, 32, 32)
    assert one[0].any()
    assert not one[1:].any()


def test_float64_pairs_of_another_size_become_float32_of_the_wanted_size(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.t5", 2, (31, 50), dtype="f8")
    example = read_example(dataset(tmp_path, (32, 40), task="paired"), 1)
    assert example["input"].shape == example["target"].shape == (32, 40)
    assert example["input"].dtype == np.float32


def test_adjacent_slices_follow_the_slice_and_repeat_at_the_ends(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.t5", slices=4)
    source = SliceDataset([readers.describe(str(path))], (32, 32), adjacent_slices=2)
    assert source.spec["kspace"] == ((5, 2, 32, 32), np.complex64)
    stored = read_array(path, "kspace")
    for i, order in enumerate(([0, 0, 0, 1, 2], [1, 0, 0, 2, 3], [2, 0, 1, 3, 3], [3, 1, 2, 3, 3])):
        assert np.array_equal(read_example(source, i)["kspace"], stored[order])
    images = rss(stored)
    hdf5.write(tmp_path / "b.t5", {"input": images, "target": images[::-1].copy()})
    pairs = SliceDataset([readers.describe(str(tmp_path / "b.t5"))], (32, 32), adjacent_slices=1)
    assert np.array_equal(read_example(pairs, 3)["input"], images[[3, 2, 3]])
    assert np.array_equal(read_example(pairs, 3)["target"], images[0])


def test_example_indices_come_in_the_order_of_the_examples(scans: Path) -> None:
    plain = dataset(scans / "train")
    numbers = draw(ExampleIndices(len(plain), bucket=3), 7)
    for batch, number in zip(draw(plain, 7), numbers, strict=True):
        places = [plain.positions[place] for place in number["example"]]
        assert places == list(zip(batch["volume"], batch["slice"], strict=True))
        assert np.array_equal(batch["index"], number["index"])
    assert numbers[0]["example"].dtype == np.int32
    assert numbers[0]["bucket"].tolist() == [3] * 4


@pytest.mark.parametrize("image_size", [(), (32, 32)])
def test_stored_masks_of_several_widths_are_the_masks_of_the_examples(tmp_path: Path, image_size) -> None:
    config, masks = defaults(), {}
    for width in (32, 40):
        masks[width] = np.random.default_rng(width).random(width) < 0.5
        kspace = to_kspace(coil_images(2, 2, 32, width))
        hdf5.write(tmp_path / f"{width}.t5", {"kspace": kspace, "mask": masks[width]})
    config.acquisition.mask, config.data.image_size = "stored", image_size
    volumes = splits.describe_split(config, readers.find(str(tmp_path)))
    task = TASKS["kspace"](Acquisition(**config.acquisition), Augment(**config.augment))
    for source in bucket_by_size(config.data, volumes):
        examples = [read_example(source, number) for number in range(len(source))]
        for example in examples:
            mask = masks[volumes[int(example["volume"])].data_shape[1]]
            assert np.array_equal(example["mask"][0], mask[4:36] if image_size and len(mask) == 40 else mask)
        batch = jax.tree.map(lambda *x: np.stack(x), *examples)
        made = jax.eval_shape(task, batch, training_keys(0, np.arange(len(examples))))
        assert made.mask.shape == (len(examples), *source.spec["mask"][0])


def test_a_stored_mask_of_another_width_cannot_follow_a_crop_of_the_image(tmp_path: Path) -> None:
    hdf5.write(tmp_path / "a.t5", {"kspace": to_kspace(coil_images(2, 2, 32, 40)), "mask": np.arange(40) % 2})
    volume = dataclasses.replace(readers.describe(str(tmp_path / "a.t5")), undersampled=False)
    with pytest.raises(UserError, match=r"`mask` has shape \(1, 40\), .*resize = 'kspace'"):
        SliceDataset([volume], (32, 32), "image")
