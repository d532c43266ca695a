"""Time the data path alone: slices a second beside a memory copy and beside fastMRI's loader, first epochs, memory.

    python -m benchmarks.loader [--files=16] [--batch=4] [--rounds=3] [--json=FILE]

Makes M4Raw-shaped files (18 slices, 4 coils, 256x256) in a temporary folder, plain, gzipped, and gzipped after HDF5's
shuffle filter, and small ones (18 slices, 1 coil, 128x128). The samples are noise, of which gzip saves little. Every
loader shuffles, makes batches of the same size and keeps its workers and its position from one round to the next; a
round first draws untimed batches that were read ahead during the others' turns. fastMRI's loader is its `SliceDataset`
under a PyTorch `DataLoader`, with its random mask and `UnetDataTransform` as in its own training (mrjax does that work
on the accelerator), and without both. Before a loader's turn the workers of the others have read ahead and are idle.

A first epoch is timed from the first batch of every worker on, with the files in the page cache. For the rows "read
from disk" the kernel was asked to drop them from it (posix_fadvise); caches of the disk itself and of a virtual
machine's host remain.
"""

import contextlib
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from absl import flags

from benchmarks.report import Table, interleaved, publish, require_packages, spread
from mrjax import cli
from mrjax.data import cache
from mrjax.data.dataset import SliceDataset
from mrjax.data.loader import LoaderOptions, training_batches
from mrjax.errors import UserError
from mrjax.io import hdf5, ismrmrd_header, readers

READ_AHEAD = 20  # more batches than any of the loaders reads ahead
MRJAX, CACHED = "mrjax", "mrjax, cache='host'"
PEER, BARE = "fastMRI, mask and transform", "fastMRI, neither"
GZIP, SHUFFLED = "gzip", "gzip and shuffle"
SLICE_BYTES = 4 * 256 * 256 * 8
Stream = AbstractContextManager[Iterator[Any]]


class Loader(NamedTuple):
    """A way of reading: `stream(workers)` opens an endless stream of batches, `slices` make an epoch."""

    name: str
    stream: Callable[[int], Stream]
    slices: int


class Folders(NamedTuple):
    """Folders of plain, gzipped and small files."""

    plain: str
    gzip: str
    shuffled: str
    small: str


def make_folder(folder: Path, files: int, coils: int, size: int, gzip: bool = False, shuffle: bool = False) -> str:
    """Write files of random k-space."""
    rng = np.random.default_rng(0)
    for number in range(files):
        parts = rng.normal(size=(18, coils, size, size, 2)).astype(np.float32)
        kspace = parts.view(np.complex64)[..., 0]
        target = np.sqrt((np.abs(np.fft.ifft2(kspace, norm="ortho")) ** 2).sum(1)).astype(np.float32)
        path = folder / f"{number}_T101.h5"
        header = ismrmrd_header.header((size, size))
        arrays = {"kspace": kspace, "reconstruction_rss": target, "ismrmrd_header": header}
        hdf5.write(path, arrays, {"max": target.max(), "acquisition": "T1"})
        if gzip:
            with h5py.File(path, "r+") as file:
                del file["kspace"]
                chunks = (1, coils, size, size)
                file.create_dataset("kspace", data=kspace, chunks=chunks, compression="gzip", shuffle=shuffle)
    return str(folder)


def mrjax_loader(name: str, folder: str, batch: int, cached: bool = False) -> Loader:
    """Return mrjax's stream of training batches."""
    volumes = [readers.describe(path) for path in readers.find(folder)]
    slices = SliceDataset(volumes, volumes[0].data_shape)

    def stream(workers: int) -> Stream:
        source = cache.HostCache(slices) if cached else slices
        return training_batches([source], LoaderOptions(batch, workers), seed=0, start=0)

    return Loader(name, stream, len(slices))


def fastmri_loaders(folders: Folders, batch: int) -> tuple[list[Loader], list[Loader]]:
    """Return fastMRI's loaders of the large and of the small files; none if the packages are not installed."""
    try:
        require_packages("torch", "fastmri")
    except UserError as error:
        print(f"fastMRI's loaders are not measured: {error}")
        return [], []
    from benchmarks import pytorch

    def make(name: str, folder: str, transform: Callable[..., Any]) -> Loader:
        endless = pytorch.EndlessLoader(folder, batch, transform)
        return Loader(name, endless.stream, endless.slices)

    large = [
        make(PEER, folders.plain, pytorch.unet_transform()),
        make(BARE, folders.plain, pytorch.unchanged),
        make(f"{PEER}, {GZIP}", folders.gzip, pytorch.unet_transform()),
        make(f"{PEER}, {SHUFFLED}", folders.shuffled, pytorch.unet_transform()),
    ]
    small = [make(PEER, folders.small, pytorch.unet_transform()), make(BARE, folders.small, pytorch.unchanged)]
    return large, small


