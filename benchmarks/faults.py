"""Break training runs in every way that is promised to be harmless, and show what each cost.

    python -m benchmarks.faults [--kills=50] [--page=docs/reliability.md] [--json=FILE]

A tiny U-Net is trained by `python -m mrjax.main` in processes of its own. Every run that was broken is started again by
the same command until it has all its steps; its parameters are then compared, bit for bit, with those of a run that
nothing happened to. A full disk is a small one of its own, which only root can mount. About 15 minutes on 2 cores.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from benchmarks.files import make_files
from benchmarks.report import Table, page_section, publish, replace_section
from mrjax import cli
from mrjax import config as configs
from mrjax.checkpoint import store
from mrjax.experiment import abstract_state, make_recipe
from mrjax.parallel import sharding
from mrjax.report.run_log import FIRST_STEP, read_rows

STEPS, KILLED_STEPS, CHECKPOINT_EVERY = 500, 2000, 20  # enough to be killed 25 times
FIELDS = {"model.channels": 4, "model.levels": 1, "batch_size": 4, "log_every": 1, "eval_every": 200}
FIELDS |= {"checkpoint_every": CHECKPOINT_EVERY, "augment.contrast_p": 0, "augment.coils_p": 0}
Row = list[str]  # fault, what happened, steps lost, whether the parameters at the end are those of a run without it


class Trial:
    """A workdir, and the data and fields that every start of its run has."""

    def __init__(self, folder: Path, data: Path, processes: int = 1, steps: int = STEPS, **fields: Any):
        self.folder, self.data, self.steps, self.workdir = folder, data, steps, folder / "run"
        self._processes, self._fields = processes, FIELDS | {"data.dir": data, "steps": steps} | fields
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log"

    def start(self, workdir: Path | None = None) -> list[subprocess.Popen[bytes]]:
        """Start the run; only the first process has a log."""
        values = [f"--config.{name}={value}" for name, value in self._fields.items()]
        command = [sys.executable, "-m", "mrjax.main", "--config=configs/unet.py", *values]
        command.append(f"--workdir={workdir or self.workdir}")
        env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        if self._processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self._processes)}
        started = []
        for number in range(self._processes):
            with open(self._log if number == 0 else os.devnull, "w") as log:
                one = env | ({"JAX_PROCESS_ID": str(number)} if self._processes > 1 else {})
                started.append(subprocess.Popen(command, env=one, stderr=log))
        return started

    def finish(self, started: list[subprocess.Popen[bytes]] | None = None) -> int:
        """Wait for the run to end, started now unless it was; return its first process's status."""
        statuses = [process.wait(300) for process in started or self.start()]
        return statuses[0]

    def wait_for(self, condition: Callable[[], Any], started: list[subprocess.Popen[bytes]]) -> None:
        """Wait until a condition holds, at most four minutes; an end of the run before that is an error."""
        end = time.monotonic() + 240
        while not condition():
            if started[0].poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.folder.name}: the fault could not be made:\n{self.log}")
            time.sleep(0.002)

    @property
    def log(self) -> str:
        """What the first process of the last start said."""
        return self._log.read_text()

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint."""
        found = self.workdir.glob("checkpoints/*")
        return max((int(path.name) for path in found if path.name.isdigit()), default=0)

    @property
    def done(self) -> int:
        """The last step in the log, which is one late."""
        rows = read_rows(str(self.workdir))
        return int(rows[-1]["step"]) if rows else 0

    @property
    def resumed(self) -> int:
        """The step that the last start went on from."""
        found = re.search(r"going on after step (\d+)", self.log)
        return int(found.group(1)) if found else 0

    def sentence(self, pattern: str) -> str:
        """Return the last line of the log that a pattern is found in, without this machine's paths and name."""
        lines = [line for line in self.log.splitlines() if re.search(pattern, line)]
        return (
            re.sub(r"/\S*/", "", lines[-1])
            .replace(socket.gethostname(), "HOST")
            .removeprefix("mrjax: ")
            .replace("|", "\\|")
            if lines
            else "not said"
        )

    def stop_at(self, step: int) -> None:
        """Train until a step at least, then stop by SIGTERM."""
        started = self.start()
        self.wait_for(lambda: FIRST_STEP in self.log and self.done >= step, started)
        started[0].terminate()
        self.finish(started)

    def is_saving(self) -> bool:
        """Return whether a checkpoint is half written."""
        return any(self.workdir.glob("checkpoints/*tmp"))


