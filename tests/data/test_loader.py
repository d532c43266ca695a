import logging
import os
from pathlib import Path

import grain
import h5py
import numpy as np
import pytest
from conftest import coil_images, to_kspace, write_pair, write_scan

from mrjax.data import hdf5, loader, resize, splits
from mrjax.errors import UserError


def read(folder: Path, layout: str = "kspace", **options) -> list[hdf5.Volume]:
    return splits.volumes(hdf5.find(str(folder)), layout, **{"on_bad_file": "error", "read_all": True} | options)


def source(folder: Path, size: tuple[int, int] = (32, 32), **options) -> loader.Slices:
    return loader.Slices(read(folder, **options), size, "kspace")


def draw(slices: loader.Source, count: int, **options) -> list[loader.Batch]:
    options = {"batch_size": 4, "seed": 0, "start": 0, "workers": 0, "prefetch": 2} | options
    with loader.training_batches(slices, **options) as batches:
        return [next(batches) for _ in range(count)]


def places(batches) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b["volume"].tolist(), b["slice"].tolist(), strict=True)]


def test_every_epoch_shows_every_slice_once_in_a_new_order(scans: Path) -> None:
    slices = source(scans / "train")
    order = places(draw(slices, 9))
    epochs = [order[i : i + len(slices)] for i in range(0, 36, len(slices))]
    assert len(slices) == 12
    assert all(set(epoch) == set(slices.where) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != places(draw(slices, 9, seed=1))


def test_the_stream_goes_on_where_it_was_left(scans: Path) -> None:
    slices = source(scans / "train")
    whole, rest = draw(slices, 8), draw(slices, 5, start=12)
    assert places(rest) == places(whole[3:])
    assert rest[0]["index"].tolist() == [12, 13, 14, 15]
    assert np.array_equal(rest[0]["kspace"], whole[3]["kspace"])


def test_batches_hold_what_the_straightforward_way_reads(scans: Path) -> None:
    write_scan(scans / "train" / "single.t5", 2, 1, seed=5)
    hdf5.write(scans / "train" / "no_coil_axis.t5", {"kspace": to_kspace(coil_images(2, 1, 32, 32))[:, 0]})
    write_scan(scans / "train" / "wide.t5", 2, 2, (32, 48), seed=6)
    slices = source(scans / "train")
    paths = hdf5.find(str(scans / "train"))
    stream = grain.MapDataset.range(len(slices)).shuffle(seed=3).repeat()
    for b, batch in enumerate(draw(slices, 9, seed=3)):
        for row in range(4):
            number, i = slices.where[stream[4 * b + row]]
            with h5py.File(paths[number]) as file:
                stored = file["kspace"][i].reshape(-1, 32, file["kspace"].shape[-1])
            kspace = resize.kspace_to(stored, (32, 32), "kspace")
            assert (batch["volume"][row], batch["slice"][row], batch["index"][row]) == (number, i, 4 * b + row)
            assert np.array_equal(batch["kspace"][row, : len(kspace)], kspace)
            assert not batch["kspace"][row, len(kspace) :].any()


def test_pairs_are_read_as_they_are_stored(tmp_path: Path) -> None:
    for number, dtype in enumerate(("f4", "f8")):
        write_pair(tmp_path / f"{number}.t5", 3, seed=number, dtype=dtype)
    for batch in draw(source(tmp_path, layout="paired"), 3):
        for row, (number, i) in enumerate(places([batch])):
            for name in ("input", "target"):
                stored = hdf5.read(str(tmp_path / f"{number}.t5"), name)[i].astype(np.float32)
                assert np.array_equal(batch[name][row], stored)


def test_reading_keeps_no_file_open_but_a_few_of_hdf5s(tmp_path: Path) -> None:
    for number in range(70):
        write_scan(tmp_path / f"{number}.t5", 1, 1, (8, 8), seed=number)
    before = len(os.listdir("/proc/self/fd"))
    draw(source(tmp_path, (8, 8)), 36)
    assert len(os.listdir("/proc/self/fd")) <= before + 64


@pytest.mark.parametrize("shares", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([3], [0, 1, 2])])
def test_processes_share_each_batch_between_them(scans: Path, shares: tuple[list[int], ...]) -> None:
    slices = source(scans / "train")
    whole = draw(slices, 4)
    for rows in shares:
        for all_rows, part in zip(whole, draw(slices, 4, rows=rows), strict=True):
            assert all(np.array_equal(part[name], all_rows[name][rows]) for name in all_rows)


