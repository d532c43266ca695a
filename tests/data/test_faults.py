"""Files and worker processes that fail during a run: what is read again, replaced, counted, and what ends the run."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import write_scan
from test_loader import dataset, describe, draw

from mrjax.data import faults, loader
from mrjax.data.buffers import Batch
from mrjax.data.dataset import SliceDataset
from mrjax.data.device_cache import DeviceCache
from mrjax.data.workers import WatchedBatches
from mrjax.errors import UserError
from mrjax.experiment import Experiment
from mrjax.parallel import sharding


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PAUSES", (0.0, 0.0, 0.0))


def truncate(path: Path) -> None:
    """Cut off what follows the headers, in place."""
    os.truncate(path, 4096)


def same(batches: list[Batch], others: list[Batch]) -> bool:
    pairs = zip(batches, others, strict=True)
    return all(np.array_equal(one[name], other[name]) for one, other in pairs for name in one)


def test_read_errors_that_go_away_change_nothing(scans: Path, no_pauses: None, monkeypatch) -> None:
    """Each example fails three times before it is read."""
    slices = dataset(scans / "train")
    expected, read_into, tries = draw(slices, 3), SliceDataset.read_into, dict.fromkeys(range(12), 0)

    def fail_three_times(self: SliceDataset, number: int, example: Batch) -> None:
        tries[number] += 1
        if tries[number] <= 3:
            raise UserError(f"{number}.t5: slice 0 of `kspace` cannot be read (stale file handle)")
        read_into(self, number, example)

    monkeypatch.setattr(SliceDataset, "read_into", fail_three_times)
    assert same(draw(slices, 3, substitute=True), expected)


def test_a_compressed_file_that_comes_back_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.t5"
    with h5py.File(write_scan(tmp_path / "plain.t5", slices=4)) as plain, h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=plain["kspace"], compression="gzip")
    (tmp_path / "plain.t5").unlink()
    slices = dataset(tmp_path)
    expected = draw(slices, 2)
    path.rename(tmp_path / "away")
    timer = threading.Timer(0.3, (tmp_path / "away").rename, (path,))
    timer.start()
    assert same(draw(slices, 2), expected)
    timer.join()


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("harm", [Path.unlink, truncate, write_scan])
def test_a_file_that_vanishes_is_truncated_or_replaced_is_named(
    tmp_path: Path, no_pauses: None, harm, compression
) -> None:
    with h5py.File(write_scan(tmp_path / "a.t5", slices=4), "a") as file:
        kspace = file["kspace"][()]
        del file["kspace"]
        file.create_dataset("kspace", data=kspace, compression=compression, chunks=(1, 2, 32, 32))
    slices = dataset(tmp_path)
    draw(slices, 1)
    harm(tmp_path / "a.t5")
    with pytest.raises(
        UserError, match=r"a\.t5: slice \d of `kspace` cannot be read \(.*in 4 tries, expected the file"
    ):
        draw(slices, 1)


@pytest.mark.slow
@pytest.mark.parametrize("substitute", [False, True])
def test_worker_processes_name_and_replace_as_threads_do(
    scans: Path, caplog: pytest.LogCaptureFixture, substitute: bool
) -> None:
    slices = dataset(scans / "train")
    (scans / "train" / "0_T101.t5").unlink()
    if substitute:
        alone, helped = (draw(slices, 6, workers=workers, substitute=True) for workers in (0, 2))
        assert same(alone, helped)
        lines = [record.message for record in caplog.records if "times another example" in record.message]
        assert len(lines) == 2
        assert lines[0] == lines[1]
    else:
        with pytest.raises(UserError, match=r"0_T101\.t5: slice \d of `kspace` cannot be read"):
            draw(slices, 6, workers=2)


def test_the_same_examples_take_the_place_of_bad_ones_after_a_resume(
    scans: Path, no_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole batches, in which nothing but the bad file's examples differ; named once, counted at the end."""
    slices = dataset(scans / "train")
    good = draw(slices, 9)
    truncate(scans / "train" / "1_T101.t5")
    with caplog.at_level(logging.WARNING, "mrjax"):
        bad = draw(slices, 9, substitute=True)
    assert caplog.text.count("1_T101.t5: slice ") == 1
    assert "9 times another example was read in the place of one of: " in caplog.text
    assert "1_T101.t5 (9)" in caplog.text
    for one, other in zip(good, bad, strict=True):
        kept = one["volume"] != 1
        assert all(np.array_equal(one[name][kept], other[name][kept]) for name in one)
        assert np.array_equal(one["index"], other["index"])
        assert not (other["volume"] == 1).any()
        assert other["kspace"].any((1, 2, 3)).all()
    assert same(draw(slices, 5, start=16, substitute=True), bad[4:])