def read_state(trial: Trial) -> list[np.ndarray]:
    """Read parameters and optimizer state of the last step, of however many processes."""
    config = configs.load(json.loads((trial.workdir / "config.json").read_text()))
    abstract = abstract_state(config, make_recipe(config, sharding.make_mesh()))
    targets = {"params": abstract.params, "optimizer": abstract.opt_state}
    items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    with store.open_checkpoints(str(trial.workdir), read_only=True) as manager:
        restored = manager.restore(trial.steps, args=ocp.args.Composite(**items))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(dict(restored.items()))]


def row(fault: str, happened: str, lost: str, trial: Trial, reference: Trial) -> Row:
    """Make a row of the table; compares the parameters and the optimizer state at the end."""
    one, other = map(read_state, (trial, reference))
    same = all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    return [fault, happened, lost, "yes" if same else "NO"]


def kill(trial: Trial, reference: Trial, times: int, moments: random.Random) -> Row:
    """Kill all processes of a run at random moments, every other time while it saves."""
    lost, during_saves = [], 0
    for number in range(times):
        started = trial.start()
        further = trial.saved + moments.randint(0, 2 * CHECKPOINT_EVERY)
        trial.wait_for(lambda: FIRST_STEP in trial.log and trial.saved >= further, started)  # noqa: B023
        if number % 2:
            trial.wait_for(trial.is_saving, started)
        time.sleep(moments.uniform(0, 0.03))
        for process in started:
            process.kill()
        for process in started:
            process.wait()
        during_saves += trial.is_saving()
        lost.append(trial.done - trial.saved)
    status = trial.finish()
    fault = f"{len(started)} process(es) killed at {times} random moments, {during_saves} of them during a save"
    return row(fault, f"went on each time, status {status} at the end", f"{max(lost)} at most", trial, reference)