@pytest.mark.slow
def test_worker_processes_change_nothing(scans: Path) -> None:
    slices = source(scans / "train")
    alone, helped = draw(slices, 7), draw(slices, 7, workers=2)
    for one, other in zip(alone, helped, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_evaluation_shows_every_slice_once_and_marks_what_pads_the_last_batch(scans: Path) -> None:
    slices = source(scans / "train")
    with loader.evaluation_batches(slices, batch_size=8, workers=0, prefetch=2) as batches:
        batches = list(batches)
    valid = np.concatenate([b["valid"] for b in batches])
    assert [len(b["valid"]) for b in batches] == [8, 8]
    assert [place for place, counts in zip(places(batches), valid, strict=True) if counts] == slices.where
    assert valid.sum() == len(slices)


def test_volumes_with_fewer_coils_are_padded_with_empty_ones(tmp_path: Path) -> None:
    for coils in (1, 3):
        write_scan(tmp_path / f"{coils}.t5", 1, coils)
    one, three = source(tmp_path)[0]["kspace"], source(tmp_path)[1]["kspace"]
    assert one.shape == three.shape == (3, 32, 32)
    assert one[0].any()
    assert not one[1:].any()


def test_float64_pairs_of_another_shape_become_float32_of_the_wanted_one(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.t5", 2, (31, 50), dtype="f8")
    example = source(tmp_path, (32, 40), layout="paired")[1]
    assert example["input"].shape == example["target"].shape == (32, 40)
    assert example["input"].dtype == np.float32


def test_a_stored_mask_is_applied(tmp_path: Path) -> None:
    kspace = to_kspace(coil_images(1, 2, 16, 16))
    mask = np.arange(16) % 3 == 0
    hdf5.write(tmp_path / "a.t5", {"kspace": kspace, "mask": mask.astype(np.float32)})
    slices = loader.Slices([hdf5.describe(str(tmp_path / "a.t5"))], (16, 16), "kspace")
    assert np.array_equal(slices[0]["kspace"], kspace[0] * mask)
    with pytest.raises(UserError, match="undersampled already"):
        read(tmp_path)


def test_bad_files_stop_the_run_or_are_left_out_and_listed(scans: Path, caplog: pytest.LogCaptureFixture) -> None:
    (scans / "train" / "bad.t5").write_text("nothing")
    kspace = to_kspace(coil_images(3, 2, 32, 32))
    kspace[0] = 0
    hdf5.write(scans / "train" / "edge.t5", {"kspace": kspace})
    with pytest.raises(UserError, match=r"bad\.t5: is not an HDF5 file.*on_bad_file='skip'"):
        read(scans / "train")
    with caplog.at_level(logging.WARNING, "mrjax"):
        kept = read(scans / "train", on_bad_file="skip")
    assert [v.name for v in kept] == ["0_T101", "1_T101", "2_T101", "edge"]
    assert kept[-1].empty == (0,)
    assert "bad.t5" in caplog.text
    assert "edge.t5" in caplog.text
    assert len(loader.Slices(kept, (32, 32), "kspace")) == 14


def test_undersampled_files_with_an_empty_slice_are_not_taken_for_the_truth(scans: Path) -> None:
    kspace = to_kspace(coil_images(3, 2, 32, 32))
    kspace[..., 1::4], kspace[0] = 0, 0
    hdf5.write(scans / "train" / "gaps.t5", {"kspace": kspace})
    kept = read(scans / "train", on_bad_file="skip")
    assert "gaps" not in [v.name for v in kept]


def test_split_folders_are_found_by_our_names_and_by_fastmris(scans: Path, tiny) -> None:
    config = tiny(scans)
    assert len(splits.locate(config.data, "train")) == 3
    (scans / "train").rename(scans / "multicoil_train")
    assert len(splits.locate(config.data, "train")) == 3
    config.data.val = [str(scans / "test")]
    assert splits.locate(config.data, "val") == [str(scans / "test" / "9_FLAIR01.hdf5")]
    (scans / "multicoil_train").rename(scans / "other")
    with pytest.raises(UserError, match=r"config\.data\.dir is .* no folder train/"):
        splits.locate(config.data, "train")


def test_the_fingerprint_changes_with_the_examples(scans: Path) -> None:
    before = splits.fingerprint(read(scans / "train"))
    assert before == splits.fingerprint(read(scans / "train"))
    (scans / "train" / "0_T101.t5").rename(scans / "train" / "7_T101.t5")
    assert before != splits.fingerprint(read(scans / "train"))
