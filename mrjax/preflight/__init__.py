"""Look at all that a training run needs before hours are spent on it: one screen, problems first, nothing written."""

import contextlib
import dataclasses
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mrjax.checkpoint import run, store
from mrjax.data import splits
from mrjax.errors import UserError, expect, printable
from mrjax.experiment import CompiledTrainStep, Experiment, demo_folder
from mrjax.io import readers
from mrjax.io.volume import Volume
from mrjax.parallel import memory, processes
from mrjax.preflight import facts
from mrjax.train import is_due
from mrjax.train_step import TrainState

SHOWN = 6  # problems and warnings of each kind: one screen has room for no more
STEPS = 3  # taken after the first one, to be timed
BATCHES = 5  # of the validation split, to be timed


@dataclasses.dataclass
class Report:
    """What is found: sentences about what ends or spoils the run, and about what is doubtful; facts by their topic."""

    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    facts: dict[str, str] = dataclasses.field(default_factory=dict)

    def format(self) -> str:
        """Format one screen."""
        lines = []
        for label, sentences in (("PROBLEM", self.problems), ("WARNING", self.warnings)):
            lines += [f"{label}  {printable(sentence)}" for sentence in sentences[:SHOWN]]
            if len(sentences) > SHOWN:
                lines.append(f"{label}  and {len(sentences) - SHOWN} more")
        lines += [f"{topic:<9}{fact}" for topic, fact in self.facts.items()]
        count = len(self.problems)
        lines.append(f"{count or 'no'} problem{'' if count == 1 else 's'} found; nothing was trained, nothing written")
        return "\n".join(lines)


def preflight(config: ConfigDict, workdir: str) -> int:
    """Print what would end or spoil a run with this config in this workdir, then facts; return 1 if there is a problem.

    Takes some steps and evaluates some batches. All processes of a run call it, and the first prints.
    """
    report = Report()
    with _collected_warnings(report.warnings):
        experiment = _inspect_data(config, report)
        if _agree(experiment is not None, report) and experiment:
            _inspect_run(experiment, workdir, report)
    if jax.process_index() == 0:
        print(report.format())
    return 1 if report.problems else 0


def _agree(go_on: bool, report: Report) -> bool:
    """Return whether all processes can go on together; one with other problems than the first says them itself."""
    problems = len(report.problems)
    can, counts = multihost_utils.process_allgather(np.array([go_on, problems])).reshape(-1, 2).T
    if problems != counts[0]:
        print(f"process {jax.process_index()}:", *report.problems, sep="\n", file=sys.stderr)
    for number in np.flatnonzero(counts != counts[0]) if jax.process_index() == 0 else ():
        report.problems.append(f"process {number} finds {counts[number]} problems in the files, which its log names")
    return bool(can.all() and (counts == counts[0]).all())


