"""Time the training step beside PyTorch's: fastMRI's U-Net of the same size, batch and precision.

    python -m benchmarks.peers --size=256 --channels=32 --batch=4 --precision=float32,bfloat16 [--json=FILE]

PyTorch runs `fastmri.models.Unet`, mean squared error and Adam in four forms: eager, channels_last, compiled, and both,
under autocast for bfloat16; the fastest is the peer. mrjax runs its own `train_step` on the same images, once with
average pooling as in fastMRI and once with its default, max pooling. Its time includes normalising the images and the
norms of gradients and parameters, which PyTorch does not compute. Rounds take turns in one process, and each side uses
all cores. The machine must be idle otherwise: other load slows OpenMP's threads and XLA's unequally.
"""

import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import programs
from benchmarks.report import PYTORCH_FORMS, Table, interleaved, publish, require_packages, spread
from mrjax import cli
from mrjax.config import check
from mrjax.parallel import sharding


def mrjax_step(
    pool: str, channels: int, levels: int, precision: str, images: tuple[np.ndarray, np.ndarray]
) -> tuple[Callable[[], Any], int]:
    """Return mrjax's training step on (corrupted, target), (batch, size, size) float32, and its parameter count."""
    corrupted, target = images
    config = programs.unet_config(
        size=corrupted.shape[-1], channels=channels, levels=levels, batch=len(corrupted), precision=precision
    )
    config.task, config.schedule, config.model.pool = "paired", "constant", pool
    programs.disable_augmentation(config)
    check(config)
    mesh = sharding.make_mesh()
    train_step = programs.jit_train_step(config, mesh)
    batch = programs.training_batch({"input": corrupted, "target": target}, mesh)
    state = programs.initial_state(config, mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def run() -> Any:
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics

    return run, count


def measure(precision: str) -> tuple[Table, dict[str, Any]]:
    """Return the table of one precision, and the seconds of every round."""
    from benchmarks import pytorch

    values = flags.FLAGS
    rng = np.random.default_rng(0)
    images = tuple(rng.random((2, values.batch, values.size, values.size), dtype=np.float32))
    counts: set[int] = set()

    def make(form: str) -> Callable[[], None]:
        run, count = pytorch.training_step(form, values.channels, values.levels, precision, images)
        counts.add(count)
        return run

    peers = {f"PyTorch {form}": run for form, run in pytorch.warm_up(values.forms, make).items()}
    ours = {}
    for pool in ("avg", "max"):
        run, count = mrjax_step(pool, values.channels, values.levels, precision, images)
        ours[f"mrjax, {pool} pooling"] = run
        counts.add(count)
    if len(counts) != 1:
        raise AssertionError(f"networks of different sizes, {counts} parameters: their times cannot be compared")
    forms = peers | ours
    times = interleaved({name: run for name, run in forms.items() if callable(run)}, values.rounds)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min((median[name] for name in peers if name in median), default=None)
    rows: list[list[Any]] = []
    for name, run_or_reason in forms.items():
        if name in times:
            relative = best and median[name] / best
            rows.append([name, spread(times[name], 1e3), values.batch / median[name], relative])
        else:
            rows.append([name, run_or_reason, None, None])
    title = f"Training step, {precision}, {next(iter(counts)):,} parameters, batch {values.batch}"
    columns = ["form", "ms: median (quartiles)", "images/s", "time over the best PyTorch form"]
    return Table(title, columns, rows), times


def main(_: list[str]) -> None:
    """Time every form in every precision."""
    require_packages("torch", "fastmri")
    values = flags.FLAGS
    measured = {precision: measure(precision) for precision in values.precision}
    config = {name: values[name].value for name in ("size", "channels", "levels", "batch", "rounds")}
    tables, raw = [table for table, _ in measured.values()], {name: times for name, (_, times) in measured.items()}
    publish("peers", config, tables, raw, values.json)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU
    flags.DEFINE_integer("size", 256, "height and width of the images")
    flags.DEFINE_integer("channels", 32, "channels of the U-Net's first level")
    flags.DEFINE_integer("levels", 4, "levels of the U-Net")
    flags.DEFINE_integer("batch", 4, "slices in a step")
    flags.DEFINE_list("precision", ["float32"], "precision of the networks' arithmetic: float32, bfloat16 or both")
    flags.DEFINE_multi_enum("forms", PYTORCH_FORMS, PYTORCH_FORMS, "forms of PyTorch; may be given more than once")
    flags.DEFINE_integer("rounds", 5, "how often each form is timed")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
