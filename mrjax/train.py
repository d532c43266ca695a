"""The training program, top to bottom: check, build, restore, step, log, evaluate, save."""

import collections
import contextlib
import functools
import logging
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mrjax import checkpoint, experiment
from mrjax import config as configs
from mrjax import train_step as step
from mrjax.data import buckets, device_cache, hdf5, loader, splits
from mrjax.data import cache as data_cache
from mrjax.demo import acquisition
from mrjax.errors import UserError
from mrjax.evaluate import Scores, evaluate, summarise
from mrjax.parallel import memory, processes, sharding
from mrjax.report.run_log import Watch, read_rows
from mrjax.sizes import Sizes

logger = logging.getLogger(__name__)
DEMO = "data/demo"
FIRST_STEP = "the first step is done"
Metrics = dict[str, jax.Array]


def train(config: ConfigDict, workdir: str) -> None:
    """Trains until config.steps, going on from the newest checkpoint in the workdir if there is one.

    Raises:
      UserError: what the user can mend in config, data or workdir, before the first step; or a loss that is not finite.
    """
    # 1. Everything that can be wrong is found before anything is compiled.
    configs.check(config)
    mesh = sharding.make_mesh(configs.mesh_shape(config, jax.device_count()))
    config, train_set, val_set = prepare_data(config)
    sizes = {volume.data_shape for volume in train_set + val_set}
    if config.data.image_size:
        configs.check_image_size(config, mesh.shape["spatial"])
    else:
        configs.check_sizes(config, mesh.shape["spatial"], sizes)
    with processes.first_process_first():
        checkpoint.claim(workdir, config)

    # 2. Pure functions, jitted over the mesh; the step itself is compiled here, to know that it fits.
    model, optimizer, task = experiment.model(config, mesh), experiment.optimizer(config), experiment.task(config)
    fixed = {"model": model, "task": task, "normalise_by": config.normalise}
    (train_sources, train_sizes), (val_sources, val_sizes) = (
        sources(config, *split) for split in (("training", train_set), ("validation", val_set))
    )
    predict, score = step.compile_predict(mesh, sizes=val_sizes, **fixed), step.compile_score(mesh)
    cached = cache_on_devices(config, train_sources[0], mesh)
    drawn_from = [loader.Numbers(train_sources[0])] if cached else train_sources
    initial = experiment.initial_state(config)
    like = experiment.abstract_state(initial, mesh)
    specs = [source.spec for source in drawn_from]
    rules = {"optimizer": optimizer, "learning_rate": experiment.schedule(config)}
    explain, train_step = experiment.train_steps(config, mesh, like, specs, cached, sizes=train_sizes, **rules, **fixed)

    # 3. The state: restored, or fresh.
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.explain_out_of_memory(explain))
        newest, best = (
            stack.enter_context(contextlib.closing(checkpoint.open_checkpoints(workdir, kind)))
            for kind in ("newest", "best")
        )
        files = splits.fingerprint(train_set)
        restored = checkpoint.restore(newest, like)
        if restored:
            state, progress = restored
            if progress["files"] != files:
                raise UserError(f"{workdir} was trained on {progress['files']}, found {files}; expected the same files")
        else:
            init = jax.jit(initial, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))
            state, progress = checkpoint.with_imported(workdir, init(), like), {"step": 0, "examples": 0}
        at = start = progress["step"]
        val_files = splits.fingerprint(val_set)
        best_ssim = checkpoint.best_ssim(best, val_files)
        introduce(config, workdir, mesh, state, start, files, val_files)

        # 4. The loop. What is logged was computed an interval ago: the device never waits for the log.
        watch = stack.enter_context(contextlib.closing(Watch(workdir, start, config.steps)))
        stop_after = stack.enter_context(processes.stop_on_signal())
        reading = {"batch_size": config.batch_size, "rows": sharding.rows_of_process(mesh, config.batch_size)}
        reading |= {"workers": config.data.workers, "prefetch": config.data.prefetch}
        on_host = stack.enter_context(
            loader.training_batches(drawn_from, seed=config.seed, start=progress["examples"], **reading)
        )
        batches = stack.enter_context(contextlib.closing(sharding.to_devices(on_host, mesh)))

        def validate() -> float:
            """Evaluates the validation split, reports it and returns the SSIM that the best checkpoint is chosen by."""
            with loader.evaluation_batches(val_sources, **reading) as val_batches:
                rows, previews = evaluate(predict, score, state.best_params, val_batches, val_set, mesh)
            scores = summarise(rows)["all"]
            means = {f"val/{name}": value["mean"] for name, value in scores["reconstruction"].items()}
            watch.scalars(at, means | {f"val/corrupted/{n}": v["mean"] for n, v in scores["corrupted"].items()})
            for name, images in previews.items():
                watch.image(at, name, images)
            logger.info("step %d: validation %s", at, one_line(scores))
            return means["val/ssim"]

        in_flight: collections.deque[Metrics] = collections.deque(maxlen=3)
        interval: list[Metrics] = []
        unreported: Interval | None = None
        timed_from, clock, waited = at, time.perf_counter(), 0.0
        stopping = False
        while at < config.steps and not stopping:
            asked = time.perf_counter()
            batch = next(batches)
            if in_flight and in_flight[-1]["loss"].is_ready():  # type: ignore[attr-defined]
                waited += time.perf_counter() - asked  # the device had nothing left to do, at least at the end
            state, values = train_step(state, batch, *cached)
            at += 1
            interval.append(values)
            in_flight.append(values)
            # Two steps are under way at most: more would only fill the device's memory with waiting batches.
            jax.block_until_ready(in_flight[0])
            if at == start + 1:
                jax.block_until_ready(values)
                logger.info(FIRST_STEP)
                watch.open_board()
                timed_from, clock, waited = at, time.perf_counter(), 0.0  # all this is only once
            watch.bar.update()

            stopping = stop_after(at)
            last = stopping or at == config.steps
            save = last or at % config.checkpoint_every == 0
            assess = at == config.steps or at % config.eval_every == 0
            if last or (at % config.log_every == 0 and at > timed_from):
                if unreported:
                    report(watch, unreported, config)
                now = time.perf_counter()
                rate, share = (at - timed_from) * config.batch_size / (now - clock), waited / (now - clock)
                unreported, interval, timed_from, clock, waited = Interval(at, interval, rate, share), [], at, now, 0.0
            if save or assess:
                if unreported:
                    report(watch, unreported, config)
                    unreported = None
                require_finite(at, jax.device_get(values), config)
                ssim = validate() if assess else -1.0
                progress = {"step": at, "examples": at * config.batch_size, "files": files}
                if ssim > best_ssim:
                    best_ssim = ssim
                    checkpoint.save(best, state, progress | {"ssim": ssim, "validated_on": val_files}, config)
                if save:
                    checkpoint.save(newest, state, progress, config)
                timed_from, clock, waited = at, time.perf_counter(), 0.0

    # 5. Everything is written by now.
    if jax.process_index() == 0:
        from mrjax.report import figures  # which takes a while to import: the first step need not wait for it

        figures.curves(Path(workdir) / "curves.png", read_rows(workdir))
    if at < config.steps:
        logger.info("stopped; step %d of %d is saved, the same command goes on from there", at, config.steps)