@contextlib.contextmanager
def _collected_warnings(sentences: list[str]) -> Iterator[None]:
    """Collect what is logged as a warning, each sentence once, instead of showing the log."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and record.getMessage() not in sentences:
                sentences.append(record.getMessage())

    logger = logging.getLogger("mrjax")
    handlers, logger.handlers = logger.handlers, [Collector()]
    try:
        yield
    finally:
        logger.handlers = handlers


def _announce(what: str) -> None:
    if jax.process_index() == 0:
        print(f"{what} ...", file=sys.stderr, flush=True)


def _inspect_data(config: ConfigDict, report: Report) -> Experiment | None:
    """Check config and files, and build the experiment; None if that is not possible."""
    _announce("reading files")
    faults: list[str] | None = report.problems if config.data.on_bad_file == "error" else None
    try:
        if not (config.data.dir or config.data.train):
            found = f"config.data.dir is not set, and {demo_folder(config.task)} is not there"
            expect(os.path.isdir(demo_folder(config.task)), found, "a folder of data; training makes the demo data")
        experiment = Experiment.from_config(config, faults)
    except UserError as error:
        report.problems.append(str(error))
        return None
    volumes = {
        "train": experiment.train_set,
        "val": experiment.val_set,
        "test": _describe_test_split(experiment.config),
    }
    report.problems += splits.find_shared_subjects(volumes)
    for name, split in volumes.items():
        if split:
            report.facts[name] = facts.describe_volumes(split)
    report.facts["checked"] = f"all {config.data.check} of training and validation files, and headers of test files"
    mesh, device = experiment.recipe.mesh, jax.devices()[0]
    report.facts["devices"] = f"{mesh.size} x {device.device_kind} ({device.platform}), mesh {dict(mesh.shape)}"
    return experiment


def _describe_test_split(config: ConfigDict) -> list[Volume]:
    """Read the headers of the test files, if there are any; those that cannot be read are warned of."""
    volumes: list[Volume] = []
    try:
        paths = splits.find_split(config.data, "test")
    except UserError:
        return volumes
    for path in paths:
        try:
            volumes.append(readers.describe(path, splits.task_layout(config.task), splits.storage_of(config.data)))
        except UserError as error:
            logging.getLogger(__name__).warning("test split: %s", error)
    return volumes


def _inspect_run(experiment: Experiment, workdir: str, report: Report) -> None:
    """Look at the workdir and its disk, then compile the step, take some and evaluate some batches."""
    _inspect_workdir(experiment, workdir, report)
    train_step = None
    started = time.perf_counter()
    try:
        report.facts["masks"] = facts.describe_masks(experiment)
        _announce("compiling the training step")
        started = time.perf_counter()
        train_step = experiment.compile_train_step()
        report.facts["memory"] = experiment.describe_memory(train_step)
    except UserError as error:
        report.problems.append(str(error))
    compiled = time.perf_counter() - started
    if not _agree(train_step is not None, report) or train_step is None:
        return
    try:
        with memory.explain_out_of_memory(experiment.explain_out_of_memory):
            state, losses, skipped, seconds = _take_steps(experiment, train_step)
            _announce("evaluating some batches")
            validation = _time_validation(experiment, state)
    except UserError as error:
        if jax.process_count() > 1:  # the others wait for this process, whose end is theirs
            raise
        report.problems.append(str(error))
        return
    if skipped:
        report.problems.append(
            f"the loss or its gradient is not finite in {skipped:.0f} of the first {1 + STEPS} steps, expected finite "
            "numbers; lower config.learning_rate, or look for faulty data with python -m mrjax.check"
        )
    speed = experiment.config.batch_size / seconds
    report.facts["step"] = (
        f"compiled in {compiled:.1f} s; {seconds:.3g} s a step with reading, {speed:.3g} images/s; "
        f"first loss {losses[0]:.4g}"
    )
    report.facts["time"] = _describe_time(experiment.config, workdir, seconds, validation)


def _take_steps(experiment: Experiment, train_step: CompiledTrainStep) -> tuple[TrainState, list[float], float, float]:
    """Take steps; return the state after them, their losses, how many were skipped, and the seconds of one."""
    _announce("taking steps")
    state, losses, skipped, started = experiment.init_state(), [], 0.0, 0.0
    with experiment.training_batches(0) as batches:
        for step, batch in zip(range(1 + STEPS), batches, strict=False):
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"]))  # waits for the step
            skipped += float(metrics["skipped"])
            if step == 0:
                started = time.perf_counter()  # the first is slower than all others
    return state, losses, skipped, (time.perf_counter() - started) / STEPS


def _inspect_workdir(experiment: Experiment, workdir: str, report: Report) -> None:
    """Find whether a run with this config can go on, or begin, in the workdir, and whether its disk has room."""
    try:
        run.require_own(workdir, experiment.config)
    except UserError as error:
        report.problems.append(str(error))
    before, files = run.read_trained_files(workdir), splits.fingerprint(experiment.train_set)
    if before not in ("", files):
        strict = experiment.config.data.on_bad_file == "error"
        sentence = f"{workdir} was trained on {before}, found {files}; expected the same files"
        (report.problems if strict else report.warnings).append(sentence)
    folder = next(path for path in (Path(workdir), *Path(workdir).absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK):
        report.problems.append(f"{folder}: cannot be written to, expected a --workdir where that is allowed")
    report.facts["disk"], fits = run.describe_space(workdir, experiment.abstract_state)
    if not fits:
        report.problems.append(report.facts.pop("disk"))


def _time_validation(experiment: Experiment, state: TrainState) -> float:
    """Evaluate some batches of the validation split; return the seconds that a whole validation takes."""
    moments: list[float] = []

    def should_stop() -> bool:
        moments.append(time.perf_counter())
        return len(moments) > BATCHES

    with contextlib.suppress(processes.StopRequested):
        experiment.evaluate(state.eval_params, should_stop)
    moments.append(time.perf_counter())
    seconds = statistics.median(np.diff(moments)[1:] if len(moments) > 2 else np.diff(moments))  # the first compiles
    batches = sum(-(-len(dataset) // experiment.config.batch_size) for dataset in experiment.val_datasets)
    return float(seconds) * batches


def _describe_time(config: ConfigDict, workdir: str, step: float, validation: float) -> str:
    """Estimate how long the steps to come take, and the validations between them, in seconds each."""
    start = max(store.find_steps(workdir), default=0)
    validations = sum(is_due(config, number) for number in range(start + 1, config.steps + 1))
    steps_left = max(config.steps - start, 0)
    parts = steps_left * step, validations * validation
    all_, steps, evaluations = (str(timedelta(seconds=round(seconds))) for seconds in (sum(parts), *parts))
    left = f"{steps_left} steps" + f" after step {start}" * bool(start)
    return f"{all_} to finish: {left} {steps}, {validations} validations {evaluations} (h:mm:ss)"
