"""Streams of batches: every example, in an order that nothing but the seed and the files changes."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, to_kspace, write_scan

from mrjax.config import defaults
from mrjax.data import loader, resize, splits
from mrjax.data.buffers import Batch
from mrjax.data.dataset import Dataset, SliceDataset
from mrjax.io import hdf5, readers
from mrjax.io.volume import Volume

SKIP = {"data.on_bad_file": "skip"}


def describe(folder: Path, task: str = "kspace", **changes) -> list[Volume]:
    config = defaults()
    config.update_from_flattened_dict({"task": task} | changes)
    return splits.describe_split(config, readers.find(str(folder)))


def dataset(folder: Path, size: tuple[int, int] = (32, 32), **options) -> SliceDataset:
    return SliceDataset(describe(folder, **options), size)


def draw(datasets: Dataset | list[Dataset], count: int, seed: int = 0, start: int = 0, **options) -> list[Batch]:
    datasets = datasets if isinstance(datasets, list) else [datasets]
    given = loader.LoaderOptions(**{"batch_size": 4} | options)
    with loader.training_batches(datasets, given, seed=seed, start=start) as batches:
        return [next(batches) for _ in range(count)]


def positions(batches) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b["volume"].tolist(), b["slice"].tolist(), strict=True)]


def test_every_epoch_shows_every_slice_once_in_a_new_order(scans: Path) -> None:
    slices = dataset(scans / "train")
    order = positions(draw(slices, 9))
    epochs = [order[i : i + len(slices)] for i in range(0, 36, len(slices))]
    assert len(slices) == 12
    assert all(set(epoch) == set(slices.positions) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != positions(draw(slices, 9, seed=1))


def test_a_stream_resumes_at_any_position(scans: Path) -> None:
    slices = dataset(scans / "train")
    whole, rest = draw(slices, 8), draw(slices, 5, start=12)
    assert positions(rest) == positions(whole[3:])
    assert rest[0]["index"].tolist() == [12, 13, 14, 15]
    assert np.array_equal(rest[0]["kspace"], whole[3]["kspace"])


def test_batches_hold_what_h5py_and_resize_give(scans: Path) -> None:
    write_scan(scans / "train" / "single.t5", 2, 1, seed=5)
    hdf5.write(scans / "train" / "no_coil_axis.t5", {"kspace": to_kspace(coil_images(2, 1, 32, 32))[:, 0]})
    write_scan(scans / "train" / "wide.t5", 2, 2, (32, 48), seed=6)
    slices = dataset(scans / "train")
    paths = readers.find(str(scans / "train"))
    order = np.concatenate([np.random.default_rng((3, epoch)).permutation(len(slices)) for epoch in range(4)])
    for b, batch in enumerate(draw(slices, 9, seed=3)):
        for row in range(4):
            number, i = slices.positions[order[4 * b + row]]
            with h5py.File(paths[number]) as file:
                stored = file["kspace"][i].reshape(-1, 32, file["kspace"].shape[-1])
            kspace = resize.resize_kspace(stored, (32, 32), "kspace")
            assert (batch["volume"][row], batch["slice"][row], batch["index"][row]) == (number, i, 4 * b + row)
            assert np.array_equal(batch["kspace"][row, : len(kspace)], kspace)
            assert not batch["kspace"][row, len(kspace) :].any()


def test_reading_keeps_at_most_64_files_open(tmp_path: Path) -> None:
    for number in range(70):
        write_scan(tmp_path / f"{number}.t5", 1, 1, (8, 8), seed=number)
    before = len(os.listdir("/proc/self/fd"))
    draw(dataset(tmp_path, (8, 8)), 36)
    assert len(os.listdir("/proc/self/fd")) <= before + 64


@pytest.mark.parametrize("shares", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([3], [0, 1, 2])])
def test_processes_share_each_batch_between_them(scans: Path, shares: tuple[list[int], ...]) -> None:
    slices = dataset(scans / "train")
    whole = draw(slices, 4)
    for rows in shares:
        for all_rows, part in zip(whole, draw(slices, 4, rows=rows), strict=True):
            assert all(np.array_equal(part[name], all_rows[name][rows]) for name in all_rows)


@pytest.mark.slow
def test_worker_processes_change_nothing(scans: Path) -> None:
    slices = dataset(scans / "train")
    alone, helped = draw(slices, 7), draw(slices, 7, workers=2)
    for one, other in zip(alone, helped, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_evaluation_shows_every_slice_once_and_marks_padding_as_not_valid(scans: Path) -> None:
    slices = dataset(scans / "train")
    with loader.evaluation_batches([slices], loader.LoaderOptions(8)) as batches:
        batches = list(batches)
    valid = np.concatenate([b["valid"] for b in batches])
    assert [len(b["valid"]) for b in batches] == [8, 8]
    assert [place for place, counts in zip(positions(batches), valid, strict=True) if counts] == slices.positions
    assert valid.sum() == len(slices)