def time_batches(batches: Iterator[Any], count: int) -> float:
    """Draw `count` batches and return the seconds that they take."""
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start


class Timing(NamedTuple):
    """Speed of a loader.

    Attributes:
      start: seconds to the first batch of every worker, median.
      first: slices a second in the first epoch, median.
      later: slices a second in each later round.
    """

    start: float
    first: float
    later: list[float]


def time_loaders(loaders: list[Loader], workers: int, batch: int, rounds: int) -> dict[str, Timing]:
    """Time first epochs, one loader after the other and newly opened each round, then later epochs in turn."""
    counts = {loader.name: loader.slices // batch for loader in loaders}
    begun = max(workers, 1)
    with contextlib.ExitStack() as stack:
        streams, starts, firsts = {}, {}, {}
        for loader in loaders:
            count = max(counts[loader.name] - begun, 1)
            opened: list[tuple[float, float]] = []
            while len(opened) < rounds:
                wait_for_read_ahead()
                with contextlib.ExitStack() as fresh:
                    begin = time.perf_counter()
                    batches = fresh.enter_context(loader.stream(workers))
                    time_batches(batches, begun)
                    start = time.perf_counter() - begin
                    opened.append((start, count * batch / time_batches(batches, count)))
                    if len(opened) == rounds:
                        streams[loader.name] = batches
                        stack.push(fresh.pop_all())
            starts[loader.name], firsts[loader.name] = map(statistics.median, zip(*opened, strict=True))
        later: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(rounds):
            for name, batches in streams.items():
                wait_for_read_ahead()
                time_batches(batches, READ_AHEAD)
                later[name].append(counts[name] * batch / time_batches(batches, counts[name]))
        return {name: Timing(starts[name], firsts[name], later[name]) for name in streams}


def time_copies(slices: int, size: int, batch: int, rounds: int) -> list[float]:
    """Time a plain copy in memory, from random places of a data set into reused batches; returns slices a second."""
    data = np.ones((slices, size), np.uint8)
    into = np.empty((batch, size), np.uint8)
    order = np.random.default_rng(0).permutation(slices)

    def run() -> None:
        for row, index in enumerate(order):
            np.copyto(into[row % batch], data[index])

    return [slices / seconds for seconds in interleaved({"copy": run}, rounds)["copy"]]


def drop_page_cache(folder: str) -> None:
    """Ask the kernel to drop the files from its page cache."""
    os.sync()
    for path in readers.find(folder):
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def processes() -> list[Path]:
    """Return the folders of this process and of its workers in /proc."""
    numbers = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    return [Path(f"/proc/{number}") for number in numbers]


def wait_for_read_ahead() -> None:
    """Wait until this process and all workers are idle: a slow loader's go on reading after its turn."""

    def cpu_ticks() -> float:
        stats = [(process / "stat").read_text().rpartition(")")[2].split() for process in processes()]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats)

    before, after = -math.inf, cpu_ticks()
    while after - before > 1:
        time.sleep(0.1)
        before, after = after, cpu_ticks()