def sources(config: ConfigDict, split: str, volumes: list[hdf5.Volume]) -> tuple[list[loader.Source], Sizes | None]:
    """The slices of the volumes: of one size, or in buckets of several, and then which sizes each bucket has."""
    if size := config.data.image_size:
        return [keep(config, loader.Slices(volumes, size, config.data.resize, config.data.neighbours))], None
    found = buckets.buckets(volumes, config.data.max_shapes, config.data.neighbours)
    logger.info("%s: %s", split, buckets.describe(found))
    return [keep(config, bucket) for bucket in found], {bucket.shape: bucket.sizes for bucket in found}


def keep(config: ConfigDict, source: loader.Source) -> loader.Source:
    """The source, kept in memory after its first reading if config.data.cache = 'host'."""
    return data_cache.HostCache(source) if config.data.cache == "host" else source


def cache_on_devices(config: ConfigDict, source: loader.Source, mesh: Mesh) -> tuple[()] | tuple[device_cache.Cache]:
    """What config.data.cache = 'device' gives the step to draw its batches from."""
    if config.data.cache != "device":
        return ()
    read = functools.partial(data_cache.read_all, source)
    started = time.perf_counter()
    loaded = device_cache.load(read, len(source), mesh, config.data.cache_half)
    size = sum(x.nbytes for x in loaded.values())
    logger.info(
        "%d slices, %.2f GB, are on the devices after %.1f s", len(source), size / 1e9, time.perf_counter() - started
    )
    return (loaded,)