def damage(trial: Trial, reference: Trial, name: str, spoil: Callable[[Path], None]) -> Row:
    """Damage the newest checkpoint of a run that was stopped."""
    trial.stop_at(trial.steps // 2)
    before = trial.saved
    files = [path for path in (trial.workdir / "checkpoints" / str(before)).rglob("*") if path.is_file()]
    spoil(max(files, key=lambda path: path.stat().st_size))
    trial.finish()
    lost = str(before - trial.resumed)
    return row(f"newest checkpoint: {name}", trial.sentence("is damaged"), lost, trial, reference)


def flip_a_byte(file: Path) -> None:
    """Change one byte in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def stop(trial: Trial, reference: Trial, times: int, moments: random.Random) -> Row:
    """Stop a run by SIGTERM at random moments."""
    lost = []
    for _ in range(times):
        trial.stop_at(trial.saved + moments.randint(1, 3 * CHECKPOINT_EVERY))
        lost.append(trial.done - trial.saved)
    trial.finish()
    return row(f"SIGTERM at {times} moments", "saved and ended with status 0", str(max(lost)), trial, reference)


def fill_disk(trial: Trial, reference: Trial) -> Row:
    """Fill the workdir's disk during a run, and empty it again once the run has said so."""
    trial.workdir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", trial.workdir], check=True)
    try:
        started, filler = trial.start(), trial.workdir / ".filler"
        trial.wait_for(lambda: trial.saved, started)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        trial.wait_for(lambda: "training goes on" in trial.log, started)
        filler.unlink()
        status = trial.finish(started)
        said = trial.sentence("training goes on")
        return row("disk full for a while", f"{said} (status {status})", "0", trial, reference)
    finally:
        subprocess.run(["umount", trial.workdir], check=True)


def run_twice(trial: Trial, reference: Trial) -> Row:
    """Start a second run in the workdir of one that is under way."""
    started = trial.start()
    trial.wait_for(lambda: trial.saved, started)
    second = Trial(trial.folder / "second", trial.data)
    status = second.finish(second.start(trial.workdir))
    trial.finish(started)
    happened = f"the second: {second.sentence('in use')} (status {status})"
    return row("two runs in one workdir", happened, "0", trial, reference)


def lose_file(trial: Trial, reference: Trial, split: str, change: Callable[[Path], None], fault: str) -> Row:
    """Take a data file away, or spoil it, during a run, and put it back before the next start."""
    started = trial.start()
    trial.wait_for(lambda: trial.saved, started)
    path = sorted((trial.data / split).iterdir())[0]
    data = path.read_bytes()
    change(path)
    status = trial.finish(started)
    lost, said = trial.done - trial.saved, trial.sentence("^mrjax: ")
    path.write_bytes(data)
    trial.finish()
    return row(fault, f"{said} (status {status})", str(max(lost, 0)), trial, reference)


def kill_worker(trial: Trial, reference: Trial) -> Row:
    """Kill one of the processes that read."""
    started = trial.start()
    trial.wait_for(lambda: trial.saved, started)
    children = [
        child for task in Path(f"/proc/{started[0].pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    workers = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    begun = time.monotonic()
    status = trial.finish(started)
    happened = f"{trial.sentence('^mrjax: ')} (status {status}, after {time.monotonic() - begun:.1f} s)"
    lost = str(max(trial.done - trial.saved, 0))
    trial.finish()
    return row("a data worker killed", happened, lost, trial, reference)


def substitute(trial: Trial, reference: Trial) -> Row:
    """Take a data file away during a run that is to go on without."""
    started = trial.start()
    trial.wait_for(lambda: trial.saved, started)
    path = sorted((trial.data / "train").iterdir())[0]
    data = path.read_bytes()
    path.unlink()
    status = trial.finish(started)
    path.write_bytes(data)
    fault, happened, lost, same = row(
        "a data file vanishes, data.on_bad_file='skip'", trial.sentence("in the place of one of"), "0", trial, reference
    )
    return [fault, f"{happened} (status {status})", lost, "no, other examples" if same == "NO" else same]


def overflow(trial: Trial) -> Row:
    """Train on data of which a slice is so bright that its squares are infinite."""
    with h5py.File(sorted((trial.data / "train").iterdir())[0], "r+") as file:
        file["kspace"][0] *= np.float32(1e25)
    status = trial.finish()
    skipped = sum(values.get("skipped", 0) for values in read_rows(str(trial.workdir)))
    happened = f"{skipped:.0f} of {trial.steps} steps skipped (status {status})"
    return ["a slice whose squares overflow", happened, "0", "no, other steps"]


def measure(root: Path, kills: int) -> list[Row]:
    """Make data and the runs that nothing happens to, then every fault."""
    data, moments = root / "data", random.Random(0)
    for split, volumes in (("train", 6), ("val", 2)):
        make_files(data / split, 32, volumes, slices=6, coils=2)
    one, long = Trial(root / "one", data), Trial(root / "long", data, steps=KILLED_STEPS)
    two = Trial(root / "two", data, processes=2, steps=KILLED_STEPS)
    for reference in (one, long, two):
        if reference.finish():
            raise RuntimeError(f"a run that nothing happens to failed:\n{reference.log}")
    new: Callable[..., Trial] = lambda name, **fields: Trial(root / name, data, **fields)  # noqa: E731
    faults: list[Callable[[], Row]] = [
        lambda: kill(new("killed", steps=KILLED_STEPS), long, kills // 2, moments),
        lambda: kill(new("killed2", processes=2, steps=KILLED_STEPS), two, kills - kills // 2, moments),
        lambda: stop(new("stopped"), one, 5, moments),
        lambda: damage(new("cut"), one, "cut short", halve),
        lambda: damage(new("flipped"), one, "a byte changed", flip_a_byte),
        lambda: damage(new("missing"), one, "a file is missing", Path.unlink),
        lambda: damage(new("empty"), one, "all its files are gone", lambda file: shutil.rmtree(file.parents[1])),
        lambda: run_twice(new("twice"), one),
        lambda: lose_file(new("vanished"), one, "train", Path.unlink, "a training file vanishes"),
        lambda: lose_file(new("shorter"), one, "train", halve, "a training file is cut short"),
        lambda: lose_file(new("unvalidated"), one, "val", halve, "a validation file is cut short"),
        lambda: kill_worker(new("worker", **{"data.workers": 2}), one),
        lambda: substitute(new("skip", **{"data.on_bad_file": "skip"}), one),
        lambda: overflow(
            Trial(root / "bright", shutil.copytree(data, root / "data2"), 1, STEPS, **{"data.check": "headers"})
        ),
    ]
    if os.geteuid() == 0:
        faults.append(lambda: fill_disk(new("full", steps=KILLED_STEPS), long))
    rows = []
    for fault in faults:
        rows.append(fault())
        print(*rows[-1], sep="; ", flush=True)
    return rows


def halve(file: Path) -> None:
    """Cut a file short."""
    os.truncate(file, file.stat().st_size // 2)


def main(_: list[str]) -> None:
    """Make all faults and publish what they did."""
    values, begun = flags.FLAGS, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), values.kills)
    title = f"Faults, with a checkpoint every {CHECKPOINT_EVERY} steps; in all {time.monotonic() - begun:.0f} s"
    tables = [Table(title, ["fault", "what happened", "steps lost", "parameters identical"], rows)]
    config = {"kills": values.kills}
    publish("faults", config, tables, rows, values.json)
    replace_section(Path(values.page), "faults", page_section("faults", config, tables))


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 50, "how often a run is killed, half of them as two processes")
    flags.DEFINE_string("page", "docs/reliability.md", "page whose section `faults` is rewritten")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
