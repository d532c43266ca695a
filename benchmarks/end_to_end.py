"""Train from files to parameters: mrjax's own training program beside the PyTorch pipeline, on the same files.

    python -m benchmarks.end_to_end [--case=full --case=small] [--rounds=3] [--json=FILE]

M4Raw-shaped files (18 slices, 4 coils, 60 of 256 columns never sampled) are made in a temporary folder. mrjax is
`mrjax.train.train` with log and TensorBoard; the peer is fastMRI's `SliceDataset` with `RandomMaskFunc` and
`UnetDataTransform`, a `DataLoader` of 2 workers, fastMRI's `Unet`, mean squared error and Adam. Both use the same
files, batch, number of steps, channels and levels, and take turns, each time in a new process, so that neither's
threads slow the other's. The second half of each training is timed, without start-up, compilation, validation and
checkpoints. Two cases: 'full', 32 channels and 4 levels at 256x256; and 'small', 4 channels and 2 levels at 128x128
without augmentation, where data path and dispatch dominate.
"""

import logging
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from benchmarks.files import make_files
from benchmarks.programs import disable_augmentation
from benchmarks.report import Table, publish, require_packages, spread
from mrjax import cli
from mrjax.config import defaults
from mrjax.report.run_log import read_rows
from mrjax.train import train

BATCH, WORKERS = 4, 2


class Case(NamedTuple):
    """A training: the image's side, the network's channels and levels, whether images are augmented, the steps."""

    size: int
    channels: int
    levels: int
    augmented: bool
    steps: int


class Speed(NamedTuple):
    """Images a second in the second half of a training, and the share of that time spent waiting for batches."""

    images_per_second: float
    waiting: float | None


CASES = {"full": Case(256, 32, 4, True, 6), "small": Case(128, 4, 2, False, 240)}


def make_config(case: Case, data: Path) -> ConfigDict:
    """Return mrjax's config; it logs after half of the steps and at the end, and does nothing else in between."""
    config = defaults()
    config.data.dir = str(data)
    config.steps = config.eval_every = config.checkpoint_every = case.steps
    config.log_every = case.steps // 2
    config.batch_size, config.model.channels, config.model.levels = BATCH, case.channels, case.levels
    if not case.augmented:
        disable_augmentation(config)
    return config


def run_mrjax(case: Case, data: Path) -> Speed:
    """Train with mrjax's program and return the second half's figures from its log.

    The first half starts with an idle device and counts steps that are still running at its end.
    """
    cli.enable_compilation_cache()
    logging.getLogger("mrjax").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as workdir:
        train(make_config(case, data), workdir)
        row = [row for row in read_rows(workdir) if "images_per_second" in row][-1]
    return Speed(row["images_per_second"], row.get("data_wait"))


def run_pytorch(case: Case, data: Path, threads: int) -> Speed:
    """Train with fastMRI's data path and network in a plain loop."""
    from benchmarks import pytorch

    speed, waiting = pytorch.train_from_files(
        data / "train",
        channels=case.channels,
        levels=case.levels,
        steps=case.steps,
        batch=BATCH,
        workers=WORKERS,
        threads=threads,
    )
    return Speed(speed, waiting)


def run_in_new_process(run: Callable[..., Speed], *args: Any) -> Speed:
    """Return `run(*args)`, computed in a process that has run nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run, *args).result()


def measure(case: Case, threads: dict[str, int], rounds: int) -> dict[str, list[Speed]]:
    """Train with mrjax, and with PyTorch on each number of threads, in turn; returns the speeds by name."""
    speeds: dict[str, list[Speed]] = {name: [] for name in ("mrjax", *threads)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder / "train", case.size, volumes=8)
        make_files(folder / "val", case.size, volumes=1, slices=2)
        for _ in range(rounds):
            speeds["mrjax"].append(run_in_new_process(run_mrjax, case, folder))
            for peer, count in threads.items():
                speeds[peer].append(run_in_new_process(run_pytorch, case, folder, count))
    return speeds


def main(_: list[str]) -> None:
    """Measure case by case."""
    require_packages("torch", "fastmri")
    from benchmarks import pytorch

    cores, values, shapes = pytorch.cpu_threads(), flags.FLAGS, {}
    raw: dict[str, Any] = {}
    rows: list[list[Any]] = []
    for name in values.case:
        case = CASES[name]
        if values.steps:
            case = case._replace(steps=values.steps)
        shapes[name] = str(case._asdict())
        # A small network is often faster on one thread, which its user would soon find out.
        counts = sorted({1, cores} if name == "small" else {cores})
        threads = {f"PyTorch, {n} thread{'s' * (n > 1)}": n for n in counts}
        speeds = measure(case, threads, values.rounds)
        rates = {who: [speed.images_per_second for speed in found] for who, found in speeds.items()}
        waits = {who: [speed.waiting for speed in found if speed.waiting is not None] for who, found in speeds.items()}
        waiting = {who: statistics.median(found) if found else None for who, found in waits.items()}
        best = max(threads, key=lambda who: statistics.median(rates[who]))
        ratio = statistics.median(a / b for a, b in zip(rates["mrjax"], rates[best], strict=True))
        raw[name] = {**case._asdict(), "images_per_second": rates, "waiting": waits, "ratio": ratio}
        raw[name] |= {"waiting_of_mrjax": waiting["mrjax"]}
        for who, wait in waiting.items():
            percent = None if wait is None else 100 * wait
            rows.append([name, who, spread(rates[who]), percent, ratio if who == "mrjax" else ""])
    columns = ["case", "who", "images/s (quartiles)", "% of the time waiting for data"]
    columns += ["images/s over the best PyTorch"]
    config = {"rounds": values.rounds, "batch": BATCH, "workers of PyTorch": WORKERS, **shapes}
    publish("end_to_end", config, [Table("Files to trained parameters", columns, rows)], raw, values.json)


if __name__ == "__main__":
    flags.DEFINE_multi_enum("case", list(CASES), list(CASES), "which to measure; may be given more than once")
    flags.DEFINE_integer("rounds", 3, "how often each side trains")
    flags.DEFINE_integer("steps", 0, "steps of each training, even, at least 6; 0: those of the case", lower_bound=0)
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
