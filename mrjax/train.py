"""The training program, top to bottom: check, build, restore, step, log, evaluate, save."""

import logging
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from mrjax import checkpoint
from mrjax.data import splits
from mrjax.experiment import Experiment
from mrjax.measures import evaluator
from mrjax.parallel import memory, processes
from mrjax.report.run_log import RunLog, read_rows

logger = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str) -> None:
    """Train until config.steps, from the newest checkpoint in the workdir if there is one.

    Raises `UserError` for faults of config, data or workdir before the first step, and for a loss that is not finite.
    """
    experiment = Experiment.from_config(config)  # every error of config and data
    config = experiment.config
    with processes.first_process_first():
        checkpoint.claim(workdir, config)
    train_step = experiment.compile_train_step()
    train_files, val_files = map(splits.fingerprint, (experiment.train_set, experiment.val_set))
    logger.info("training on %s; validating on %s", train_files, val_files)
    with (
        memory.explain_out_of_memory(experiment.explain_out_of_memory),
        checkpoint.Run(workdir, config, train_files, val_files) as run,
        processes.stop_on_signal() as stop_after,
    ):
        state = run.restore_or_init(experiment.abstract_state, experiment.init_state)
        start = step = int(state.step)
        log_header(experiment, workdir, state.params, start)
        log = RunLog(workdir, start=start, steps=config.steps, batch_size=config.batch_size, log_every=config.log_every)
        with log, experiment.training_batches(start) as batches:
            for step, batch in zip(range(start + 1, config.steps + 1), log.wait_for(batches), strict=False):
                state, metrics = train_step(state, batch)
                log.add(step, metrics)
                stop = stop_after(step)  # at the same step on every process
                last = stop or step == config.steps
                save = last or step % config.checkpoint_every == 0
                evaluate = step == config.steps or step % config.eval_every == 0
                if save or evaluate:
                    log.flush(last=last)  # a state that is not finite is never saved
                    if evaluate:
                        run.save_if_best(state, step, validate(experiment, state.eval_params, step, log))
                    if save:
                        run.save(state, step)
                    log.restart_clock()
                if stop:
                    break
    if jax.process_index() == 0:
        from mrjax.report import figures  # late: matplotlib would delay the first step

        figures.draw_curves(Path(workdir) / "curves.png", read_rows(workdir))
    if step < config.steps:
        logger.info("stopped; step %d of %d is saved, the same command goes on from there", step, config.steps)


def validate(experiment: Experiment, params: Any, step: int, log: RunLog) -> float:
    """Evaluate the validation split, log it, and return the value by which the best checkpoint is chosen."""
    rows, previews = experiment.evaluate(params)
    scores = evaluator.summarise(rows)["all"]
    means = {f"val/{name}": value["mean"] for name, value in scores["reconstruction"].items()}
    means |= {f"val/corrupted/{name}": value["mean"] for name, value in scores["corrupted"].items()}
    log.write_scalars(step, means)
    for name, images in previews.items():
        log.write_images(step, name, images)
    logger.info("step %d: validation %s", step, evaluator.one_line(scores))
    return scores["reconstruction"][checkpoint.BEST_METRIC]["mean"]


def log_header(experiment: Experiment, workdir: str, params: Any, start: int) -> None:
    """Log what is about to run, and on what."""
    config, mesh, device = experiment.config, experiment.recipe.mesh, jax.devices()[0]
    logger.info("%d x %s (%s), mesh %s", mesh.size, device.device_kind, device.platform, dict(mesh.shape))
    if start == 0:
        logger.info(parameter_overview.get_parameter_overview(params, include_stats=False))
    elif start < config.steps:
        logger.info("going on after step %d of %d", start, config.steps)
    else:
        logger.info("%s has all its %d steps: nothing left to train", workdir, start)
        return
    logger.info("%d steps of %d slices; compiling the first takes a while", config.steps - start, config.batch_size)
