"""Time a training step and its parts on this machine's devices.

    python -m benchmarks.step_time [--precision=float32,bfloat16] [--size=256] [--channels=32] [--batch=4,8]

Flags take lists; every combination is measured. Each part is compiled by itself and timed in turn with the whole step,
several rounds after a warm-up. FLOP/s of convolutions and matrix products are compared with the fastest matrix product
of the same device in the same precision (MFU), and on an accelerator bytes with the fastest copy (roofline).
`--largest` also finds the largest batch that fits, from the compiled step's memory analysis, and runs it.
"""

import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from jax.stages import Compiled
from ml_collections import ConfigDict

from benchmarks import programs
from benchmarks.report import Table, interleaved, publish, spread
from mrjax import cli, experiment
from mrjax import train_step as step
from mrjax.errors import UserError
from mrjax.mri.tasks import Example, Task, training_keys
from mrjax.parallel import memory, sharding

Parts = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """A combination of the flags."""

    precision: str
    size: int
    channels: int
    batch: int


def make_config(case: Case, levels: int) -> ConfigDict:
    """Return the config of a case."""
    return programs.unet_config(
        size=case.size, channels=case.channels, levels=levels, batch=case.batch, precision=case.precision
    )


def make_arguments(config: ConfigDict, mesh: Mesh, coils: int) -> tuple[step.TrainState, step.Batch]:
    """Return an initial state and a batch of random k-space."""
    kspace = programs.random_kspace(config.batch_size, coils, *config.data.image_size)
    return programs.initial_state(config, mesh), programs.training_batch({"kspace": kspace}, mesh)


def compile_step(config: ConfigDict, mesh: Mesh, coils: int) -> tuple[Compiled, int]:
    """Return the compiled training step and its FLOPs over all devices."""
    return programs.compile_train_step(config, mesh, programs.abstract_batch(config, mesh, coils))


def make_parts(config: ConfigDict, compiled: Compiled, state: step.TrainState, batch: step.Batch) -> Parts:
    """Return the whole step and its parts, each compiled by itself, as functions to time."""
    recipe = experiment.make_recipe(config, sharding.make_mesh())
    params, opt_state = jax.tree.map(jnp.copy, (state.params, state.opt_state))

    def whole_step() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    def corrupt(task: Task) -> Callable[[], Any]:
        jitted = jax.jit(lambda batch: task(batch, training_keys(0, batch["index"])))
        return lambda: jitted(batch)

    unaugmented = config.copy_and_resolve_references()
    programs.disable_augmentation(unaugmented)

    def loss(params: Any, example: Example) -> jax.Array:
        scaling = recipe.normalise(example.corrupted, batch["maximum"])
        inputs = step.network_inputs(recipe, example, scaling)
        prediction = step.run_network(recipe.model, params, inputs)
        return recipe.loss(prediction, scaling.apply(example.target), inputs.offset)

    corrupted = corrupt(recipe.task)
    example, forward, both = corrupted(), jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    gradients, update = both(params, example)[1], jax.jit(recipe.optimizer.update)
    return {
        "whole step": whole_step,
        "corruption": corrupt(experiment.make_recipe(unaugmented, recipe.mesh).task),
        "corruption + augmentation": corrupted,
        "forward": lambda: forward(params, example),
        "forward + backward": lambda: both(params, example),
        "optimizer": lambda: update(gradients, opt_state, params),
    }


def peaks(precision: str) -> tuple[float, float]:
    """Measure the FLOP/s of a large matrix product in this precision and the bytes/s of a large copy on one device."""
    on_cpu = jax.default_backend() == "cpu"
    size, length = (2048, 2**26) if on_cpu else (8192, 2**30)  # a GPU copies 2**26 in the time of a few launches
    square = jax.random.normal(jax.random.key(0), (size, size), precision)  # zeros and ones draw less power
    long = jnp.ones(length, jnp.float32)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
    times = interleaved({"product": lambda: product(square), "copy": lambda: copy(long)}, 7)
    return 2 * size**3 / min(times["product"]), 2 * long.nbytes / min(times["copy"])


def measure(case: Case, levels: int, coils: int, rounds: int) -> dict[str, Any]:
    """Measure one case; returns the raw values, times in seconds."""
    config, mesh = make_config(case, levels), sharding.make_mesh()
    compiled, operations = compile_step(config, mesh, coils)
    times = interleaved(make_parts(config, compiled, *make_arguments(config, mesh, coils)), rounds)
    cost, devices = compiled.cost_analysis() or {}, jax.device_count()
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    total, bytes_accessed, flops = median["whole step"], cost.get("bytes accessed"), operations / devices
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # before `peaks`, whose arrays are larger
    product, copy = peaks(case.precision)
    parts = {
        "whole step": total,
        "corruption": median["corruption"],
        "augmentation": median["corruption + augmentation"] - median["corruption"],
        "forward": median["forward"],
        "backward": median["forward + backward"] - median["forward"],
        "optimizer": median["optimizer"],
    }
    accelerator = jax.default_backend() != "cpu"  # a CPU's caches hold what XLA counts as traffic
    return {
        **case._asdict(),
        "seconds": times,
        "parts": parts,
        "corruption_and_augmentation_share": median["corruption + augmentation"] / total,
        "images_per_second": case.batch / total,
        "flops": flops,  # on one device, like the next two
        "flops_by_xla": cost.get("flops"),  # without mrjax's own CPU kernels, like the next
        "bytes_by_xla": bytes_accessed,
        "product_flops_per_second": product,
        "copy_bytes_per_second": copy,
        "mfu": flops / total / product,
        "roofline_share": (
            max(flops / product, bytes_accessed / copy) / total if accelerator and bytes_accessed else None
        ),
        "needed_bytes": memory.needed_bytes(compiled),
        "peak_bytes": peak,
        "devices": devices,
    }


