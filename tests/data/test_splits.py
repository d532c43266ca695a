"""The files of a split are found, checked, and left out or refused."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import coil_images, read_example, to_kspace
from test_loader import SKIP, describe

from mrjax.data import splits
from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.io import hdf5, readers


def test_a_stored_mask_is_applied(tmp_path: Path) -> None:
    kspace = to_kspace(coil_images(1, 2, 16, 16))
    mask = np.arange(16) % 3 == 0
    hdf5.write(tmp_path / "a.t5", {"kspace": kspace, "mask": mask.astype(np.float32)})
    slices = SliceDataset([readers.describe(str(tmp_path / "a.t5"))], (16, 16))
    assert np.array_equal(read_example(slices, 0)["kspace"], kspace[0] * mask)
    with pytest.raises(UserError, match="undersampled already"):
        describe(tmp_path)


def test_bad_files_raise_or_are_left_out_and_logged(scans: Path, caplog: pytest.LogCaptureFixture) -> None:
    (scans / "train" / "bad.t5").write_text("nothing")
    with pytest.raises(UserError, match=r"bad\.t5: is not an HDF5 file.*on_bad_file='skip'"):
        describe(scans / "train")
    with caplog.at_level(logging.WARNING, "mrjax"):
        kept = describe(scans / "train", **SKIP)
    assert [v.name for v in kept] == ["0_T101", "1_T101", "2_T101"]
    assert "bad.t5" in caplog.text


def test_empty_slices_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kspace = to_kspace(coil_images(3, 2, 32, 32))
    kspace[0] = 0
    hdf5.write(tmp_path / "edge.t5", {"kspace": kspace})
    with caplog.at_level(logging.WARNING, "mrjax"):
        (kept,) = describe(tmp_path)
    assert SliceDataset([kept], (32, 32)).positions == [(0, 1), (0, 2)]
    assert "edge.t5: nothing but zeros in slice 0, training and evaluation leave them out" in caplog.text
    hdf5.write(tmp_path / "edge.t5", {"kspace": 0 * kspace})
    with pytest.raises(UserError, match="holds nothing but zeros"):
        describe(tmp_path)


def test_undersampled_files_with_an_empty_slice_are_no_targets(scans: Path) -> None:
    kspace = to_kspace(coil_images(3, 2, 32, 32))
    kspace[..., 1::4], kspace[0] = 0, 0
    hdf5.write(scans / "train" / "gaps.t5", {"kspace": kspace})
    kept = describe(scans / "train", **SKIP)
    assert "gaps" not in [v.name for v in kept]


def test_split_folders_are_found_by_our_and_by_fastmris_names(scans: Path, tiny) -> None:
    config = tiny(scans)
    assert len(splits.find_split(config.data, "train")) == 3
    (scans / "train").rename(scans / "multicoil_train")
    assert len(splits.find_split(config.data, "train")) == 3
    config.data.val = [str(scans / "test")]
    assert splits.find_split(config.data, "val") == [str(scans / "test" / "9_FLAIR01.hdf5")]
    (scans / "multicoil_train").rename(scans / "other")
    with pytest.raises(UserError, match=r"config\.data\.dir is .* no folder train/"):
        splits.find_split(config.data, "train")


def test_a_subject_in_two_splits_is_named_by_the_first_file_in_each(tmp_path: Path) -> None:
    pair = {"input": np.ones((1, 16, 16)), "target": np.ones((1, 16, 16))}
    files = {
        "train/2022061001_T101": {},
        "train/2022061001_T201": {},
        "train/file_brain_AXT2_200_2000001": {"patient_id": "ab"},
        "train/scan": {},
        "val/2022061001_FLAIR02": {},
        "val/file_brain_AXT1_200_6000001": {"patient_id": np.bytes_("ab")},
        "val/scan": {},  # a name that says nothing
        "test/file1000001": {},
        "test/2022061002_T101": {},
    }
    for name, attributes in files.items():
        hdf5.write(tmp_path / f"{name}.h5", pair, attributes)
    volumes = {
        split: [readers.describe(path) for path in readers.find(str(tmp_path / split))]
        for split in ("train", "val", "test")
    }
    (sentence,) = splits.find_shared_subjects(volumes)
    assert sentence.startswith(f"{tmp_path}/val/2022061001_FLAIR02.h5 (val) shows the same subject as ")
    assert f"{tmp_path}/train/2022061001_T101.h5 (train), and 1 more do" in sentence
    shutil.copytree(tmp_path / "test", tmp_path / "copy")
    copied = [readers.describe(path) for path in readers.find(str(tmp_path / "copy"))]
    assert "1 more" in splits.find_shared_subjects({"test": volumes["test"], "train": copied})[0]
    assert splits.find_shared_subjects({"train": volumes["train"], "val": volumes["train"]})


def test_the_fingerprint_changes_with_the_examples(scans: Path) -> None:
    before = splits.fingerprint(describe(scans / "train"))
    assert before == splits.fingerprint(describe(scans / "train"))
    (scans / "train" / "0_T101.t5").rename(scans / "train" / "7_T101.t5")
    assert before != splits.fingerprint(describe(scans / "train"))
