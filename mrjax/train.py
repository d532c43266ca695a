"""The training program, top to bottom: check, build, restore, step, log, save, evaluate."""

import logging
from collections.abc import Callable
from pathlib import Path

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from mrjax.checkpoint.run import Run, claim
from mrjax.checkpoint.store import BEST_METRIC
from mrjax.data import splits
from mrjax.errors import UserError
from mrjax.experiment import CompiledTrainStep, Experiment
from mrjax.measures import evaluator
from mrjax.parallel import memory, processes
from mrjax.report.run_log import NotFiniteError, RunLog, read_rows
from mrjax.train_step import TrainState

logger = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str) -> None:
    """Train until config.steps, from the newest checkpoint in the workdir if there is one.

    Where config.max_skipped_steps in a row have a loss or gradient that is not finite, the run goes back to its last
    checkpoint once and on from there with another order of the examples; the second time it ends.

    Raises `UserError` for faults of config, data or workdir before the first step, and for files that become faulty.
    """
    experiment = Experiment.from_config(config)  # every error of config and data
    config = experiment.config
    with processes.first_process_first():
        lock = claim(workdir, config)
    train_step = experiment.compile_train_step()
    train_files, val_files = map(splits.fingerprint, (experiment.train_set, experiment.val_set))
    logger.info("training on %s; validating on %s", train_files, val_files)
    with (
        lock,
        memory.explain_out_of_memory(experiment.explain_out_of_memory),
        Run(workdir, config, train_files, val_files) as run,
        processes.stop_on_signal() as should_stop,
    ):
        state, order = run.restore_or_init(experiment.abstract_state, experiment.init_state)
        log_header(experiment, train_step, workdir, state)
        while True:
            try:
                step = take_steps(experiment, train_step, state, order, run, should_stop)
                break
            except NotFiniteError as error:
                if order:
                    raise end_not_finite(experiment, Path(workdir) / "bad_batch.t5", error, order) from error
                logger.warning("%s: going back to the last checkpoint, then on in another order of examples", error)
            (state, _), order = run.restore_or_init(experiment.abstract_state, experiment.init_state), 1
    if jax.process_index() == 0:
        from mrjax.report import figures  # late: matplotlib would delay the first step

        figures.draw_curves(Path(workdir) / "curves.png", read_rows(workdir))
    if step < config.steps:
        logger.info("stopped; step %d of %d is saved, the same command goes on from there", step, config.steps)
    if jax.process_index() == 0:
        if "tensorboard" in config.loggers:
            logger.info("curves, also in curves.png: tensorboard --logdir=%s", workdir)
        evaluate = f"python -m mrjax.evaluate --workdir={workdir} --split=val"
        logger.info("metrics and images, in %s: %s", Path(workdir) / "report-val.html", evaluate)


def take_steps(
    experiment: Experiment,
    train_step: CompiledTrainStep,
    state: TrainState,
    order: int,
    run: Run,
    should_stop: Callable[[], bool],
) -> int:
    """Train to the last step, or until it is to stop; return the step that is saved then.

    Raises `NotFiniteError` for too many skipped steps in a row. Whatever else ends it, the last step is saved, unless
    several processes would have to agree on that.
    """
    config = experiment.config
    start = step = int(state.step)
    log = RunLog(run.workdir, config, start)
    with log, experiment.training_batches(start, order) as batches:
        try:
            if is_due(config, start) and not run.is_validated(start):  # it ended in between
                validate(experiment, state, log, run, should_stop)
            for step, batch in zip(range(start + 1, config.steps + 1), log.wait_for(batches), strict=False):
                state, metrics = train_step(state, batch)
                log.add(step, metrics)
                stop = should_stop()  # at the same step on every process
                last = stop or step == config.steps
                if last or is_due(config, step) or step % config.checkpoint_every == 0:
                    log.flush(last=last)
                    run.save(state, step, order)
                    if is_due(config, step) and not stop:
                        validate(experiment, state, log, run, should_stop)
                    log.restart_clock()
                if stop:
                    break
        except processes.StopRequested:
            pass  # the step is saved, and validated after the next start
        except Exception as error:
            if not isinstance(error, NotFiniteError) and jax.process_count() == 1 and not state.step.is_deleted():
                run.save(state, int(state.step), order)
            raise
    return step


def is_due(config: ConfigDict, step: int) -> bool:
    """Return whether the validation split is to be evaluated after a step."""
    return step > 0 and (step == config.steps or step % config.eval_every == 0)


def validate(experiment: Experiment, state: TrainState, log: RunLog, run: Run, should_stop: Callable[[], bool]) -> None:
    """Evaluate the validation split, log it, and note whether this is the best checkpoint so far."""
    step = int(state.step)
    rows, previews = experiment.evaluate(state.eval_params, should_stop)
    scores = evaluator.summarise(rows)["all"]
    means = {f"val/{name}": value["mean"] for name, value in scores["reconstruction"].items()}
    means |= {f"val/corrupted/{name}": value["mean"] for name, value in scores["corrupted"].items()}
    log.write_scalars(step, means)
    for number, images in enumerate(previews.values(), 1):  # no names of files: a logger may be a service
        log.write_images(step, f"val/{number}", images)
    logger.info("step %d: validation %s", step, evaluator.one_line(scores))
    run.record_validation(step, scores["reconstruction"][BEST_METRIC]["mean"])


def end_not_finite(experiment: Experiment, path: Path, error: NotFiniteError, order: int) -> UserError:
    """Write the batch of the last skipped step, and return the error that ends the run."""
    experiment.write_batch(path, error.step, order)
    advice = "look for faulty data with python -m mrjax.check, or lower config.learning_rate in a new --workdir"
    return UserError(f"{error}, in two orders of the examples; {path} holds the batch of that step; {advice}")


def log_header(experiment: Experiment, train_step: CompiledTrainStep, workdir: str, state: TrainState) -> None:
    """Log what is about to run, and on what."""
    config, mesh, device, start = experiment.config, experiment.recipe.mesh, jax.devices()[0], int(state.step)
    logger.info("%d x %s (%s), mesh %s", mesh.size, device.device_kind, device.platform, dict(mesh.shape))
    logger.info(experiment.describe_memory(train_step))
    if jax.process_index() == 0:
        for sentence in splits.find_shared_subjects({"train": experiment.train_set, "val": experiment.val_set}):
            logger.warning(sentence)
    if start == 0:
        logger.info(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    elif start < config.steps:
        logger.info("going on after step %d of %d", start, config.steps)
    else:
        logger.info("%s has all its %d steps: nothing left to train", workdir, start)
        return
    logger.info("%d steps of %d slices; compiling the first takes a while", config.steps - start, config.batch_size)
