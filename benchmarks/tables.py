"""Run the benchmarks that fit this machine and rewrite benchmarks/README.md, or gpu.md, from their measurements.

    python -m benchmarks.tables [--readme=FILE] [--aot_python=.venv-aot/bin/python]

Every script runs in its own process. A script that fails leaves a line that says so in place of its tables.
"""

import datetime
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks.report import Table, format_environment, markdown, write_text
from mrjax import cli

INTRODUCTION = """# Benchmarks

Written by `make bench`, which runs the scripts from `step_time` to `fit`; edit `benchmarks/tables.py` instead of this
page. `quality`, `denoising` and `transfer` write their own sections (`make bench-quality`). Each script also runs by
itself, with `--help` and `--json=FILE`:

    python -m benchmarks.step_time    # a training step and its parts, on this machine's devices
    python -m benchmarks.loader       # the data path alone, beside a plain copy and fastMRI's loader
    python -m benchmarks.end_to_end   # files to trained parameters, beside the PyTorch pipeline
    python -m benchmarks.inference    # latency of a slice and of a volume, throughput by batch
    python -m benchmarks.peers        # the same U-Net in PyTorch: eager, compiled, channels_last, bf16
    python -m benchmarks.start_up     # time to the first step, with a cold and a warm compilation cache
    python -m benchmarks.fit --config=configs/unet.py --target=h100    # compiled for devices that are not here
    python -m benchmarks.quality      # PSNR and SSIM beside compressed sensing and fastMRI's U-Net; 40 minutes
    python -m benchmarks.denoising    # denoising learnt with and without clean images; half an hour
    python -m benchmarks.transfer --train=250,250,2400    # real heads, by networks of the demo data; 80 minutes
    python -m benchmarks.soak         # memory, open files and speed of long runs, into docs/reliability.md; 10 minutes
    python -m benchmarks.faults       # kills, damage, full disks, and what they cost, into docs/reliability.md

`make bench-packages` installs the packages we compare with. `fit` needs compilers that `make aot-packages` installs in
an environment of their own, where `make bench` finds them. Times are medians, with the first and third quartile in
brackets. Compared programs take turns in one run, so that a drift of the machine's speed affects them alike. CPUs
differ from one machine to the next: only ratios within one run can be compared. On a CPU with a C++ compiler, mrjax
uses its own convolutions, compiled on first use like PyTorch's compiled forms; without one it uses XLA's slower ones.

[README.md](README.md) is from a machine without an accelerator: its figures for H100 and TPU are of programs that were
compiled for these devices and not run. Measurements on a GPU are in [gpu.md](gpu.md).
"""
_LARGE = ["--size=320", "--batch=32"]  # fastMRI's size, and a batch that fills an accelerator
LIMIT_S = 900  # for one script, so that a hanging one does not keep the others' tables


class Run(NamedTuple):
    """A script with its flags; the summary refers to it by `name`."""

    name: str
    script: str
    flags: Sequence[str] = ()
    ahead_of_time: bool = False

    @property
    def command(self) -> str:
        """The command as a user types it."""
        return shlex.join(["python", "-m", f"benchmarks.{self.script}", *self.flags])


class Outcome(NamedTuple):
    """The JSON that a run wrote, or the reason why there is none."""

    run: Run
    result: dict[str, Any] | None
    trouble: str
    seconds: float
    date: str


def _fit(name: str, target: str, *flags: str, channels: int = 32, batch: int = 16) -> Run:
    network = [f"--config.model.channels={channels}", "--config.data.image_size=256,256"]
    step = ["--config=configs/unet.py", "--config.precision=bfloat16", *network, f"--batch={batch}"]
    return Run(name, "fit", [*step, *flags, f"--target={target}"], ahead_of_time=True)


