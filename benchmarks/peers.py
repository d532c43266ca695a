"""The training step beside PyTorch's: fastMRI's own U-Net of the same size, batch and precision, in one run.

    python -m benchmarks.peers --size=256 --channels=32 --batch=4 --precision=float32,bfloat16 [--json=FILE]

PyTorch runs `fastmri.models.Unet`, mean squared error and Adam eagerly, channels_last, compiled, and both, under
autocast for bfloat16; the fastest is the peer. mrjax runs its own `train_step` on the same images, once with average
pooling, which is fastMRI's function, and once with its default, max; normalising the images and the norms of gradients
and parameters, which PyTorch is spared, are part of it. Rounds take turns in one process, each side on all cores.
The machine must be idle otherwise: other load holds up OpenMP's threads and XLA's unequally.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from absl import flags
from fastmri.models import Unet

from benchmarks.report import Table, interleaved, publish, spread
from mrjax import cli, experiment
from mrjax import train_step as step
from mrjax.config import check, defaults
from mrjax.mri.augment import Augment
from mrjax.parallel import sharding

# (compiled, channels_last)
FORMS = {
    "eager": (False, False),
    "channels_last": (False, True),
    "compiled": (True, False),
    "compiled, channels_last": (True, True),
}


def device() -> torch.device:
    """The GPU if that is where JAX computes, else the CPU."""
    return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")


def network(form: str, channels: int, levels: int) -> tuple[torch.nn.Module, torch.memory_format]:
    """fastMRI's U-Net on the device in one of FORMS, and the layout that its images should have."""
    compiled, channels_last = FORMS[form]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    unet = Unet(in_chans=1, out_chans=1, chans=channels, num_pool_layers=levels).to(device(), memory_format=layout)
    if compiled:
        # Not dynamic: the levels are one piece of code at several sizes, which PyTorch would compile once for all.
        unet.compile(dynamic=False)
    return unet, layout


def autocast(precision: str) -> torch.autocast:
    """PyTorch's mixed precision for bfloat16, nothing for float32."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16")


def finish() -> None:
    """Waits until what PyTorch was told to do on a GPU is done."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def torch_step(
    form: str, channels: int, levels: int, precision: str, images: tuple[np.ndarray, np.ndarray]
) -> tuple[Callable[[], None], int]:
    """A training step of PyTorch on (corrupted, target), (batch, height, width) float32; its number of parameters."""
    unet, layout = network(form, channels, levels)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3, fused=True)
    corrupted, target = (torch.from_numpy(x[:, None]).to(device(), memory_format=layout) for x in images)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision):
            output = unet(corrupted)
        torch.nn.functional.mse_loss(output.float(), target).backward()
        optimizer.step()
        finish()

    return run, sum(parameter.numel() for parameter in unet.parameters())


def torch_forms(names: list[str], make: Callable[[str], Callable[[], None]]) -> Iterator[tuple[str, Any]]:
    """(form, step that has run once), or (form, why it cannot run): compiling needs a C++ compiler, for one."""
    for name in names:
        torch._dynamo.reset()
        try:
            run = make(name)
            run()
            yield name, run
        except Exception as error:  # whatever stops one form is a row of the table, not the end of the others
            yield name, f"not measured: {type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"


def mrjax_step(
    pool: str, channels: int, levels: int, precision: str, images: tuple[np.ndarray, np.ndarray]
) -> tuple[Callable[[], Any], int]:
    """mrjax's training step on the same images; and the count of parameters."""
    config = defaults()
    config.task, config.precision, config.batch_size, config.schedule = "paired", precision, len(images[0]), "constant"
    config.model.channels, config.model.levels, config.model.pool = channels, levels, pool
    config.data.image_size = images[0].shape[1:]
    config.augment.update({name: 0.0 for name in vars(Augment()) if name.endswith("_p")})
    check(config)
    mesh = sharding.make_mesh()
    parts = {
        "model": experiment.model(config),
        "optimizer": experiment.optimizer(config),
        "task": experiment.task(config),
    }
    train_step = step.compile_train(mesh, seed=0, normalise_by=config.normalise, **parts)
    corrupted, target = images
    number = np.arange(len(corrupted), dtype=np.uint32)
    batch = {"input": corrupted, "target": target, "index": number, "maximum": np.ones(len(number), np.float32)}
    batch = jax.device_put(batch, sharding.by_example(mesh))
    init = jax.jit(
        lambda: step.init_state(parts["model"], parts["optimizer"], config.data.image_size, 0),
        out_shardings=sharding.replicated(mesh),
    )
    holder = {"state": init()}

    def run() -> Any:
        holder["state"], metrics = train_step(holder["state"], batch)
        return metrics

    return run, sum(leaf.size for leaf in jax.tree.leaves(holder["state"].params))


def measure(precision: str) -> tuple[Table, dict[str, Any]]:
    """The table of one precision, and the seconds of every round."""
    values = flags.FLAGS
    rng = np.random.default_rng(0)
    images = tuple(rng.random((2, values.batch, values.size, values.size), dtype=np.float32))
    size = (values.channels, values.levels, precision, images)
    counts: set[int] = set()

    def make(form: str) -> Callable[[], None]:
        run, count = torch_step(form, *size)
        counts.add(count)
        return run

    peers = {f"PyTorch {name}": run for name, run in torch_forms(values.forms, make)}
    ours = {}
    for pool in ("avg", "max"):
        ours[f"mrjax, {pool} pooling"], count = mrjax_step(pool, *size)
        counts.add(count)
    if len(counts) != 1:
        raise AssertionError(f"networks of different sizes, {counts} parameters: their times cannot be compared")
    times = interleaved({name: run for name, run in (peers | ours).items() if callable(run)}, values.rounds)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min((median[name] for name in peers if name in median), default=None)
    rows = [
        [name, spread(times[name], 1e3), values.batch / median[name], best and median[name] / best]
        if name in times
        else [name, run, None, None]
        for name, run in (peers | ours).items()
    ]
    title = f"Training step, {precision}, {next(iter(counts)):,} parameters, batch {values.batch}"
    columns = ["form", "ms: median (quartiles)", "images/s", "time over the best PyTorch form"]
    return Table(title, columns, rows), times


def main(argv: list[str]) -> None:
    """Times every form in every precision asked for."""
    cli.expect_no_arguments(argv)
    values = flags.FLAGS
    measured = {precision: measure(precision) for precision in values.precision}
    config = {name: values[name].value for name in ("size", "channels", "levels", "batch", "rounds")}
    tables, raw = [table for table, _ in measured.values()], {name: times for name, (_, times) in measured.items()}
    publish("peers", config, tables, raw, values.json)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch lives on the same GPU
    flags.DEFINE_integer("size", 256, "height and width of the images")
    flags.DEFINE_integer("channels", 32, "of the U-Net's first level")
    flags.DEFINE_integer("levels", 4, "of the U-Net")
    flags.DEFINE_integer("batch", 4, "slices in a step")
    flags.DEFINE_list("precision", ["float32"], "of the networks' arithmetic: float32, bfloat16 or both")
    flags.DEFINE_multi_enum("forms", list(FORMS), list(FORMS), "of PyTorch; --forms=eager --forms=compiled, and so on")
    flags.DEFINE_integer("rounds", 5, "how often each form is timed")
    flags.DEFINE_string("json", None, "file to write everything measured to")
    cli.run(main)