def resident_bytes() -> int:
    """Return the resident memory of this process and its workers."""
    pages = (int((process / "statm").read_text().split()[1]) for process in processes())
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(loader: Loader, workers: int, batch: int, epochs: int) -> list[int]:
    """Return the resident bytes after each epoch, with all batches read ahead."""
    found = []
    with loader.stream(workers) as batches:
        for _ in range(epochs):
            time_batches(batches, loader.slices // batch)
            wait_for_read_ahead()
            found.append(resident_bytes())
    return found


def memory_rows(loaders: list[Loader], batch: int, epochs: int, raw: dict[str, Any]) -> list[list[Any]]:
    """Measure the memory of mrjax's loaders; adds the values to `raw`."""
    rows = []
    for loader, workers in ((loaders[0], 0), (loaders[0], 2), (loaders[1], 0), (loaders[2], 0)):
        held = measure_memory(loader, workers, batch, epochs)
        raw[f"resident bytes, {loader.name}, {workers} workers"] = held
        rows.append([loader.name, workers, *(held[epoch - 1] / 1e6 for epoch in (1, 2, epochs)), held[-1] / held[1]])
    return rows


def large_rows(
    loaders: list[Loader], plain: str, batch: int, rounds: int, raw: dict[str, Any]
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Time the loaders of large files with 0, 1 and 2 workers; returns rows of later and of first epochs."""
    raw["copy"] = time_copies(loaders[0].slices, SLICE_BYTES, batch, rounds)
    later: list[list[Any]] = [["a plain copy in memory", "", *_rates(raw["copy"]), ""]]
    first: list[list[Any]] = []
    for workers in (0, 1, 2):
        found = time_loaders(loaders, workers, batch, rounds)
        raw[f"{workers} workers"] = {name: timing._asdict() for name, timing in found.items()}
        for name, timing in found.items():
            peer = next((f"{PEER}, {kind}" for kind in (SHUFFLED, GZIP) if kind in name), PEER)
            later.append([name, workers, *_rates(timing.later), _ratio(timing, found.get(peer))])
            first.append([name, workers, *_first_epoch(timing)])
        for loader in (loader for loader in loaders if loader.name in (MRJAX, PEER)):
            drop_page_cache(plain)
            timing = time_loaders([loader], workers, batch, 1)[loader.name]
            raw[f"{workers} workers"][f"{loader.name}, read from disk"] = timing._asdict()
            first.append([f"{loader.name}, read from disk", workers, *_first_epoch(timing)])
    return later, first


def small_rows(loaders: list[Loader], batch: int, rounds: int, raw: dict[str, Any]) -> list[list[Any]]:
    """Time the loaders of small files without workers."""
    found = time_loaders(loaders, 0, batch, rounds)
    raw["128x128, one coil"] = {name: timing._asdict() for name, timing in found.items()}
    rows = []
    for name, timing in found.items():
        milliseconds = 1e3 * batch / statistics.median(timing.later)
        rows.append([name, spread(timing.later), milliseconds, _ratio(timing, found.get(PEER))])
    return rows


def main(_: list[str]) -> None:
    """Make the files, measure and publish."""
    values = flags.FLAGS
    batch, rounds = values.batch, values.rounds
    # Two workers deliver in bursts of four batches: an epoch of 9, of 2 files, took three of them instead of 2.25.
    gzipped = min(values.files, 8)
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = Folders(
            plain=make_folder(root / "plain", values.files, 4, 256),
            gzip=make_folder(root / "gzip", gzipped, 4, 256, gzip=True),
            shuffled=make_folder(root / "shuffled", gzipped, 4, 256, gzip=True, shuffle=True),
            small=make_folder(root / "small", values.files, 1, 128),
        )
        large = [
            mrjax_loader(MRJAX, folders.plain, batch),
            mrjax_loader(CACHED, folders.plain, batch, cached=True),
            mrjax_loader(f"{MRJAX}, {GZIP}", folders.gzip, batch),
            mrjax_loader(f"{MRJAX}, {GZIP}, cache='host'", folders.gzip, batch, cached=True),
            mrjax_loader(f"{MRJAX}, {SHUFFLED}", folders.shuffled, batch),
        ]
        held = memory_rows(large, batch, values.epochs, raw)
        # After the memory, of which importing PyTorch takes more than all loaders.
        fastmri_large, fastmri_small = fastmri_loaders(folders, batch)
        later, first = large_rows([*large, *fastmri_large], folders.plain, batch, rounds, raw)
        small = small_rows([mrjax_loader(MRJAX, folders.small, batch), *fastmri_small], batch, rounds, raw)
    columns = ["data path", "workers"]
    ratio = f"over {PEER}"
    memory_columns = [*columns, "epoch 1", "epoch 2", f"epoch {values.epochs}", f"{values.epochs} over 2"]
    first_columns = [*columns, "s to the first batches", "slices/s", "later epochs", "first over later"]
    later_columns = [*columns, "slices/s", "MB/s", f"{ratio}; same files, same workers"]
    tables = [
        Table("Later epochs: median (quartiles)", later_columns, later),
        Table("First epoch, from the first batch of every worker on", first_columns, first),
        Table("Small slices (128x128, one coil), no workers", ["data path", "slices/s", "ms a batch", ratio], small),
        Table("Resident memory, MB, including the workers'", memory_columns, held),
    ]
    shape = f"4 coils, 256x256, {SLICE_BYTES / 1e6:.1f} MB"
    publish(
        "The data path",
        {"files": values.files, "batch": batch, "rounds": rounds, "slice": shape},
        tables,
        raw,
        values.json,
    )


def _rates(slices: list[float]) -> tuple[str, float]:
    return spread(slices), statistics.median(slices) * SLICE_BYTES / 1e6


def _ratio(timing: Timing, peer: Timing | None) -> float | None:
    return statistics.median(timing.later) / statistics.median(peer.later) if peer else None


def _first_epoch(timing: Timing) -> tuple[float, float, float, float]:
    later = statistics.median(timing.later)
    return timing.start, timing.first, later, timing.first / later


if __name__ == "__main__":
    flags.DEFINE_integer("files", 16, "how many plain files of 18 slices, and as many small ones", lower_bound=2)
    flags.DEFINE_integer("batch", 4, "slices in a batch", lower_bound=1, upper_bound=36)
    flags.DEFINE_integer("epochs", 20, "how many epochs the memory is measured for", lower_bound=2)
    flags.DEFINE_integer("rounds", 3, "how often each loader is timed in its first epoch, and after it", lower_bound=1)
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