def runs(backend: str) -> list[Run]:
    """Return the runs for a machine with this JAX backend."""
    if backend != "cpu":
        uncompiled = ["--forms=eager", "--forms=channels_last"]  # PyTorch compiles for half a minute a form and batch
        return [
            Run("step_time, accelerator", "step_time", ["--precision=bfloat16,float32", *_LARGE, "--rounds=20"]),
            Run("peers, accelerator", "peers", ["--precision=bfloat16", "--batch=32", "--rounds=20"]),
            Run("end_to_end, accelerator", "end_to_end", ["--steps=240", "--rounds=1"]),
            Run("start_up, accelerator", "start_up", ["--rounds=1"]),
            Run("inference, accelerator", "inference", ["--precision=bfloat16", "--batches=1,8,32", *uncompiled]),
            Run("loader, accelerator", "loader", ["--epochs=4"]),
        ]
    return [
        Run("step_time", "step_time", ["--precision=float32,bfloat16", "--rounds=3"]),
        Run("loader", "loader"),
        Run("end_to_end", "end_to_end"),
        Run("inference", "inference", ["--rounds=3"]),
        Run("peers", "peers", ["--precision=float32,bfloat16"]),
        Run("start_up", "start_up", ["--rounds=2"]),
        _fit("h100", "h100"),
        _fit("64 h100", "h100:8x8"),
        _fit("wide", "h100", channels=256, batch=1),
        _fit("wide, split", "h100:2x8", "--config.mesh=1,16,1", channels=256, batch=1),
        _fit("v5e", "v5e:1x1"),
        _fit("256 v5e", "v5e:16x16"),
    ]


class Row(NamedTuple):
    """A line of the summary; `value` takes the runs' raw values by name."""

    what: str
    must: str
    aim: str
    run: str
    value: Callable[[dict[str, Any]], float | None]
    unit: str = ""


def _over_peer(precision: str, run: str = "peers") -> Callable[[dict[str, Any]], float]:
    def value(raw: dict[str, Any]) -> float:
        times = {form: statistics.median(seconds) for form, seconds in raw[run][precision].items()}
        return times["mrjax, avg pooling"] / min(t for form, t in times.items() if form.startswith("PyTorch"))

    return value


def _loader_over_peer(files: str) -> Callable[[dict[str, Any]], float]:
    def value(raw: dict[str, Any]) -> float:
        found = raw["loader"]["2 workers"]
        ours, peer = found[f"mrjax{files}"], found[f"fastMRI, mask and transform{files}"]
        return statistics.median(ours["later"]) / statistics.median(peer["later"])

    return value


def _first_over_later(raw: dict[str, Any]) -> float:
    found = raw["loader"]["2 workers"]["mrjax"]
    return found["first"] / statistics.median(found["later"])


def _resident(raw: dict[str, Any]) -> float:
    bytes_by_epoch = raw["loader"]["resident bytes, mrjax, 2 workers"]
    return bytes_by_epoch[-1] / bytes_by_epoch[1]


def _inference(raw: dict[str, Any]) -> float:
    """Return the median over the batches of images/s over those of PyTorch's best form."""
    ratios = []
    for times in raw["inference"]["throughput"].values():
        seconds = {form: statistics.median(rounds) for form, rounds in times.items()}
        ours = seconds.pop("mrjax")
        ratios.append(min(seconds.values()) / ours)
    return statistics.median(ratios)


def _step(raw: dict[str, Any], run: str, precision: str) -> dict[str, Any]:
    return next(found for found in raw[run]["cases"] if found["precision"] == precision)


