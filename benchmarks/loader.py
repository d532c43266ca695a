"""The data path alone: slices a second beside a memory copy and beside fastMRI's loader, first epochs, memory.

    python -m benchmarks.loader [--files=16] [--batch=4] [--rounds=3] [--json=FILE]

It makes M4Raw-shaped files (18 slices, 4 coils, 256x256) in a temporary folder, plain ones and gzipped ones, and small
ones (18 slices, 1 coil, 128x128). Every loader shuffles, makes batches of the same size and keeps its workers and its
place from one round to the next; a round first draws untimed what was read ahead while the others had their turn.
fastMRI's loader is its `SliceDataset` under a PyTorch `DataLoader`, with its random mask and `UnetDataTransform` as its
own training uses it (in mrjax that work is the accelerator's), and with neither.

A first epoch is timed from its first batch on, and finds the files in the page cache. For the rows "read from disk" the
kernel was asked to drop them from there (posix_fadvise); what the disk itself or a virtual machine's host keeps stays.
"""

import contextlib
import gc
import itertools
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

from benchmarks import report
from mrjax import cli
from mrjax.data import hdf5, ismrmrd, loader, readers, splits
from mrjax.data.cache import HostCache
from mrjax.data.dataset import SliceDataset

AHEAD = 20  # more batches than any of the loaders reads ahead
EPOCHS = 20
PEER, BARE = "fastMRI, mask and transform", "fastMRI, neither"
Stream = AbstractContextManager[Iterator[Any]]


class Loader(NamedTuple):
    """A way of reading: `stream(workers)` opens an endless one of batches, `slices` make an epoch."""

    name: str
    stream: Callable[[int], Stream]
    slices: int


def make(folder: Path, files: int, coils: int, size: int, gzip: bool = False) -> str:
    """Files of noise: what they show does not matter to the time it takes."""
    rng = np.random.default_rng(0)
    for number in range(files):
        parts = rng.normal(size=(18, coils, size, size, 2)).astype(np.float32)
        kspace = parts.view(np.complex64)[..., 0]
        truth = np.sqrt((np.abs(np.fft.ifft2(kspace, norm="ortho")) ** 2).sum(1)).astype(np.float32)
        path = folder / f"{number}_T101.h5"
        header = ismrmrd.header((size, size), (size, size))
        arrays = {"kspace": kspace, "reconstruction_rss": truth, "ismrmrd_header": header}
        hdf5.write(path, arrays, {"max": truth.max(), "acquisition": "T1"})
        if gzip:
            with h5py.File(path, "r+") as file:
                del file["kspace"]
                file.create_dataset("kspace", data=kspace, chunks=(1, coils, size, size), compression="gzip")
    return str(folder)


def ours(name: str, folder: str, batch: int, cached: bool = False) -> Loader:
    """This package's training stream."""
    volumes = splits.describe_split(readers.find(folder), "kspace", on_bad_file="error", read_samples=False)
    slices = SliceDataset(volumes, volumes[0].data_shape)

    def stream(workers: int) -> Stream:
        source = HostCache(slices) if cached else slices
        return loader.training_batches([source], loader.LoaderOptions(batch, workers), seed=0, start=0)

    return Loader(name, stream, len(slices))


def theirs(name: str, folder: str, batch: int, transform: Callable[..., Any]) -> Loader:
    """fastMRI's `SliceDataset` under a `DataLoader`."""
    import torch
    from fastmri.data import SliceDataset

    data = SliceDataset(folder, "multicoil", transform=transform)

    @contextlib.contextmanager
    def stream(workers: int) -> Iterator[Iterator[Any]]:
        loader = torch.utils.data.DataLoader(
            data, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )

        epochs = (loader for _ in iter(int, 1))
        yield itertools.chain.from_iterable(epochs)
        epochs.close()
        del loader
        gc.collect()  # which ends its workers

    return Loader(name, stream, len(data))


def as_stored(kspace: np.ndarray, mask: Any, target: np.ndarray, *_: Any) -> tuple[np.ndarray, np.ndarray]:
    """The transform of fastMRI's loader that does nothing, but for what cannot be put into a batch."""
    return kspace, target


