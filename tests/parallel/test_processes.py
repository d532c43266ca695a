"""Several processes on this machine, connected by gloo: they train as one, stop as one, and end if one is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import one_device_flags, write_scan

from mrjax import train
from mrjax.errors import UserError
from mrjax.parallel import processes

FIELDS = {
    "model.channels": 4,
    "model.levels": 1,
    "model.residual": False,
    "augment.rotation": 15.0,
    "augment.scale": (0.9, 1.1),
    "augment.scale_p": 0.5,
    "augment.flip_vertical_p": 0.0,
    "augment.contrast_p": 0.0,
    "augment.coils_p": 0.0,
    "learning_rate": 1e-5,  # Adam makes whole steps of rounding errors, which stay small here
    "schedule": "constant",
    "warmup": 0.0,
    "log_every": 1,
    "eval_every": 3,
    "checkpoint_every": 3,
}
# What JAX's coordination service says of a process that has ended early, except process 0.
LOST = r"unhealthy \(stopped sending heartbeats\):\n{}\n"


class Group:
    """Processes that run the same command, each with its own log."""

    def __init__(self, command: Sequence[str], count: int, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "XLA_FLAGS": one_device_flags()}
        self._logs = [folder / f"{address}.{number}.log" for number in range(count)]
        self.processes = []
        for number, path in enumerate(self._logs):
            with path.open("w") as log:
                env = os.environ | shared | {"JAX_PROCESS_ID": str(number)}
                self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

    def finish(self, timeout: float = 400) -> tuple[list[int], list[str]]:
        """Wait until all have ended, or kill them after `timeout` seconds; return their statuses and logs."""
        end = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.1, end - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], [path.read_text() for path in self._logs]

    def wait_for_step(self, step: int, workdir: Path) -> None:
        while newest_step(workdir) < step:
            if any(process.poll() is not None for process in self.processes):
                pytest.fail("\n".join(self.finish()[1]))
            time.sleep(0.1)


def start(count: int, data: Path, workdir: Path, steps: int) -> Group:
    fields = FIELDS | {"data.dir": data, "steps": steps}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "mrjax.main", "--config=configs/unet.py", f"--workdir={workdir}", *flags]
    return Group(command, count, workdir.parent)


def newest_step(workdir: Path) -> int:
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0)


def losses(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_two_one_and_two_processes_continue_one_run_through_a_kill_and_a_sigterm(
    scans: Path, tmp_path: Path, tiny
) -> None:
    """Guards the order of the examples, the sum of the gradients, and checkpoints that fit any number of processes.

    One test, because every start of a process takes many seconds.
    """
    whole, workdir = tmp_path / "whole", tmp_path / "parts"
    fields = {name.replace(".", "__"): value for name, value in FIELDS.items()}

    # Two processes, of which one is killed.
    group = start(2, scans, workdir, steps=1_000_000)
    group.wait_for_step(6, workdir)
    group.processes[1].kill()
    status, logs = group.finish(timeout=60)
    assert not {0, 2} & set(status), "\n".join(logs)
    assert re.search(r"Task 1 heartbeat timeout|" + LOST.format(1), logs[0]), logs[0]
    assert "step 3: validation" in logs[0]
    killed = newest_step(workdir)

    # One process.
    train.train(tiny(scans, steps=killed + 2, **fields), str(workdir))

    # Two, of which one is asked to stop.
    group = start(2, scans, workdir, steps=1_000_000)
    group.wait_for_step(killed + 4, workdir)
    group.processes[1].send_signal(signal.SIGTERM)
    status, logs = group.finish()
    assert status == [0, 0], "\n".join(logs)
    assert f"going on after step {killed + 2} of 1000000" in logs[0]
    assert f"stopped; step {newest_step(workdir)} of 1000000 is saved" in logs[0]
    assert not re.search(r"^(process 1 of 2: )?step ", logs[1], re.MULTILINE)  # only the first process reports

    train.train(tiny(scans, steps=killed + 4, **fields), str(whole))
    expected = losses(whole)
    for step in (killed + 2, killed + 4):  # the first step after a start is reported with the second
        expected[step] = (expected[step - 1] + expected[step]) / 2
    found = {step: loss for step, loss in losses(workdir).items() if step in expected}
    assert {2, 3, killed + 2, killed + 4} <= set(found)
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5)
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("count", "failing", "statement", "expected_status", "message", "message_of_others"),
    [
        (3, "0", "os.kill(os.getpid(), 9)", -9, r"\A\Z", r"slice 0 task 0"),
        pytest.param(
            *(4, "2", "raise UserError('a b')", 2, r"^mrjax: process 2 of 4: a b$", LOST.format(2)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(2, "1", "raise KeyError('a')", 1, r"Traceback(.|\n)*^KeyError: 'a'$", LOST.format(1)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(2, "01", "raise UserError('a')", 2, r"\Amrjax: (process 1 of 2: )?a\n\Z", ""), marks=pytest.mark.slow
        ),
        pytest.param(
            *(2, "01", "assert processes.count_on_this_machine() == 2", 0, r"\A\Z", ""), marks=pytest.mark.slow
        ),
    ],
)
def test_a_process_ends_with_its_own_status_and_the_others_name_it(
    tmp_path: Path,
    count: int,
    failing: str,
    statement: str,
    expected_status: int,
    message: str,
    message_of_others: str,
) -> None:
    script = (
        "import os, time\nfrom mrjax.errors import UserError\nfrom mrjax.parallel import processes\n"
        "processes.HEARTBEAT_TIMEOUT = 4\n"
        "with processes.process_group():\n"
        f"    if os.environ['JAX_PROCESS_ID'] in '{failing}':\n        {statement}\n"
        "    else:\n        time.sleep(60)\n"
    )
    status, logs = Group([sys.executable, "-c", script], count, tmp_path).finish(timeout=50)
    for number in range(count):
        if str(number) in failing:
            assert status[number] == expected_status, logs[number]
            assert re.search(message, logs[number], re.MULTILINE), logs[number]
        else:
            assert status[number] == -signal.SIGABRT, logs[number]
            assert re.search(message_of_others, logs[number]), logs[number]


def test_signals_within_two_seconds_are_one_request_and_a_later_one_ends_the_process(monkeypatch) -> None:
    # Where the tests run in the background, SIGINT is ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with processes.stop_on_signal() as should_stop:
        assert not should_stop()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),  # the shell of an allocation
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (3, 4)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, (1, 2)),
        ({"JAX_NUM_PROCESSES": "2"}, "only some of .* are set"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "a number below"),
    ],
)
def test_processes_are_found_by_the_variables_of_their_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int] | str
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", *processes.VARIABLES))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            processes.find_processes()
    else:
        assert processes.find_processes() == expected
        if expected == (0, 1):
            processes.require_one_process("evaluate")
        else:
            with pytest.raises(SystemExit):
                processes.require_one_process("evaluate")


@pytest.mark.slow
def test_several_processes_inspect_a_run_together_and_the_first_speaks(scans: Path, tmp_path: Path) -> None:
    write_scan(scans / "val" / "0_FLAIR01.t5", seed=3)  # of a training subject
    flags = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    flags += [f"--config.data.dir={scans}", f"--workdir={tmp_path / 'run'}", "--preflight"]
    statuses, logs = Group(
        [sys.executable, "-m", "mrjax.main", "--config=configs/unet.py", *flags], 2, tmp_path
    ).finish()
    assert statuses == [1, 1], logs
    assert "PROBLEM" in logs[0]
    assert "to finish: " in logs[0]
    assert "subject" not in logs[1]
    assert not (tmp_path / "run").exists()