SUMMARY = [
    Row(
        "training step, float32, 32 channels, 256x256, batch 4: time over the best PyTorch form",
        *("1.10 on JAX 0.10, 0.90 on the newest", "0.65", "peers"),
        _over_peer("float32"),
    ),
    Row("the same in bf16, over PyTorch's best in bf16 autocast", "1.5", "1.0", "peers", _over_peer("bfloat16")),
    Row(
        *("corruption + augmentation, share of the float32 step", "5 %", "2 %", "step_time"),
        lambda raw: 100 * _step(raw, "step_time", "float32")["corruption_and_augmentation_share"],
        "%",
    ),
    Row("loader, slices/s over fastMRI's, 2 workers", "5 x", "20 x", "loader", _loader_over_peer(""), "x"),
    Row("the same of gzip-compressed files", "5 x", "10 x", "loader", _loader_over_peer(", gzip"), "x"),
    Row("first epoch over later ones, slices/s", "0.95", "1.0", "loader", _first_over_later),
    Row(
        *("device waiting for data, end to end", "2 %", "0.2 %", "end_to_end"),
        lambda raw: 100 * raw["end_to_end"]["full"]["waiting_of_mrjax"],
        "%",
    ),
    Row(
        *("files to trained parameters, float32, images/s over the PyTorch pipeline", "1.1 x", "1.5 x", "end_to_end"),
        lambda raw: raw["end_to_end"]["full"]["ratio"],
        "x",
    ),
    Row(
        *("the same, 4 channels, 2 levels, 128x128, no augmentation", "1.5 x", "4 x", "end_to_end"),
        lambda raw: raw["end_to_end"]["small"]["ratio"],
        "x",
    ),
    Row(
        *("compiled for an H100, not run: bf16, 16 images, traffic an image", "0.65 GB", "0.50 GB", "h100"),
        lambda raw: raw["h100"]["traffic_per_image"] / 1e9,
        "GB",
    ),
    Row(
        *("the same: temporary memory", "1.3 GB", "0.9 GB", "h100"),
        lambda raw: raw["h100"]["memory"]["temporary"] / 1e9,
        "GB",
    ),
    Row(
        *("compiled for a TPU v5e, not run: the same step, bytes accessed an image", "1.5 GB", "0.8 GB", "v5e"),
        lambda raw: raw["v5e"]["traffic_per_image"] / 1e9,
        "GB",
    ),
    Row(
        *("the same: temporary memory a chip", "2.5 GB", "1.5 GB", "v5e"),
        lambda raw: raw["v5e"]["memory"]["temporary"] / 1e9,
        "GB",
    ),
    Row(
        *("compiled for 64 H100, not run: memory a device over that of one, data parallel", "1.02", "", "64 h100"),
        lambda raw: raw["64 h100"]["memory"]["needed"] / raw["h100"]["memory"]["needed"],
    ),
    Row(
        *("the same, compiled for 256 chips of TPU v5e", "1.02", "", "256 v5e"),
        lambda raw: raw["256 v5e"]["memory"]["needed"] / raw["v5e"]["memory"]["needed"],
    ),
    Row(
        *("the same: bytes that collectives send in a step over those of the gradients", "1.00", "", "256 v5e"),
        lambda raw: sum(c["bytes"] for c in raw["256 v5e"]["collectives"].values()) / raw["256 v5e"]["gradients"],
    ),
    Row(
        "compiled for 16 H100, not run: parameters + optimizer a device, 256 channels, FSDP, over those of one",
        *("1/14 = 0.0714", "1/16 = 0.0625", "wide, split"),
        lambda raw: raw["wide, split"]["memory"]["state"] / raw["wide"]["memory"]["state"],
    ),
    Row(
        *("second start over the first one, to the end of the first step", "0.35", "0.2", "start_up"),
        lambda raw: raw["start_up"]["ratio"],
    ),
    Row("resident memory after 20 epochs over after 2", "1.02", "1.00", "loader", _resident),
    Row(
        "inference, float32, images/s over the best PyTorch form in inference mode, median over the batches",
        *("1.1 x", "1.5 x", "inference"),
        _inference,
        "x",
    ),
    Row(
        *("one accelerator, 320x320, 32 channels, bf16, batch 32: images/s", "2,000", "", "step_time, accelerator"),
        lambda raw: _step(raw, "step_time, accelerator", "bfloat16")["images_per_second"],
    ),
    Row(
        *("the same: share of the roofline", "40 %", "", "step_time, accelerator"),
        lambda raw: 100 * _step(raw, "step_time, accelerator", "bfloat16")["roofline_share"],
        "%",
    ),
    Row(
        *("one accelerator, 256x256, bf16, batch 32: time over the best PyTorch form", "below 1", ""),
        *("peers, accelerator", _over_peer("bfloat16", "peers, accelerator")),
    ),
    Row(
        *("the accelerator waiting for data, files to parameters", "2 %", "0.2 %", "end_to_end, accelerator"),
        lambda raw: 100 * raw["end_to_end, accelerator"]["full"]["waiting_of_mrjax"],
        "%",
    ),
    Row(
        *("files to parameters, float32, images/s over the PyTorch pipeline", "1.1 x", "", "end_to_end, accelerator"),
        lambda raw: raw["end_to_end, accelerator"]["full"]["ratio"],
        "x",
    ),
]