def fastmri_transform() -> Callable[..., Any]:
    """Mask and transform as fastMRI's own training has them."""
    from fastmri.data.subsample import RandomMaskFunc
    from fastmri.data.transforms import UnetDataTransform

    return UnetDataTransform("multicoil", RandomMaskFunc([0.08], [4]), use_seed=False)


def draw(batches: Iterator[Any], count: int) -> float:
    """Seconds that `count` batches take."""
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start


class Timing(NamedTuple):
    """Seconds to the first batch and slices a second in the first epoch, medians, and in each round after it."""

    start: float
    first: float
    later: list[float]


def timings(loaders: list[Loader], workers: int, batch: int, rounds: int) -> dict[str, Timing]:
    """One after the other through their first epoch, each time anew, then in turn."""
    counts = {loader.name: loader.slices // batch for loader in loaders}
    with contextlib.ExitStack() as stack:
        streams, starts, firsts = {}, {}, {}
        for loader in loaders:
            count = counts[loader.name] - 1
            begun: list[tuple[float, float]] = []
            while len(begun) < rounds:
                with contextlib.ExitStack() as fresh:
                    begin = time.perf_counter()
                    batches = fresh.enter_context(loader.stream(workers))
                    next(batches)
                    start = time.perf_counter() - begin
                    begun.append((start, count * batch / draw(batches, count)))
                    if len(begun) == rounds:
                        streams[loader.name] = batches
                        stack.push(fresh.pop_all())
            starts[loader.name], firsts[loader.name] = map(statistics.median, zip(*begun, strict=True))
        later: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(rounds):
            for name, batches in streams.items():
                draw(batches, AHEAD)
                later[name].append(counts[name] * batch / draw(batches, counts[name]))
        return {name: Timing(starts[name], firsts[name], later[name]) for name in streams}


def copies(slices: int, size: int, batch: int, rounds: int) -> list[float]:
    """Slices a second of a plain copy in memory, from everywhere in a data set into batches used again."""
    data = np.ones((slices, size), np.uint8)
    into = np.empty((batch, size), np.uint8)
    order = np.random.default_rng(0).permutation(slices)

    def run() -> None:
        for at, place in enumerate(order):
            np.copyto(into[at % batch], data[place])

    return [slices / seconds for seconds in report.interleaved({"copy": run}, rounds)["copy"]]


def forget_pages(folder: str) -> None:
    """Asks the kernel to drop the files from its cache."""
    os.sync()
    for path in readers.find(folder):
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def resident() -> int:
    """Bytes of memory that this process and its workers hold."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
    pages = (int(Path(f"/proc/{number}/statm").read_text().split()[1]) for number in processes)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def memory(loader: Loader, workers: int, batch: int) -> list[int]:
    """Resident bytes after each epoch."""
    found = []
    with loader.stream(workers) as batches:
        for _ in range(EPOCHS):
            draw(batches, loader.slices // batch)
            found.append(resident())
    return found


def main(argv: list[str]) -> None:
    """Measures, prints and writes."""
    cli.expect_no_arguments(argv)
    values = flags.FLAGS
    batch, rounds = values.batch, values.rounds
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        plain = make(where / "plain", values.files, 4, 256)
        gzip = make(where / "gzip", 2, 4, 256, gzip=True)
        small = make(where / "small", values.files, 1, 128)
        none, host, packed = "mrjax", "mrjax, cache='host'", "mrjax, gzip"
        loaders = [
            ours(none, plain, batch),
            ours(host, plain, batch, cached=True),
            ours(packed, gzip, batch),
            ours(f"{packed}, cache='host'", gzip, batch, cached=True),
        ]
        raw: dict[str, Any] = {}
        held = []
        for loader, workers in ((loaders[0], 0), (loaders[0], 2), (loaders[1], 0), (loaders[2], 0)):
            row = memory(loader, workers, batch)
            raw[f"resident bytes, {loader.name}, {workers} workers"] = row
            held.append([loader.name, workers, *(row[epoch - 1] / 1e6 for epoch in (1, 2, EPOCHS)), row[-1] / row[1]])

        tiny = [ours(none, small, batch)]
        try:  # after the memory, of which PyTorch takes more than all of this
            loaders += [
                theirs(PEER, plain, batch, fastmri_transform()),
                theirs(BARE, plain, batch, as_stored),
                theirs(f"{PEER}, gzip", gzip, batch, fastmri_transform()),
            ]
            tiny += [theirs(PEER, small, batch, fastmri_transform()), theirs(BARE, small, batch, as_stored)]
        except ImportError:
            print("PyTorch or fastmri is not installed (pip install 'mrjax[bench]'; pip install --no-deps fastmri)")

        nbytes = 4 * 256 * 256 * 8
        raw["copy"] = copies(loaders[0].slices, nbytes, batch, rounds)
        speed: list[list[Any]] = [["a plain copy in memory", "", *_rates(raw["copy"], nbytes), ""]]
        first: list[list[Any]] = []
        for workers in (0, 1, 2):
            found = timings(loaders, workers, batch, rounds)
            raw[f"{workers} workers"] = {key: timing._asdict() for key, timing in found.items()}
            for key, timing in found.items():
                peer = f"{PEER}, gzip" if "gzip" in key else PEER
                speed.append([key, workers, *_rates(timing.later, nbytes), _over(timing, found.get(peer))])
                first.append([key, workers, *_first(timing)])
            for loader in (one for one in loaders if one.name in (none, PEER)):
                forget_pages(plain)
                timing = timings([loader], workers, batch, 1)[loader.name]
                raw[f"{workers} workers"][f"{loader.name}, read from disk"] = timing._asdict()
                first.append([f"{loader.name}, read from disk", workers, *_first(timing)])

        found = timings(tiny, 0, batch, rounds)
        raw["128x128, one coil"] = {key: timing._asdict() for key, timing in found.items()}
        light = [
            [
                key,
                report.spread(timing.later),
                1e3 * batch / statistics.median(timing.later),
                _over(timing, found.get(PEER)),
            ]
            for key, timing in found.items()
        ]

    columns = ["data path", "workers"]
    report.publish(
        "The data path",
        {"files": values.files, "batch": batch, "rounds": rounds, "slice": f"4 coils, 256x256, {nbytes / 1e6:.1f} MB"},
        [
            report.Table(
                "Later epochs: median (quartiles)",
                [*columns, "slices/s", "MB/s", f"over {PEER}; same files, same workers"],
                speed,
            ),
            report.Table(
                "First epoch, from its first batch on",
                [*columns, "s to the first batch", "slices/s", "later epochs", "first over later"],
                first,
            ),
            report.Table(
                "Small slices (128x128, one coil), no workers",
                ["data path", "slices/s", "ms a batch", f"over {PEER}"],
                light,
            ),
            report.Table(
                "Resident memory, MB, with the workers'",
                [*columns, "epoch 1", "epoch 2", f"epoch {EPOCHS}", f"{EPOCHS} over 2"],
                held,
            ),
        ],
        raw,
        values.json,
    )


def _rates(slices: list[float], nbytes: int) -> tuple[str, float]:
    return report.spread(slices), statistics.median(slices) * nbytes / 1e6


def _over(timing: Timing, peer: Timing | None) -> float | None:
    return statistics.median(timing.later) / statistics.median(peer.later) if peer else None


def _first(timing: Timing) -> tuple[float, float, float, float]:
    later = statistics.median(timing.later)
    return timing.start, timing.first, later, timing.first / later


if __name__ == "__main__":
    flags.DEFINE_integer("files", 16, "how many plain files of 18 slices, and as many small ones", lower_bound=2)
    flags.DEFINE_integer("batch", 4, "slices in a batch", lower_bound=1, upper_bound=36)
    flags.DEFINE_integer("rounds", 3, "how often each loader is timed in its first epoch, and after it", lower_bound=1)
    flags.DEFINE_string("json", None, "file to write everything measured to")
    cli.run(main)