def test_no_example_left_is_an_error(scans: Path, no_pauses: None) -> None:
    slices = dataset(scans / "train")
    for path in (scans / "train").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"_T101\.t5: slice \d of `kspace` cannot be read"):
        draw(slices, 1, substitute=True)


def test_a_bad_slice_behind_good_headers_blocks_no_resume(
    scans: Path, tiny, no_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    """With config.data.check = 'headers' it is met on the way, wherever the stream begins."""
    path = scans / "train" / "2_T101.t5"
    with h5py.File(path, "a") as file:
        kspace = file["kspace"][()]
        del file["kspace"]
        data = file.create_dataset("kspace", data=kspace, compression="gzip", chunks=(1, *kspace.shape[1:]))
        chunk = data.id.get_chunk_info_by_coord((1, 0, 0, 0))
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(chunk.size))
    experiment = Experiment.from_config(tiny(scans, data__check="headers", data__on_bad_file="skip", batch_size=8))
    streams = []
    for start in (0, 1, 2):
        with experiment.training_batches(start) as batches:
            streams.append([next(batches) for _ in range(4 - start)])
    assert same(streams[1], streams[0][1:])
    assert same(streams[2], streams[0][2:])
    assert "2_T101.t5: slice 1 of `kspace` cannot be read" in caplog.text


def test_scores_are_never_of_other_slices(scans: Path, tiny, no_pauses: None) -> None:
    """A validation file that fails ends the run, 'skip' or not."""
    experiment = Experiment.from_config(tiny(scans, data__on_bad_file="skip", batch_size=8))
    truncate(scans / "val" / "8_T201.h5")
    with pytest.raises(UserError, match=r"8_T201\.h5: slice \d of `kspace` cannot be read"):
        experiment.evaluate(experiment.init_state().eval_params, lambda: False)


def test_a_cache_on_the_devices_holds_others_in_the_place_of_bad_examples(
    scans: Path, no_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    slices, mesh = SliceDataset(describe(scans / "train"), (32, 32)), sharding.make_mesh()
    (scans / "train" / "1_T101.t5").unlink()
    with pytest.raises(UserError, match=r"1_T101\.t5: slice \d of `kspace` cannot be read"):
        DeviceCache(slices, mesh)
    cache = DeviceCache(slices, mesh, substitute=True)
    assert "3 times another example" in caplog.text
    assert sorted(set(np.asarray(cache._stored["volume"]).tolist())) == [0, 2]


def test_a_worker_killed_before_it_is_known_is_an_error_too() -> None:
    """Its batch is lost with its memory, or Grain says so; other errors of a worker are passed on."""

    def fail(sentence: str) -> Iterator[Batch]:
        yield {"index": np.zeros(1)}
        raise RuntimeError(sentence)

    with pytest.raises(UserError, match="a data worker ended, expected"):
        next(WatchedBatches(iter([None])))
    with pytest.raises(UserError, match="a data worker ended, expected"):
        list(WatchedBatches(fail("Worker process was terminated unexpectedly with exit code -9")))
    with pytest.raises(RuntimeError, match="a bug"):
        list(WatchedBatches(fail("a bug")))


@pytest.mark.slow
def test_a_killed_worker_is_noticed_and_named(scans: Path) -> None:
    """Within 10 s, though batches are asked for slowly and others are still in store; and the stream closes."""
    options = loader.LoaderOptions(4, workers=2, prefetch=8)
    with loader.training_batches([dataset(scans / "train")], options, seed=0, start=0) as batches:
        for _ in range(4):
            next(batches)
        victim = multiprocessing.active_children()[-1].pid
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        slowly = (time.sleep(1) for _ in range(10))
        with pytest.raises(UserError, match=rf"a data worker \(process {victim}\) was killed by SIGKILL"):
            list(zip(slowly, batches, strict=False))
    assert time.monotonic() < killed + 10