def execute(run: Run, folder: Path, python: str) -> Outcome:
    """Run a script; a failure is an outcome, too."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    if run.ahead_of_time and not Path(python).exists():
        return Outcome(run, None, "not run: its compilers are not installed (`make aot-packages`)", 0.0, date)
    file, log = folder / f"{run.name}.json", folder / f"{run.name}.log"
    command = [python, "-m", f"benchmarks.{run.script}", *run.flags, f"--json={file}"]
    start = time.perf_counter()
    try:
        with log.open("w") as output:
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT_S).returncode
        trouble = f"failed with exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        trouble = f"stopped after {LIMIT_S} s"
    seconds = time.perf_counter() - start
    try:
        return Outcome(run, json.loads(file.read_text()), "", seconds, date)
    except (OSError, ValueError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = f"{trouble or 'wrote no JSON'}: {lines[-1] if lines else 'it printed nothing'}"
        return Outcome(run, None, reason, seconds, date)


def page(outcomes: Sequence[Outcome], kept: str = "") -> str:
    """Return the page: introduction, summary, a section for each run, and `kept`, the sections of longer scripts."""
    sections = [summary(outcomes), *map(section, outcomes)]
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    return "\n".join([INTRODUCTION, *sections, f"All of it took {minutes:.1f} minutes.\n", kept])


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the table of measurements beside the project's aims."""
    raw: dict[str, Any] = {outcome.run.name: outcome.result["raw"] for outcome in outcomes if outcome.result}
    commands = {outcome.run.name: outcome.run.command for outcome in outcomes}
    rows = []
    for row in (row for row in SUMMARY if row.run in commands):
        try:
            value = row.value(raw)
        except (LookupError, TypeError, ValueError, ArithmeticError, StopIteration):
            value = None  # the run failed, was left out, or could not measure this part
        measured = "not measured" if value is None else f"{value:.3g} {row.unit}".strip()
        rows.append([row.what, measured, row.must, row.aim, f"`{commands[row.run]}`"])
    return markdown(Table("Summary", ["what", "measured", "must", "aim", "command"], rows)) + "\n"


def section(outcome: Outcome) -> str:
    """Return the section of one run: its command, where it ran, its tables."""
    heading = f"## {outcome.run.script}\n\n    {outcome.run.command}\n"
    result = outcome.result
    if result is None:
        return f"{heading}\nOn {outcome.date}: {outcome.trouble}\n"
    config = ", ".join(f"{field}={value}" for field, value in result["config"].items())
    where = f"{format_environment(result)}; {outcome.date}; took {outcome.seconds:.0f} s"
    tables = [markdown(Table(t["title"], t["columns"], t["rows"])) for t in result["tables"]]
    return "\n".join([heading, f"{where}\n", f"{config}\n", *(f"{table}\n" for table in tables)])


def main(_: list[str]) -> None:
    """Run one script after the other; write the page after each, so that an early stop loses no measurement."""
    values = flags.FLAGS
    # In another process: this one must not hold the device's memory.
    print_backend = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(print_backend, capture_output=True, text=True, check=True).stdout.strip()
    outcomes = []
    readme = Path(values.readme or f"benchmarks/{'README' if backend == 'cpu' else backend}.md")
    before = readme.read_text() if readme.exists() else ""
    sections = (before.find(f"## {name}\n") for name in ("quality", "denoising", "transfer"))
    kept = before[min((position for position in sections if position >= 0), default=len(before)) :]
    with tempfile.TemporaryDirectory() as folder:
        for run in runs(backend):
            python = values.aot_python if run.ahead_of_time else sys.executable
            outcomes.append(execute(run, Path(folder), python))
            print(f"{run.name}: {outcomes[-1].trouble or f'{outcomes[-1].seconds:.0f} s'}", flush=True)
            write_text(page(outcomes, kept), readme)
    print(summary(outcomes))


if __name__ == "__main__":
    flags.DEFINE_string("readme", None, "file to write; by default benchmarks/README.md, on a GPU benchmarks/gpu.md")
    flags.DEFINE_string("aot_python", ".venv-aot/bin/python", "interpreter with the packages of `make aot-packages`")
    cli.run(main)