def largest_batch(case: Case, levels: int, coils: int) -> dict[str, Any]:
    """Find the largest batch whose step fits, to a sixteenth: double it, bisect, then run it."""
    mesh = sharding.make_mesh()
    limit, unit = memory.available_bytes(mesh), mesh.size
    if limit is None:
        raise UserError("--largest: this device does not say how much memory it has, expected one that does")

    def needed_bytes(batch: int) -> int:
        return memory.needed_bytes(compile_step(make_config(case._replace(batch=batch), levels), mesh, coils)[0])

    fits, too_large = 0, unit
    while needed_bytes(too_large) <= limit:
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > max(unit, fits // 16):
        middle = (fits + too_large) // 2 // unit * unit
        fits, too_large = (middle, too_large) if needed_bytes(middle) <= limit else (fits, middle)
    while fits:
        try:
            config = make_config(case._replace(batch=fits), levels)
            compiled, _ = compile_step(config, mesh, coils)
            jax.block_until_ready(compiled(*make_arguments(config, mesh, coils)))
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fits -= max(unit, fits // 16 // unit * unit)
    return {**case._asdict(), "batch": fits, "limit_bytes": limit}


COLUMNS = ("precision", "size", "channels", "batch")


def step_table(cases: list[Case], results: list[dict[str, Any]]) -> Table:
    """Return the table of the whole steps."""
    rows = []
    for case, result in zip(cases, results, strict=True):
        total, peak = result["parts"]["whole step"], result["peak_bytes"]
        rows.append(
            [
                *case,
                result["images_per_second"],
                spread(result["seconds"]["whole step"], 1e3),
                1e-9 * result["flops"] / total,
                100 * result["mfu"],
                1e-9 * result["flops"],
                result["flops_by_xla"] and 1e-9 * result["flops_by_xla"],
                result["bytes_by_xla"] and 1e-9 * result["bytes_by_xla"],
                result["needed_bytes"] / 1e9,
                peak and peak / 1e9,
                result["roofline_share"] and 100 * result["roofline_share"],
            ]
        )
    columns = [*COLUMNS, "images/s", "ms (quartiles)", "GFLOP/s", "% of a matrix product (MFU)", "GFLOP"]
    columns += ["GFLOP by XLA", "GB accessed by XLA", "GB needed by XLA", "GB peak", "% of the roofline"]
    return Table("The whole training step (bytes, FLOPs and memory: of each device)", columns, rows)


def parts_table(cases: list[Case], results: list[dict[str, Any]]) -> Table:
    """Return the table of the steps' parts."""
    rows = []
    for case, result in zip(cases, results, strict=True):
        total = result["parts"]["whole step"]
        rows.append([*case, *(f"{1e3 * x:.1f} ({100 * x / total:.1f} %)" for x in result["parts"].values())])
    columns = [*COLUMNS, *results[0]["parts"]]
    return Table("Its parts, each compiled by itself: ms (share of the step)", columns, rows)


def main(_: list[str]) -> None:
    """Measure every combination of the flags."""
    values = flags.FLAGS
    sizes = itertools.product(values.precision, *(map(int, x) for x in (values.size, values.channels, values.batch)))
    cases = [Case(*combination) for combination in sizes]
    results = [measure(case, values.levels, values.coils, values.rounds) for case in cases]
    tables = [step_table(cases, results), parts_table(cases, results)]
    raw: dict[str, Any] = {"cases": results}
    if values.largest:
        raw["largest"] = [
            largest_batch(case, values.levels, values.coils) for case in cases if case.batch == cases[0].batch
        ]
        rows = [[*(found[name] for name in COLUMNS), found["limit_bytes"] / 1e9] for found in raw["largest"]]
        tables.append(Table("The largest batch that fits", [*COLUMNS, "GB free"], rows))
    config = {name: values[name].value for name in (*COLUMNS, "levels", "coils", "rounds")}
    publish("step_time", config, tables, raw, values.json)


if __name__ == "__main__":
    flags.DEFINE_list("precision", ["float32"], "precisions of the network's arithmetic: float32, bfloat16")
    flags.DEFINE_list("size", ["256"], "heights and widths of the images")
    flags.DEFINE_list("channels", ["32"], "channels of the U-Net's first level")
    flags.DEFINE_list("batch", ["4"], "slices in a step, over all devices")
    flags.DEFINE_integer("levels", 4, "levels of the U-Net")
    flags.DEFINE_integer("coils", 4, "coils of each slice")
    flags.DEFINE_integer("rounds", 5, "how often each part is timed")
    flags.DEFINE_bool("largest", False, "also find the largest batch that fits: compiles and runs many")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
