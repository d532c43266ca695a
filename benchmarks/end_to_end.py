"""From files to trained parameters: mrjax's own training program beside the PyTorch pipeline, on the same files.

    python -m benchmarks.end_to_end [--case=full --case=small] [--rounds=3] [--json=FILE]

M4Raw-shaped files (18 slices, 4 coils, 60 of 256 columns never sampled) are made in a temporary folder. mrjax is
`mrjax.train.train`, log, TensorBoard and all; the peer is fastMRI's `SliceDataset` with `RandomMaskFunc` and
`UnetDataTransform`, a `DataLoader` of 2 workers, fastMRI's `Unet`, mean squared error, Adam. Both see the same files,
batch, number of steps, channels and levels, and take turns, each time in a new process: in one, each side's threads
would hold up the other's. The second half of each training is timed: starting up,
compiling, validation and checkpoints are in neither's time. Two cases: 'full', 32 channels and 4 levels at 256x256; and
'small', 4 channels and 2 levels at 128x128 without augmentation, where the data path and the dispatch are what counts.
"""

import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from benchmarks.files import make_files
from benchmarks.report import Table, publish, spread
from mrjax import cli
from mrjax.config import defaults
from mrjax.mri.augment import Augment
from mrjax.report.run_log import read_rows
from mrjax.train import train

BATCH, WORKERS = 4, 2


class Case(NamedTuple):
    """What is trained: the image's side, the network's channels and levels, and for how many steps."""

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
    """The run of mrjax: lines of the log at a half and at the end, nothing else in between."""
    config = defaults()
    config.data.dir = str(data)
    config.steps = config.eval_every = config.checkpoint_every = case.steps
    config.log_every = case.steps // 2
    config.batch_size, config.model.channels, config.model.levels = BATCH, case.channels, case.levels
    if not case.augmented:
        config.augment.update({name: 0.0 for name in vars(Augment()) if name.endswith("_p")})
    return config


def run_mrjax(case: Case, data: Path) -> Speed:
    """Trains with the real program; the figures are those of its own log.

    Of the second half: the first starts with an idle device, and counts steps that are still under way at its end.
    """
    cli.keep_compiled_programs()
    logging.getLogger("mrjax").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as workdir:
        train(make_config(case, data), workdir)
        row = [row for row in read_rows(workdir) if "images_per_second" in row][-1]
    return Speed(row["images_per_second"], row.get("data_wait"))


def run_torch(case: Case, data: Path, threads: int) -> Speed:
    """Trains with fastMRI's parts in a plain loop."""
    # Imported here alone, so that the process that trains with mrjax holds none of it.
    import fastmri.data
    import torch
    from fastmri.data.subsample import RandomMaskFunc
    from fastmri.data.transforms import UnetDataTransform
    from fastmri.models import Unet

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transform = UnetDataTransform("multicoil", RandomMaskFunc([0.08], [4]), use_seed=False)
    loader = torch.utils.data.DataLoader(
        # `bool` keeps every sample, as the default does; that one is a lambda, which no other process can be sent.
        fastmri.data.SliceDataset(data / "train", challenge="multicoil", transform=transform, raw_sample_filter=bool),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        # A fork of this process would copy JAX's locks without the threads that hold them.
        multiprocessing_context=multiprocessing.get_context("forkserver"),
    )
    network = Unet(1, 1, chans=case.channels, num_pool_layers=case.levels).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batches, waited, start = iter(loader), 0.0, 0.0
    for number in range(case.steps):
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        waited += time.perf_counter() - asked
        image, target = batch.image.to(device), batch.target.to(device)
        loss = torch.nn.functional.mse_loss(network(image[:, None])[:, 0], target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if number + 1 == case.steps // 2:
            loss.item()
            waited, start = 0.0, time.perf_counter()
    loss.item()
    seconds = time.perf_counter() - start
    return Speed((case.steps - case.steps // 2) * BATCH / seconds, waited / seconds)


def in_new_process(run: Callable[..., Speed], *args: Any) -> Speed:
    """What `run(*args)` gives in a process that has run nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run, *args).result()


def main(argv: list[str]) -> None:
    """Runs both in turn, case by case."""
    import torch  # see run_torch

    cli.expect_no_arguments(argv)
    cores, values = torch.get_num_threads(), flags.FLAGS
    raw: dict[str, Any] = {}
    rows = []
    for name in values.case:
        case = CASES[name]
        if values.steps:
            case = case._replace(steps=values.steps)
        # A small network is often faster on one thread, and its user would soon find out.
        peers = {f"PyTorch, {n} thread{'s' * (n > 1)}": n for n in sorted({1, cores} if name == "small" else {cores})}
        speeds: dict[str, list[Speed]] = {who: [] for who in ("mrjax", *peers)}
        with tempfile.TemporaryDirectory() as folder:
            make_files(Path(folder) / "train", case.size, volumes=8)
            make_files(Path(folder) / "val", case.size, volumes=1, slices=2)
            for _ in range(values.rounds):
                speeds["mrjax"].append(in_new_process(run_mrjax, case, Path(folder)))
                for who, threads in peers.items():
                    speeds[who].append(in_new_process(run_torch, case, Path(folder), threads))
        rates = {who: [one.images_per_second for one in of_one] for who, of_one in speeds.items()}
        waits = {who: [one.waiting for one in of_one if one.waiting is not None] for who, of_one in speeds.items()}
        waiting = {who: statistics.median(of_one) if of_one else None for who, of_one in waits.items()}
        best = max(peers, key=lambda who: statistics.median(rates[who]))
        ratio = statistics.median(a / b for a, b in zip(rates["mrjax"], rates[best], strict=True))
        raw[name] = {**case._asdict(), "images_per_second": rates, "waiting": waits, "ratio": ratio}
        raw[name] |= {"waiting_of_mrjax": waiting["mrjax"]}
        for who in speeds:
            wait = waiting[who]
            rows.append(
                [name, who, spread(rates[who]), None if wait is None else 100 * wait, ratio if who == "mrjax" else ""]
            )
    columns = [
        "case",
        "who",
        "images/s (quartiles)",
        "% of the time waiting for data",
        "images/s over the best PyTorch",
    ]
    shapes = {name: str(CASES[name]._asdict()) for name in values.case}
    config = {"rounds": values.rounds, "batch": BATCH, "workers of PyTorch": WORKERS, **shapes}
    publish("end_to_end", config, [Table("Files to trained parameters", columns, rows)], raw, values.json)


if __name__ == "__main__":
    flags.DEFINE_multi_enum("case", list(CASES), list(CASES), "which to measure; may be given more than once")
    flags.DEFINE_integer("rounds", 3, "how often each side trains")
    flags.DEFINE_integer("steps", 0, "of each training, an even number from 6 on; 0: what the case says", lower_bound=0)
    flags.DEFINE_string("json", None, "file to write everything measured to")
    cli.run(main)