def introduce(
    config: ConfigDict, workdir: str, mesh: Mesh, state: step.TrainState, start: int, files: str, val_files: str
) -> None:
    """Says what is about to run, and on what."""
    device = jax.devices()[0]
    logger.info("%d x %s (%s), mesh %s", mesh.size, device.device_kind, device.platform, dict(mesh.shape))
    logger.info("training on %s; validating on %s", files, val_files)
    if start == 0:
        logger.info(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    elif start < config.steps:
        logger.info("going on after step %d of %d", start, config.steps)
    else:
        logger.info("%s has all its %d steps: nothing left to train", workdir, start)
        return
    logger.info("%d steps of %d slices; compiling the first takes a while", config.steps - start, config.batch_size)


class Interval(NamedTuple):
    """Steps between two lines of the log.

    Attributes:
      step: the last one.
      values: what they returned, still on the device.
      images_per_second: over all devices.
      data_wait: the share of the time in which the device had nothing to do but wait for data, at most.
    """

    step: int
    values: list[Metrics]
    images_per_second: float
    data_wait: float


def report(watch: Watch, interval: Interval, config: ConfigDict) -> None:
    """Logs the means of an interval; a loss that is not finite is a `UserError`."""
    values = jax.device_get(interval.values)
    row = {name: statistics.fmean(float(v[name]) for v in values) for name in values[0]}
    require_finite(interval.step, row, config)
    row["learning_rate"] = float(values[-1]["learning_rate"])
    row["images_per_second"], row["data_wait"] = interval.images_per_second, interval.data_wait
    watch.scalars(interval.step, row)
    left = (config.steps - interval.step) * config.batch_size / max(interval.images_per_second, 1e-9)
    logger.info(
        "step %d/%d  loss %.5f  %.1f images/s  %d:%02d left",
        *(interval.step, config.steps, row["loss"], interval.images_per_second, left // 60, left % 60),
    )
    if interval.data_wait > 0.05:
        faster = {"none": "set config.data.cache='host', or ", "host": "set config.data.cache='device', or "}
        logger.warning(
            "waited for data %.0f %% of the time: %sraise config.data.workers (%d) or config.data.prefetch (%d)",
            *(100 * interval.data_wait, faster.get(config.data.cache, ""), config.data.workers, config.data.prefetch),
        )


def require_finite(at: int, values: dict[str, Any], config: ConfigDict) -> None:
    """Raises a `UserError` if loss, gradients or parameters are not finite, so that such a state is never saved."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {at}, expected a finite one; lower config.learning_rate "
                f"({config.learning_rate}) in a new --workdir, or look for faulty data with python -m mrjax.check"
            )


def one_line(scores: Scores) -> str:
    """PSNR and SSIM of a summary, before and after."""
    before, after = scores["corrupted"], scores["reconstruction"]
    return ", ".join(
        f"{name.upper()} {after[name]['mean']:.{digits}f} (corrupted {before[name]['mean']:.{digits}f})"
        for name, digits in (("psnr", 2), ("ssim", 4))
    )


def prepare_data(config: ConfigDict) -> tuple[ConfigDict, list[hdf5.Volume], list[hdf5.Volume]]:
    """Finds and checks the files, makes the demo data if no data are named, and settles the image size.

    Returns:
      The config with `data.dir` filled in, and `data.image_size` if the files have one; the training volumes and the
      validation volumes.
    """
    config = config.copy_and_resolve_references()
    if not (config.data.dir or config.data.train):
        repeated = config.task in splits.REPEATED
        config.data.dir = f"{DEMO}-repeated" if repeated else DEMO
        with processes.first_process_first():
            if jax.process_index() == 0 and not os.path.isdir(config.data.dir):
                logger.info("config.data.dir is not set: making the demo data in %s", config.data.dir)
                acquisition.make(config.data.dir, **(acquisition.REPEATED if repeated else {}))
    started = time.perf_counter()
    train_set, val_set = (
        splits.volumes(
            splits.locate(config.data, split),
            config.task,
            on_bad_file=config.data.on_bad_file,
            read_all=config.data.check == "samples",
            mask=config.acquisition.mask,
        )
        for split in ("train", "val")
    )
    logger.info("checked %d files in %.1f s", len(train_set) + len(val_set), time.perf_counter() - started)
    sizes = {volume.data_shape for volume in train_set + val_set}
    if not config.data.image_size and len(sizes) == 1:
        config.data.image_size = sizes.pop()
    if config.normalise == "volume":
        splits.needs_maximum(train_set + val_set)
    return config, train_set, val_set
