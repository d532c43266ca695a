"""Watch the memory, the open files and the speed of long runs.

    python -m benchmarks.soak [--steps=50000] [--evaluations=20] [--page=docs/reliability.md] [--json=FILE]

`python -m mrjax.main` trains a tiny U-Net on 160 files, with threads and with 2 workers that read, and evaluates and
saves 20 times. Half of the files are compressed and have checksums, so that HDF5 itself reads them: more than the
reader keeps open, and their slices are larger than those of the others. A third run evaluates 20 times in at most 1,000
steps. Resident memory and open files are those of the training process and its workers, seen from outside (Linux only),
and the most in the second and in the last tenth of the steps; speed is the median there.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
from absl import flags

from benchmarks.files import make_files
from benchmarks.report import Table, page_section, publish, replace_section
from mrjax import cli
from mrjax.errors import expect
from mrjax.mri.augment import Augment
from mrjax.report.run_log import read_rows

FILES, INTERVAL_S = 160, 0.1
FIELDS: dict[str, Any] = {"batch_size": 2, "model.channels": 2, "model.levels": 1}
FIELDS |= {f"augment.{name}": 0.0 for name in vars(Augment()) if name.endswith("_p")}


class Sample(NamedTuple):
    """A training process and its workers, `step` being the last one logged."""

    step: int
    resident: int  # bytes
    files: int  # open ones


def make_data(folder: Path) -> None:
    """Write train/ and val/ with files of two sizes, those of one of them compressed and with checksums."""
    for split, count in (("train", FILES), ("val", FILES // 4)):
        make_files(folder / split / "plain", 16, count // 2, slices=2, coils=1)
        make_files(folder / split / "gzip", 24, count // 2, slices=2, coils=1)
        for path in (folder / split / "gzip").iterdir():
            with h5py.File(path, "r+") as file:
                kspace = file["kspace"][()]
                del file["kspace"]
                file.create_dataset(
                    "kspace", data=kspace, chunks=(1, *kspace.shape[1:]), compression="gzip", fletcher32=True
                )


def watch(
    data: Path, workdir: Path, steps: int, evaluations: int, workers: int
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Train, taking samples up to the last step, and return these and the rows of metrics.jsonl."""
    interval = steps // evaluations
    values = FIELDS | {"data.workers": workers, "steps": steps, "eval_every": interval, "checkpoint_every": interval}
    values |= {f"data.{split}": f"{data}/{split}/*/*.h5" for split in ("train", "val")}
    values |= {"log_every": max(steps // 200, 1)}
    command = [sys.executable, "-m", "mrjax.main", "--config=configs/unet.py", f"--workdir={workdir}"]
    samples, log = [], workdir.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, *(f"--config.{n}={value}" for n, value in values.items())], stderr=stderr)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):  # one of them has just ended
                samples.append(take_sample(process.pid, workdir))
            time.sleep(INTERVAL_S)
    finally:
        process.kill()
    if process.returncode:
        raise RuntimeError(f"a training ended with status {process.returncode}: {log.read_text()[-1000:]}")
    return [sample for sample in samples if sample.step < steps], read_rows(str(workdir))


def take_sample(process: int, workdir: Path) -> Sample:
    """Look at a training process and its workers."""
    rows, resident, files = read_rows(str(workdir)), 0, 0
    for member in descendants(process):
        resident += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files += len(os.listdir(f"/proc/{member}/fd"))
    return Sample(rows[-1]["step"] if rows else 0, resident, files)


def descendants(process: int) -> Iterator[int]:
    """Yield a process, its children, their children and so on."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from descendants(int(child))


def second_and_last_tenth(
    values: Iterable[tuple[int, float]], steps: int, combine: Callable[[list[float]], float]
) -> list[float]:
    """Combine the values, each with its step, over the second and over the last tenth of the steps."""
    second, last = [], []
    for step, value in values:
        if 0.1 * steps < step <= 0.2 * steps:
            second.append(value)
        elif 0.9 * steps < step:
            last.append(value)
    expect(second and last, f"--steps is {steps}, of which a tenth went by unseen", "more")
    return [combine(second), combine(last)]


def make_row(name: str, steps: int, samples: list[Sample], rows: list[dict[str, Any]]) -> list[Any]:
    """Compare a run's last tenth with its second."""
    memory = second_and_last_tenth(((s.step, s.resident / 1e6) for s in samples), steps, max)
    files = second_and_last_tenth(((s.step, s.files) for s in samples), steps, max)
    timed = ((row["step"], row["images_per_second"]) for row in rows if "loss" in row)
    speed = second_and_last_tenth(timed, steps, statistics.median)
    return [name, steps, *memory, f"{memory[1] / memory[0]:.3f}", *files, *speed, f"{speed[1] / speed[0]:.3f}"]


def main(_: list[str]) -> None:
    """Train three times and compare the last tenth of each run with its second."""
    values, rows, raw = flags.FLAGS, [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder / "data")
        for run, (steps, evaluations, workers) in {
            "training, no workers": (values.steps, values.evaluations, 0),
            "training, 2 workers": (values.steps, values.evaluations, 2),
            "20 evaluations": (min(values.steps, 1000), 20, 0),
        }.items():
            samples, logged = watch(folder / "data", folder / run.replace(" ", "-"), steps, evaluations, workers)
            rows.append(make_row(run, steps, samples, logged))
            raw[run] = samples
    columns = ["run", "steps", "MB resident at most in the second tenth", "in the last", "ratio"]
    columns += ["open files at most in the second tenth", "in the last"]
    columns += ["images/s in the second tenth", "in the last", "ratio"]
    tables = [Table("The last tenth of long runs over the second", columns, rows)]
    config = {"steps": values.steps, "evaluations": values.evaluations}
    publish("soak", config, tables, raw, values.json)
    replace_section(Path(values.page), "soak", page_section("soak", config, tables))


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 50000, "steps of the first two trainings, a multiple of 200", lower_bound=200)
    flags.DEFINE_integer("evaluations", 20, "evaluations and saves in each of them", lower_bound=1)
    flags.DEFINE_string("page", "docs/reliability.md", "page whose section `soak` is rewritten")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
