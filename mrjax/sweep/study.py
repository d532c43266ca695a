"""A study of Optuna whose trials are runs of mrjax.main, each in a process and a workdir of its own."""

import contextlib
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna import distributions
from optuna.storages import journal
from optuna.trial import TrialState

from mrjax.checkpoint.store import BEST_METRIC
from mrjax.errors import UserError, expect
from mrjax.io.files import lock, write_json
from mrjax.parallel import processes
from mrjax.report.run_log import read_rows

logger = logging.getLogger("mrjax.sweep")
TARGET = f"val/{BEST_METRIC}"
POLL = 1.0  # seconds between two looks at a run
Space = dict[str, distributions.BaseDistribution]

SEARCHES: dict[str, Callable[..., distributions.BaseDistribution]] = {
    "float": lambda low, high: distributions.FloatDistribution(float(low), float(high)),
    "log": lambda low, high: distributions.FloatDistribution(float(low), float(high), log=True),
    "int": lambda low, high: distributions.IntDistribution(int(low), int(high)),
    "choice": lambda *values: distributions.CategoricalDistribution(values),
}


def parse_search(field: str, text: str) -> distributions.BaseDistribution:
    """Return the values that a flag --search.FIELD=KIND:VALUES allows."""
    kind, _, values = text.partition(":")
    try:
        return SEARCHES[kind](*values.split(","))
    except (KeyError, ValueError, TypeError):
        forms = "float:LOW,HIGH, log:LOW,HIGH, int:LOW,HIGH or choice:A,B,..."
        raise UserError(f"--search.{field} is {text!r}, expected {forms}") from None


def extremes(distribution: distributions.BaseDistribution) -> tuple[Any, ...]:
    """Return the values to check before the first trial: all choices, or both ends."""
    if isinstance(distribution, distributions.CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, distributions.FloatDistribution | distributions.IntDistribution)
    return distribution.low, distribution.high


def to_flags(values: dict[str, Any]) -> list[str]:
    """Return the flags of mrjax.main that set these fields."""
    return [f"--config.{name}={value}" for name, value in values.items()]


