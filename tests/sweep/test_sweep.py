"""A sweep searches fields, each trial a run of mrjax.main, and goes on with what was stopped or killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_device_flags, run_command

from mrjax.sweep import __main__ as command

pytestmark = pytest.mark.watch

PYTHON = sys.executable
# In the place of `python -m mrjax.main`: its score is best for a learning rate of 0.01, and what `mode` says happens.
STUB = """#!{python}
import json, os, pathlib, signal, sys, time
flags = dict(flag.lstrip("-").split("=", 1) for flag in sys.argv[3:])
workdir, rate = pathlib.Path(flags["workdir"]), float(flags["config.learning_rate"])
mode = pathlib.Path("{mode}").read_text()
with open("{calls}", "a") as calls:
    print(workdir.name, rate, file=calls)
if mode == "fail":
    sys.exit(2)
if mode == "stop":
    sys.exit(0)
if mode == "kill":
    os.kill(os.getpid(), 9)

def save(*_):
    (workdir / "saved").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
scores = [0.1] if mode in ("poor", "nan") else [0.9 - abs(rate - 0.01), 0.8 - abs(rate - 0.01)]
for step, score in enumerate(scores, 1):
    with open(workdir / "metrics.jsonl", "a") as file:
        print(json.dumps({{"step": step, "val/ssim": score}}), file=file)
if mode == "poor":
    time.sleep(60)
if mode == "nan":
    with open(workdir / "metrics.jsonl", "a") as file:
        print('{{"step": 2, "val/ssim": null}}', file=file)
"""


class Stub:
    """Runs sweeps of 2 steps whose trials are a script."""

    def __init__(self, folder: Path):
        self.study, self._calls, self._mode = folder / "sweep", folder / "calls", folder / "mode"
        self.python = folder / "python"
        self.python.write_text(STUB.format(python=PYTHON, calls=self._calls, mode=self._mode))
        self.python.chmod(0o755)

    def sweep(self, trials: int, *flags: str, mode: str = "train", rate: str = "choice:0.01,0.02,0.03"):
        self._mode.write_text(mode)
        search = (f"--{command.PREFIX}learning_rate={rate}",) if rate else ()
        fixed = ("--config=unet", f"--study={self.study}", f"--trials={trials}", "--config.steps=2")
        return run_command("sweep.__main__", *fixed, *search, *flags)

    def calls(self) -> list[str]:
        """The workdir and learning rate of each start of mrjax.main."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    from mrjax.sweep import study

    found = Stub(tmp_path)
    monkeypatch.setattr(study.sys, "executable", str(found.python))
    monkeypatch.setattr(study, "POLL", 0.02)
    return found


def test_the_best_trial_is_named_and_first_in_the_table(stub: Stub) -> None:
    result = stub.sweep(4, rate="log:1e-3,1e-1")
    assert result.returncode == 0, result.stderr
    rates = {workdir: float(rate) for workdir, rate in map(str.split, stub.calls())}
    assert list(rates) == ["trial-0", "trial-1", "trial-2", "trial-3"]
    assert all(1e-3 <= rate <= 1e-1 for rate in rates.values())
    nearest = min(rates, key=lambda name: abs(rates[name] - 0.01))
    best = json.loads((stub.study / "best.json").read_text())
    assert best["workdir"] == str(stub.study / nearest)
    assert best["config"] == {"learning_rate": rates[nearest]}
    assert best["val/ssim"] == pytest.approx(0.9 - abs(rates[nearest] - 0.01))  # that of the best checkpoint
    assert re.split(" +", result.stdout.splitlines()[1])[0] == nearest.removeprefix("trial-")


def test_a_trial_that_was_stopped_goes_on_in_its_workdir_with_its_values(stub: Stub) -> None:
    assert stub.sweep(2, mode="stop").returncode == 3
    assert stub.sweep(2).returncode == 0
    calls = stub.calls()
    assert [call.split()[0] for call in calls] == ["trial-0", "trial-0", "trial-1"]
    assert calls[0] == calls[1]
    assert stub.sweep(2).returncode == 0  # nothing is left to do
    assert stub.calls() == calls


