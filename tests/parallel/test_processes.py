"""Several processes on this machine, connected by gloo: they train as one does, stop as one, and go on as one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import newest_step, rows, small_config  # noqa: F401

from mrjax.errors import UserError
from mrjax.parallel import processes


def start(count: int, devices: int, data: Path, workdir: Path, config: Path, *fields: str) -> list[subprocess.Popen]:
    """`count` processes of `devices` simulated devices each, logging to files beside the workdir."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    command = [
        *(sys.executable, "-m", "mrjax.main", f"--config={config}", f"--workdir={workdir}"),
        *(f"--config.data.dir={data}", *fields),
    ]
    processes = []
    for number in range(count):
        # Every process compiles, on few cores: quickly rather than well.
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        env = os.environ | {"XLA_FLAGS": flags} | together
        if together:
            env["JAX_PROCESS_ID"] = str(number)
        with log_of(workdir, number).open("w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return processes


def log_of(workdir: Path, number: int) -> Path:
    return workdir.with_name(f"{workdir.name}.{number}.log")


def finish(processes: list[subprocess.Popen], workdir: Path, timeout: float = 400) -> list[str]:
    """Waits for all; their logs. None is left behind, whatever happens."""
    end = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    return [log_of(workdir, number).read_text() for number in range(len(processes))]


def run(count: int, devices: int, *args, status: int = 0) -> list[str]:
    processes = start(count, devices, *args)
    logs = finish(processes, args[1])
    assert [process.returncode for process in processes] == [status] * count, "\n".join(logs)
    return logs


def wait_for_step(step: int, processes: list[subprocess.Popen], workdir: Path) -> None:
    while newest_step(workdir) < step:
        if any(process.poll() is not None for process in processes):
            pytest.fail("\n".join(finish(processes, workdir)))
        time.sleep(0.1)


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


FLAGS = ("--config.log_every=1", "--config.checkpoint_every=3", "--config.schedule=constant", "--config.warmup=0.0")


@pytest.mark.slow
def test_four_processes_train_as_one_does_and_one_or_two_go_on(
    scans: Path,
    tmp_path: Path,
    small_config: Path,  # noqa: F811
) -> None:
    """Guards the order of the examples, the sum of the gradients, and checkpoints that know no number of processes."""
    flags = (*FLAGS, "--config.learning_rate=1e-5")  # Adam makes whole steps of rounding, which stay small here
    run(1, 4, scans, tmp_path / "one", small_config, *flags, "--config.steps=6")
    expected = losses(tmp_path / "one")
    assert list(expected) == [2, 3, 4, 5, 6]  # a start's first step is reported with its second
    assert len(set(expected.values())) == 5
    logs = run(4, 1, scans, tmp_path / "four", small_config, *flags, "--config.steps=3")
    assert losses(tmp_path / "four") == pytest.approx({n: expected[n] for n in (2, 3)}, rel=1e-5)
    assert "step 3/3" in logs[0]
    assert not any("step " in log for log in logs[1:])  # the others report nothing
    expected[5] = (expected.pop(4) + expected[5]) / 2
    for count, devices in ((1, 1), (2, 2)):
        workdir = tmp_path / f"on{count}"
        subprocess.run(["cp", "-r", tmp_path / "four", workdir], check=True)
        logs = run(count, devices, scans, workdir, small_config, *flags, "--config.steps=6")
        assert "going on after step 3 of 6" in logs[0]
        assert losses(workdir) == pytest.approx(expected, rel=1e-5)


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_an_error_ends_both(
    scans: Path,
    tmp_path: Path,
    small_config: Path,  # noqa: F811
) -> None:
    workdir = tmp_path / "run"
    processes = start(2, 1, scans, workdir, small_config, *FLAGS, "--config.steps=1000000")
    wait_for_step(3, processes, workdir)
    processes[1].send_signal(signal.SIGTERM)
    logs = finish(processes, workdir)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    assert f"stopped; step {newest_step(workdir)} of 1000000 is saved" in logs[0]
    logs = run(2, 1, scans, workdir, small_config, "--config.seed=3", "--config.steps=1000000", status=2)
    assert sum("config.seed was 0 and is 3" in log for log in logs) >= 1
    assert not any("Traceback" in log for log in logs)


@pytest.mark.slow
def test_one_of_four_killed_ends_the_others_and_the_restart_goes_on(
    scans: Path,
    tmp_path: Path,
    small_config: Path,  # noqa: F811
) -> None:
    workdir = tmp_path / "run"
    processes = start(4, 1, scans, workdir, small_config, *FLAGS, "--config.steps=1000000")
    wait_for_step(3, processes, workdir)
    processes[2].kill()
    logs = finish(processes, workdir, timeout=60)
    # Gloo, which CPUs exchange by, may abort one that hears from the others what the lost one should have said first.
    status = [process.returncode for process in processes]
    assert (status[0], status[2]) == (1, -signal.SIGKILL), "\n".join(logs)
    assert set(status[1::2]) <= {1, -signal.SIGABRT}, "\n".join(logs)
    for log in (log for log, code in zip(logs, status, strict=True) if code == 1):
        assert re.search(rf"process 2 of 4 \(on {socket.gethostname()}\).* was lost", log)
    step = newest_step(workdir)
    logs = run(4, 1, scans, workdir, small_config, *FLAGS, f"--config.steps={step + 2}")
    assert f"going on after step {step} of {step + 2}" in logs[0]


def test_the_loss_of_the_process_that_connects_them_is_named_too(tmp_path: Path) -> None:
    """JAX aborts the others within milliseconds: what names the loss must outlive them."""
    script = (
        "import os, time\nfrom mrjax import distributed\nwith processes.together():\n"
        "    import jax\n    if jax.process_index() == 0:\n        os.kill(os.getpid(), 9)\n    time.sleep(60)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | together | {"JAX_PROCESS_ID": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    logs = [process.communicate(timeout=55)[1] for process in processes]
    assert [process.returncode != 0 for process in processes] == [True, True]
    assert f"process 0 (on {socket.gethostname()}), which connects them, was lost" in logs[1]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),  # the shell of an allocation
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (3, 4)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, (1, 2)),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set, expected"),
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
            processes.described()
    else:
        assert processes.described() == expected
        if expected == (0, 1):
            processes.require_one_process("evaluate")
        else:
            with pytest.raises(SystemExit):
                processes.require_one_process("evaluate")