def open_study(folder: Path, description: str) -> optuna.Study:
    """Open the study in a folder, or begin one; raise a `UserError` if it is described otherwise.

    Optuna's journal is a file that several processes append to, also over NFS, where SQLite's locks do not hold.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(folder / "journal.log")))
    # A constant liar: trials that run at the same time do not try the same values.
    sampler = optuna.samplers.TPESampler(constant_liar=True)
    study = optuna.create_study(
        storage=storage, sampler=sampler, study_name="sweep", direction="maximize", load_if_exists=True
    )
    before = study.user_attrs.get("description", description)
    expect(
        before == description, f"{folder} holds the sweep {before}, found {description}", "the same, or a new --study"
    )
    study.set_user_attr("description", description)
    return study


class Sweep:
    """Trials of a study, one after the other; other processes may work on the same study.

    `command` are the flags of mrjax.main that all trials share, and `steps_of` returns config.steps with more flags.
    """

    def __init__(
        self, folder: Path, study: optuna.Study, space: Space, command: list[str], steps_of: Callable[[list[str]], int]
    ):
        self._folder, self._study, self._space, self._command, self._steps_of = folder, study, space, command, steps_of

    def run(self, trials: int) -> bool:
        """Run trials until the study has so many; return False if a signal stopped it before.

        Raises `UserError` for a trial that fails before any other came to an end.
        """
        with processes.stop_on_signal() as should_stop:
            while claimed := self._next_trial(trials):
                trial, claim = claimed
                with claim:
                    ended = self._run_trial(trial, should_stop)
                if not ended:
                    return False
                self._write_best()
        return True

    def table(self) -> str:
        """Return the trials as a table, the best first."""
        rows = [["trial", TARGET, "state", *self._space]]
        for trial in sorted(self._study.trials, key=_value, reverse=True):
            score = "" if trial.value is None else f"{trial.value:.4f}"
            rows.append(
                [
                    str(trial.number),
                    score,
                    trial.state.name.lower(),
                    *(_format(trial.params.get(n, "")) for n in self._space),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _next_trial(self, trials: int) -> tuple[optuna.Trial, contextlib.AbstractContextManager[Any]] | None:
        """Claim a trial whose process was stopped or killed, or else a new one; None if there are enough."""
        known = self._study.trials
        for frozen in known:
            # One without all values is being asked for by another process, or that was killed meanwhile.
            whole = self._space.keys() <= frozen.params.keys()
            if frozen.state == TrialState.RUNNING and whole and (claim := self._claim(frozen.number)):
                logger.info("going on with trial %d", frozen.number)
                return optuna.Trial(self._study, frozen._trial_id), claim
        while len(known) < trials:
            trial = self._study.ask(self._space)
            if claim := self._claim(trial.number):  # else another process took it for a stopped one
                return trial, claim
            known = self._study.trials
        return None

    def _claim(self, number: int) -> contextlib.AbstractContextManager[Any] | None:
        """Lock a trial; None if another process works on it, or its run outlived the process that started it."""
        with contextlib.suppress(UserError):
            claim = lock(str(self._folder / ".claims" / str(number)))
            try:
                with lock(str(self._workdir(number))):
                    return claim
            except UserError:
                claim.__exit__(None, None, None)
        return None

    def _workdir(self, number: int) -> Path:
        return self._folder / f"trial-{number}"

    def _run_trial(self, trial: optuna.Trial, should_stop: Callable[[], bool]) -> bool:
        """Train, and tell Optuna how that ended; return False for a trial that is to be gone on with later."""
        arguments, workdir = [*self._command, *to_flags(trial.params)], self._workdir(trial.number)
        log = workdir.with_suffix(".log")
        logger.info("trial %d: %s; log: %s", trial.number, " ".join(to_flags(trial.params)), log)
        status, pruned = self._train(trial, [*arguments, f"--workdir={workdir}"], log, should_stop)
        values, killed = _validations(workdir), trial.user_attrs.get("killed", 0)
        if _has_ended(workdir, self._steps_of(arguments)) and values:
            self._study.tell(trial.number, max(values.values()))
            logger.info("trial %d: %s %.4f", trial.number, TARGET, max(values.values()))
        elif pruned:
            self._study.tell(trial.number, state=TrialState.PRUNED)
            logger.info("trial %d: pruned at step %d, %s %.4f", trial.number, max(values), TARGET, max(values.values()))
        elif status > 0 or killed or _has_ended(workdir, self._steps_of(arguments)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            done = [other for other in self._study.trials if other.value is not None]
            expect(done, f"the first trial failed with status {status}, see {log}", "a config that trains")
            logger.warning("trial %d: failed with status %d, see %s", trial.number, status, log)
        else:
            if status < 0 and not should_stop():  # as for want of memory, which would come again
                trial.set_user_attr("killed", 1)
            logger.info("trial %d: stopped; the same command goes on with it", trial.number)
            return False
        return True

    def _train(
        self, trial: optuna.Trial, arguments: list[str], log: Path, should_stop: Callable[[], bool]
    ) -> tuple[int, bool]:
        """Run mrjax.main and report its validations; return its exit status, and whether it was pruned."""
        reported = set(self._study.trials[trial.number].intermediate_values)
        pruned = signalled = False
        with log.open("a") as out:
            process = subprocess.Popen([sys.executable, "-m", "mrjax.main", *arguments], stdout=out, stderr=out)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                values = _validations(self._workdir(trial.number))
                for step in sorted(values.keys() - reported):
                    trial.report(values[step], step)
                    pruned |= trial.should_prune()
                reported |= values.keys()
                if (pruned or should_stop()) and not signalled:
                    process.terminate()  # once: it saves a checkpoint, and a later signal would end it
                    signalled = True
        finally:
            if process.poll() is None:
                process.terminate()
        return process.wait(), pruned

    def _write_best(self) -> None:
        if best := max(self._study.get_trials(states=(TrialState.COMPLETE,)), key=_value, default=None):
            workdir = str(self._workdir(best.number))
            write_json(self._folder / "best.json", {"workdir": workdir, TARGET: best.value, "config": best.params})


def _validations(workdir: Path) -> dict[int, float]:
    """Return what is maximised, by step, as far as a run has come."""
    return {row["step"]: row[TARGET] for row in read_rows(str(workdir)) if math.isfinite(row.get(TARGET, math.nan))}


def _has_ended(workdir: Path, steps: int) -> bool:
    """Return whether a run has validated its last step."""
    return any(row["step"] == steps and TARGET in row for row in read_rows(str(workdir)))


def _value(trial: optuna.trial.FrozenTrial) -> float:
    return -math.inf if trial.value is None else trial.value


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