def test_a_trial_of_another_process_is_left_to_it(stub: Stub) -> None:
    assert stub.sweep(2, mode="stop").returncode == 3
    # Its run outlived the sweep: it holds the lock of its workdir.
    hold = "import sys; from mrjax.io.files import lock; held = lock(sys.argv[1]); print('held', flush=True); input()"
    holding = [PYTHON, "-c", hold, str(stub.study / "trial-0")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert stub.sweep(2).returncode == 0
        assert [call.split()[0] for call in stub.calls()] == ["trial-0", "trial-1"]
        holder.communicate("\n")
    assert stub.sweep(2).returncode == 0
    assert [call.split()[0] for call in stub.calls()] == ["trial-0", "trial-1", "trial-0"]


def test_a_trial_below_the_median_is_stopped_and_pruned(stub: Stub) -> None:
    assert stub.sweep(5).returncode == 0
    result = stub.sweep(6, mode="poor")
    assert result.returncode == 0
    assert re.search("trial 5: pruned at step 1, val/ssim 0.1", result.stderr)
    assert re.split(" +", result.stdout.splitlines()[-1])[:3] == ["5", "0.1000", "pruned"]
    assert (stub.study / "trial-5" / "saved").exists()


def test_sigterm_stops_the_trial_which_saves(stub: Stub) -> None:
    trial = stub.study / "trial-0"

    def stop() -> None:
        while not (trial / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    result = stub.sweep(1, mode="poor")
    thread.join()
    assert result.returncode == 3
    assert "trial 0: stopped; the same command goes on with it" in result.stderr
    assert (trial / "saved").exists()


def test_a_first_trial_that_fails_ends_the_sweep_and_a_later_one_does_not(stub: Stub) -> None:
    result = stub.sweep(2, mode="fail")
    assert (result.returncode, len(stub.calls())) == (2, 1)
    assert "the first trial failed with status 2, see" in result.stderr
    assert stub.sweep(2).returncode == 0
    result = stub.sweep(3, mode="fail")
    assert result.returncode == 0
    assert "failed with status 2" in result.stderr
    states = sorted(re.split(" +", line)[-2] for line in result.stdout.splitlines()[1:])
    assert states == ["complete", "fail", "fail"]


def test_a_trial_that_is_killed_again_has_failed(stub: Stub) -> None:
    """As for want of memory: it would be killed for ever, and no other trial begun."""
    assert stub.sweep(1).returncode == 0
    assert stub.sweep(2, mode="kill").returncode == 3
    result = stub.sweep(2, mode="kill")
    assert result.returncode == 0
    assert "failed with status -9" in result.stderr


def test_a_run_whose_last_validation_is_not_finite_has_ended(stub: Stub) -> None:
    result = stub.sweep(1, mode="nan")
    assert result.returncode == 0
    assert "trial 0: val/ssim 0.1" in result.stderr


def test_a_trial_whose_values_are_not_all_chosen_yet_is_left_to_its_process(stub: Stub) -> None:
    import optuna
    from optuna.storages import journal

    assert stub.sweep(1).returncode == 0
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(stub.study / "journal.log")))
    optuna.load_study(study_name="sweep", storage=storage).ask()  # its values would follow
    result = stub.sweep(3)
    assert result.returncode == 0
    assert [call.split()[0] for call in stub.calls()] == ["trial-0", "trial-2"]
    assert "running" in result.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--search.learning_rat=log:1,2"], "config.learning_rat is not a field"),
        (["--search.learning_rate=log:1"], "--search.learning_rate is 'log:1', expected float:LOW,HIGH, log:LOW"),
        (["--search.learning_rate=float:2,1"], "--search.learning_rate is 'float:2,1', expected"),
        (["--search.model.channels=int:0,8"], "config.model.channels is 0, expected more than 0"),
        (["--search.model.channels=choice:8,x"], "config.model.channels=x"),
        (["--search.schedule=choice:cosine,poly"], "config.schedule is 'poly', expected"),
        ([], "there is no --search.FIELD, expected at least one"),
    ],
)
def test_a_wrong_search_is_said_before_the_first_trial(stub: Stub, flags: list[str], said: str) -> None:
    result = stub.sweep(2, *flags, rate="")
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not stub.study.exists()


def test_a_study_of_another_sweep_is_refused(stub: Stub) -> None:
    stub.sweep(1)
    result = stub.sweep(2, rate="choice:0.01")
    assert result.returncode == 2
    assert "holds the sweep" in result.stderr
    assert len(stub.calls()) == 1


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_from_the_checkpoint_of_its_trial(
    scans: Path, tmp_path: Path, small_config: Path
) -> None:
    study, log = tmp_path / "sweep", tmp_path / "sweep" / "trial-0.log"
    flags = ["--trials=3", "--search.learning_rate=choice:0.001,0.002", "--config.steps=2", "--config.batch_size=2"]
    fixed = [
        f"--config={small_config}",
        f"--study={study}",
        f"--config.data.dir={scans}",
        "--config.checkpoint_every=1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": one_device_flags()}
    sweep = [sys.executable, "-m", "mrjax.sweep", *fixed, *flags]
    process = subprocess.Popen(sweep, env=environment, start_new_session=True)
    checkpoints = study / "trial-0" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("[12]")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the sweep and its trial
    process.wait()
    result = subprocess.run(sweep, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "going on with trial 0" in result.stderr
    assert re.search("going on after step 1 of 2|has all its 2 steps", log.read_text())
    assert result.stdout.count("complete") == 3
    best = json.loads((study / "best.json").read_text())
    assert (Path(best["workdir"]) / "checkpoints" / "best.json").exists()
