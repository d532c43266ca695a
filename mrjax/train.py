"""The training program, top to bottom: check, build, restore, step, log, evaluate, save."""

import collections
import logging
import math
import os
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

from mrjax import build, checkpoint, figures, sharding, step
from mrjax import config as configs
from mrjax.data import demo, pipeline, t5
from mrjax.errors import UserError
from mrjax.evaluate import Scores, evaluate, summarise
from mrjax.watch import Watch, read_rows

logger = logging.getLogger(__name__)
DEMO = "data/demo"
Metrics = dict[str, jax.Array]


def train(config: ConfigDict, workdir: str) -> None:
    """Trains until config.steps, going on from the newest checkpoint in the workdir if there is one.

    Raises:
      UserError: what the user can mend in config, data or workdir, before the first step; or a loss that is not finite.
    """
    # 1. Everything that can be wrong is found before anything is compiled.
    configs.check(config)
    mesh = sharding.make_mesh()
    configs.check_devices(config, mesh.size)
    config, train_set, val_set = prepare_data(config)
    checkpoint.claim(workdir, config)

    # 2. Pure functions, jitted over the mesh.
    model, optimizer, task = build.model(config), build.optimizer(config), build.task(config)
    fixed = {"model": model, "task": task, "normalise_by": config.normalise}
    train_step = step.compile_train(mesh, optimizer=optimizer, seed=config.seed, **fixed)
    predict, score = step.compile_predict(mesh, **fixed), step.compile_score(mesh)
    learning_rate = build.schedule(config)

    # 3. The state: restored, or fresh.
    newest, best = (checkpoint.open_checkpoints(workdir, kind) for kind in ("newest", "best"))
    files = pipeline.fingerprint(train_set)
    restored = checkpoint.restore(newest, build.abstract_state(config, mesh))
    if restored:
        state, progress = restored
        if progress["files"] != files:
            raise UserError(f"{workdir} was trained on {progress['files']}, found {files}; expected the same files")
    else:
        init = lambda: step.init_state(model, optimizer, config.data.image_size, config.seed)  # noqa: E731
        state, progress = jax.jit(init, out_shardings=sharding.replicated(mesh))(), {"step": 0, "ssim": -1.0}
    start = progress["step"]

    device = jax.devices()[0]
    logger.info("%d x %s (%s), mesh %s", mesh.size, device.device_kind, device.platform, dict(mesh.shape))
    logger.info("training on %s; validating on %s", files, pipeline.fingerprint(val_set))
    if start == 0:
        logger.info(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        logger.info("compiling the training step; the first one takes a while")
    elif start < config.steps:
        logger.info("going on after step %d of %d", start, config.steps)
    else:
        logger.info("%s has all its %d steps: nothing left to train", workdir, start)

    # 4. The loop. What is logged was computed an interval ago: the device never waits for the log.
    watch = Watch(workdir, start, config.steps)
    stop = threading.Event()
    signal_before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    size, rule = config.data.image_size, config.data.resize
    reading = {"batch_size": config.batch_size, "workers": config.data.workers, "prefetch": config.data.prefetch}
    train_source, val_source = pipeline.Slices(train_set, size, rule), pipeline.Slices(val_set, size, rule)
    examples = pipeline.training_batches(train_source, seed=config.seed, start=start * config.batch_size, **reading)
    newest_values: collections.deque[Metrics] = collections.deque(maxlen=3)
    interval: list[Metrics] = []
    finished: Interval | None = None
    at, best_ssim = start, progress["ssim"]
    with examples as batches:
        on_device = sharding.to_devices(batches, mesh)
        timed_from, clock = start, time.perf_counter()
        while at < config.steps and not stop.is_set():
            state, values = train_step(state, next(on_device))
            at += 1
            interval.append(values)
            newest_values.append(values)
            # Two steps are in flight at most: more would only fill the device's memory with waiting batches.
            jax.block_until_ready(newest_values[0])
            if at == start + 1:
                timed_from, clock = at, time.perf_counter()  # the first step was compiled, which is no measure of speed
            watch.bar.update()

            last = at == config.steps or stop.is_set()
            save = at % config.checkpoint_every == 0 or last
            assess = (at % config.eval_every == 0 or at == config.steps) and not stop.is_set()
            if at % config.log_every == 0 or last:
                if finished:
                    report(watch, finished, config, learning_rate)
                seconds = time.perf_counter() - clock
                finished = Interval(at, interval, (at - timed_from) * config.batch_size / seconds)
                interval, timed_from, clock = [], at, clock + seconds
            if (save or assess) and finished:
                # A state that is not finite is never saved: its loss is looked at first.
                report(watch, finished, config, learning_rate)
                finished = None
            if assess:
                with pipeline.evaluation_batches(val_source, **reading) as val_batches:
                    rows, previews = evaluate(predict, score, state.params, val_batches, val_set, mesh)
                scores = summarise(rows)["all"]
                ssim = scores["reconstruction"]["ssim"]["mean"]
                watch.scalars(
                    at, {f"val/{method}/{name}": v["mean"] for method, s in scores.items() for name, v in s.items()}
                )
                for name, images in previews.items():
                    watch.image(at, name, images)
                logger.info("step %d: validation %s", at, one_line(scores))
            progress = {"step": at, "examples": at * config.batch_size, "files": files, "ssim": best_ssim}
            if assess and ssim > best_ssim:
                best_ssim = progress["ssim"] = ssim
                checkpoint.save(best, state, progress, config)
            if save:
                checkpoint.save(newest, state, progress, config)
            if save or assess:
                timed_from, clock = at, time.perf_counter()

    # 5. Nothing is lost on the way out.
    for manager in (best, newest):
        manager.wait_until_finished()
        manager.close()
    watch.close()
    signal.signal(signal.SIGTERM, signal_before)
    if jax.process_index() == 0:
        figures.curves(Path(workdir) / "curves.png", read_rows(workdir))
    if at < config.steps:
        logger.info(
            "stopped by SIGTERM after step %d of %d, which is saved; the same command goes on from there",
            at,
            config.steps,
        )


class Interval(NamedTuple):
    """Steps between two lines of the log: the last one, what they returned (still on the device), images a second."""

    step: int
    values: list[Metrics]
    images_per_second: float


def report(watch: Watch, interval: Interval, config: ConfigDict, learning_rate: optax.Schedule) -> None:
    """Logs the means of an interval; a loss that is not finite is a `UserError`."""
    values = jax.device_get(interval.values)
    row = {name: statistics.fmean(float(v[name]) for v in values) for name in values[0]}
    if not math.isfinite(row["loss"]):
        raise UserError(
            f"the loss is {row['loss']} at step {interval.step}, expected a finite one; lower config.learning_rate "
            f"({config.learning_rate}), or look for faults in the data with python -m mrjax.check"
        )
    row["learning_rate"] = float(learning_rate(interval.step))
    row["images_per_second"] = interval.images_per_second
    watch.scalars(interval.step, row)
    left = (config.steps - interval.step) * config.batch_size / max(interval.images_per_second, 1e-9)
    logger.info(
        "step %d/%d  loss %.5f  %.1f images/s  %d:%02d left",
        *(interval.step, config.steps, row["loss"], interval.images_per_second, left // 60, left % 60),
    )


def one_line(scores: Scores) -> str:
    """PSNR and SSIM of a summary, before and after."""
    before, after = scores["corrupted"], scores["reconstruction"]
    return ", ".join(
        f"{name.upper()} {after[name]['mean']:.{digits}f} (corrupted {before[name]['mean']:.{digits}f})"
        for name, digits in (("psnr", 2), ("ssim", 4))
    )


def prepare_data(config: ConfigDict) -> tuple[ConfigDict, list[t5.Volume], list[t5.Volume]]:
    """Finds and checks the files, makes the demo data if no data are named, and settles the image size.

    Returns:
      The config with `data.dir` and `data.image_size` filled in, the training volumes and the validation volumes.
    """
    config = config.copy_and_resolve_references()
    if not (config.data.dir or config.data.train):
        config.data.dir = DEMO
        if jax.process_index() == 0 and not os.path.isdir(DEMO):
            logger.info("config.data.dir is not set: making the demo data in %s", DEMO)
            demo.make(DEMO)
    started = time.perf_counter()
    train_set, val_set = (
        pipeline.volumes(
            pipeline.locate(config.data, split),
            config.task,
            on_bad_file=config.data.on_bad_file,
            read_all=config.data.check == "samples",
        )
        for split in ("train", "val")
    )
    logger.info("checked %d files in %.1f s", len(train_set) + len(val_set), time.perf_counter() - started)
    if not config.data.image_size:
        config.data.image_size = pipeline.common_size(train_set + val_set)
    configs.check_image_size(config)
    if config.normalise == "volume":
        pipeline.needs_maximum(train_set + val_set)
    return config, train_set, val_set
