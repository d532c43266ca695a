import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pair, write_scan
from test_loader import draw, source

from mrjax.data import buffers, cache, loader
from mrjax.errors import UserError


class Counted(loader.Numbers):
    """Counts how often each example is read."""

    def __init__(self, count: int):
        super().__init__(range(count))
        self.read = [0] * count

    def fill(self, place: int, example: loader.Batch) -> None:
        super().fill(place, example)
        self.read[place] += 1


def same(one: list[loader.Batch], other: list[loader.Batch]) -> bool:
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_the_host_cache_changes_nothing_and_reads_each_example_once() -> None:
    counted = Counted(12)
    cached = cache.HostCache(counted)
    assert same(draw(cached, 9), draw(Counted(12), 9))
    # Two threads may ask for an example at once before it is there: in different epochs, as here, they do not.
    assert counted.read == [1] * 12


@pytest.mark.parametrize("layout", ["kspace", "paired"])
def test_cached_examples_hold_what_the_files_hold(tmp_path: Path, layout: str) -> None:
    for number in range(3):
        if layout == "kspace":
            write_scan(tmp_path / f"{number}.t5", slices=4, seed=number)
        else:
            write_pair(tmp_path / f"{number}.t5", slices=4, seed=number)
    plain = source(tmp_path, layout=layout)
    expected = draw(plain, 9)
    cached = cache.HostCache(plain)
    assert same(draw(cached, 9), expected)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert same(draw(cached, 9), expected)


@pytest.mark.slow
def test_worker_processes_share_one_cache(scans: Path) -> None:
    plain = source(scans / "train")
    expected = draw(plain, 6)
    cached = cache.HostCache(plain)
    assert same(draw(cached, 6, workers=2), expected)
    for path in (scans / "train").iterdir():
        path.write_bytes(b"")
    assert same(draw(cached, 6), expected)


def test_a_cache_that_would_not_fit_says_how_much_there_is(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = source(scans / "train")
    need = 12 * (1 + 2 * 32 * 32 * 8 + 16)
    monkeypatch.setattr(cache, "available_memory", lambda: 2 * need - 1)
    first = cache.HostCache(plain)
    with pytest.raises(UserError, match=r"config\.data\.cache is 'host', which takes .* GB for 12 slices, found"):
        cache.HostCache(plain)
    del first
    cache.HostCache(plain)


def test_the_memory_available_is_within_the_machines() -> None:
    assert 0 < cache.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_without_memory_files_a_temporary_file_serves(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARED", False)
    plain = source(scans / "train")
    cached = cache.HostCache(plain)
    assert Path(cached._path).is_file()
    assert same(draw(cached, 6), draw(plain, 6))
    path = cached._path
    del cached
    assert not Path(path).exists()


def test_a_part_of_the_split_is_read_in_order(scans: Path) -> None:
    plain = source(scans / "train")
    part = cache.read_all(plain, 3, 9)
    assert list(zip(part["volume"], part["slice"], strict=True)) == plain.where[3:9]
    assert all(np.array_equal(part["kspace"][i], plain[3 + i]["kspace"]) for i in range(6))


def test_numbers_come_in_the_order_of_the_examples(scans: Path) -> None:
    plain = source(scans / "train")
    numbers = draw(loader.Numbers(plain), 7)
    for batch, number in zip(draw(plain, 7), numbers, strict=True):
        places = [plain.where[place] for place in number["example"]]
        assert places == list(zip(batch["volume"], batch["slice"], strict=True))
        assert np.array_equal(batch["index"], number["index"])
    assert numbers[0]["example"].dtype == np.int32


def test_memory_is_used_again_only_when_no_view_of_the_batch_is_left() -> None:
    lender = buffers.Buffers({"a": ((4, 3), np.dtype(np.float32)), "b": ((4,), np.dtype(np.int32))})

    def number(value: int) -> loader.Batch:
        return lender.fill(lambda batch: [array.fill(value) for array in batch.values()])

    first = number(1)
    view = first["b"][1:3].reshape(2, 1)
    where = first["a"].ctypes.data
    del first
    second = number(2)
    assert second["a"].ctypes.data != where
    assert view.tolist() == [[1], [1]]
    del view
    third = number(3)
    assert third["a"].ctypes.data == where
    assert (second["a"] == 2).all()
    assert len(lender._own) == 2


def test_a_batch_that_could_not_be_read_gives_its_memory_back() -> None:
    lender = buffers.Buffers({"a": ((4, 3), np.dtype(np.float32))})

    def fail(batch: loader.Batch) -> None:
        raise UserError("damaged")

    for _ in range(3):
        with pytest.raises(UserError, match="damaged"):
            lender.fill(fail)
    assert len(lender._own) == 1


_RUN = """
import sys
from mrjax.data import cache
from mrjax.data import loader
from mrjax.data import hdf5

def main():
    source = loader.Slices([hdf5.describe(path) for path in hdf5.find(sys.argv[1])], (32, 32), "kspace")
    reading = {"batch_size": 4, "seed": 0, "start": 0, "workers": 2, "prefetch": 2}
    with loader.training_batches(cache.HostCache(source), **reading) as batches:
        for batch in batches:
            print(batch["index"][0], flush=True)

if __name__ == "__main__":
    main()
"""


def holders(name: str) -> set[tuple[str, int]]:
    """(process, inode) of every open memory file of that name on this machine."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(f"/memfd:{name}"):
                found.add((link.parts[2], link.stat().st_ino))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not buffers.SHARED, reason="only memory files are sure to end with the last process that has them")
def test_a_killed_run_leaves_no_memory_behind(scans: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    run = subprocess.Popen(
        [sys.executable, str(script), str(scans / "train")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout
    for _ in range(20):
        assert run.stdout.readline()
    mine = {inode for process, inode in holders("mrjax") if process == str(run.pid)}
    processes = {process for process, inode in holders("mrjax") if inode in mine}
    assert len(processes) == 3, "the run and its two workers share the cache"
    run.kill()
    run.stdout.read()  # ends with the last of the three
    run.wait(30)
    assert not {inode for _, inode in holders("mrjax")} & mine
