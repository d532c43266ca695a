"""The host cache: the same batches, each example read once, the memory gone with the last process."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pair, write_scan
from test_loader import dataset, draw

from mrjax.data import buffers, cache
from mrjax.data.buffers import Batch
from mrjax.data.cache import HostCache
from mrjax.data.dataset import ExampleIndices
from mrjax.errors import UserError
from mrjax.parallel import memory


class Counted(ExampleIndices):
    """Counts how often each example is read."""

    def __init__(self, count: int):
        super().__init__(count)
        self.reads = [0] * count

    def read_into(self, number: int, example: Batch) -> None:
        super().read_into(number, example)
        self.reads[number] += 1


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_the_host_cache_gives_the_same_batches_and_reads_each_example_once() -> None:
    counted = Counted(12)
    cached = HostCache(counted)
    assert same(draw(cached, 9), draw(Counted(12), 9))
    # Two threads may ask for an example at once before it is there: in different epochs, as here, they do not.
    assert counted.reads == [1] * 12


@pytest.mark.parametrize("layout", ["kspace", "paired"])
def test_cached_examples_hold_what_the_files_hold(tmp_path: Path, layout: str) -> None:
    for number in range(3):
        if layout == "kspace":
            write_scan(tmp_path / f"{number}.t5", slices=4, seed=number)
        else:
            write_pair(tmp_path / f"{number}.t5", slices=4, seed=number)
    plain = dataset(tmp_path, task=layout)
    expected = draw(plain, 9)
    cached = HostCache(plain)
    assert same(draw(cached, 9), expected)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert same(draw(cached, 9), expected)


@pytest.mark.slow
def test_worker_processes_share_one_cache(scans: Path) -> None:
    plain = dataset(scans / "train")
    expected = draw(plain, 6)
    cached = HostCache(plain)
    assert same(draw(cached, 6, workers=2), expected)
    for path in (scans / "train").iterdir():
        path.write_bytes(b"")
    assert same(draw(cached, 6), expected)


def test_a_cache_that_does_not_fit_names_the_memory_available(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dataset(scans / "train")
    need = 12 * (1 + 2 * 32 * 32 * 8 + 16)
    monkeypatch.setattr(cache, "available_memory", lambda: 2 * need - 1)
    first = HostCache(plain)
    with pytest.raises(UserError, match=r"config\.data\.cache is 'host', which takes .* GB for 12 slices, found"):
        HostCache(plain)
    del first
    HostCache(plain)


def test_available_memory_is_at_most_the_machines() -> None:
    assert 0 < memory.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_each_process_of_a_machine_has_a_share_of_its_memory_for_a_cache_of_its_own(
    scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dataset(scans / "train")
    need = 12 * (1 + 2 * 32 * 32 * 8 + 16)
    monkeypatch.setattr(memory, "_free_memory", lambda: 4 * need - 1)
    HostCache(plain)
    for module in (cache, memory.processes):
        monkeypatch.setattr(module, "count_on_this_machine", lambda: 4)
    with pytest.raises(UserError, match=r"'host', which takes .* available for each of 4 processes of this machine"):
        HostCache(plain)


def test_without_memory_files_a_temporary_file_serves(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARED", False)
    plain = dataset(scans / "train")
    cached = HostCache(plain)
    assert Path(cached._path).is_file()
    assert same(draw(cached, 6), draw(plain, 6))
    path = cached._path
    del cached
    assert not Path(path).exists()


_RUN = """
import sys
from mrjax.data import loader
from mrjax.io import readers
from mrjax.data.cache import HostCache
from mrjax.data.dataset import SliceDataset

def main():
    dataset = SliceDataset([readers.describe(path) for path in readers.find(sys.argv[1])], (32, 32))
    options = loader.LoaderOptions(4, workers=2)
    with loader.training_batches([HostCache(dataset)], options, seed=0, start=0) as batches:
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
