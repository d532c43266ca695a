"""Where the time of a training step goes, on whatever device there is.

    python -m benchmarks.step_time [--precision=float32,bfloat16] [--size=256] [--channels=32] [--batch=4,8]

Flags take lists; every combination is measured. The parts are compiled and timed by themselves, in turn with the whole
step, several rounds after a warm-up. FLOP/s, of convolutions and matrix products, are set against the fastest matrix
product that the same device does in the same precision, and on an accelerator bytes against the fastest copy: the
roofline. `--largest` also finds the largest batch that fits, by the compiled step's own account of its memory, and runs
it.
"""

import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.stages import Compiled
from ml_collections import ConfigDict

from benchmarks.fit import flops
from benchmarks.report import Table, interleaved, publish, spread
from mrjax import cli, experiment
from mrjax import train_step as step
from mrjax.config import check, defaults, mesh_shape
from mrjax.errors import UserError
from mrjax.measures import losses
from mrjax.mri.augment import Augment
from mrjax.mri.tasks import Example, training_keys
from mrjax.parallel import memory, sharding

Parts = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """A combination of the flags."""

    precision: str
    size: int
    channels: int
    batch: int


def make_config(case: Case, levels: int) -> ConfigDict:
    """The step of configs/unet.py's kind at the size asked for."""
    config = defaults()
    config.batch_size, config.precision = case.batch, case.precision
    config.model.channels, config.model.levels = case.channels, levels
    config.data.image_size = (case.size, case.size)
    check(config)
    mesh_shape(config, jax.device_count())
    return config


def make_batch(batch: int, coils: int, size: int) -> dict[str, np.ndarray]:
    """K-space of noise: what it shows does not matter to the time it takes."""
    rng = np.random.default_rng(0)
    shape = (batch, coils, size, size)
    kspace = (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)
    return {"kspace": kspace, "index": np.arange(batch, dtype=np.uint32), "maximum": np.ones(batch, np.float32)}


def compile_step(config: ConfigDict, coils: int) -> tuple[Compiled, int, Callable[[], tuple[Any, Any]]]:
    """The compiled step, the FLOPs of its convolutions and products, and what makes a (state, batch) for it."""
    mesh = sharding.make_mesh()
    model, optimizer = experiment.model(config), experiment.optimizer(config)
    fixed = {"seed": 0, "normalise_by": config.normalise, "accumulate": config.accumulate}
    train_step = step.compile_train(mesh, model=model, optimizer=optimizer, task=experiment.task(config), **fixed)
    size = config.data.image_size
    shape = (config.batch_size, coils, *size)
    dtypes = {"kspace": jnp.complex64, "index": jnp.uint32, "maximum": jnp.float32}
    batch = {
        name: jax.ShapeDtypeStruct(shape if name == "kspace" else shape[:1], dtype, sharding=sharding.by_example(mesh))
        for name, dtype in dtypes.items()
    }
    init = jax.jit(lambda: step.init_state(model, optimizer, size, 0), out_shardings=sharding.replicated(mesh))

    def arguments() -> tuple[Any, Any]:
        return init(), jax.device_put(make_batch(config.batch_size, coils, size[0]), sharding.by_example(mesh))

    traced = train_step.trace(experiment.abstract_state(experiment.initial_state(config), mesh), batch)
    return traced.lower().compile(), flops(traced.jaxpr.jaxpr), arguments


def parts_of_the_step(config: ConfigDict, coils: int, compiled: Compiled, arguments: tuple[Any, Any]) -> Parts:
    """The whole step and its parts, each compiled by itself, as functions to be timed."""
    state, batch = arguments
    model, optimizer = experiment.model(config), experiment.optimizer(config)
    params, opt_state = jax.tree.map(jnp.copy, (state.params, state.opt_state))
    holder = {"state": state}

    def whole() -> Any:
        holder["state"], metrics = compiled(holder["state"], batch)
        return metrics

    def corrupt(task: step.Task) -> Callable[[], Any]:
        jitted = jax.jit(lambda batch: task(batch, training_keys(0, batch["index"])))
        return lambda: jitted(batch)

    plain = config.copy_and_resolve_references()
    plain.augment.update({name: 0.0 for name in vars(Augment()) if name.endswith("_p")})

    def loss(params: Any, example: Example) -> jax.Array:
        scale = step.scaling(example.corrupted, batch, "slice")
        inputs = step.network_inputs(example, scale)
        return losses.mean_squared_error(step.run_network(model, params, inputs), scale.apply(example.target))

    corrupted = corrupt(experiment.task(config))
    example, forward, both = corrupted(), jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    gradients, update = both(params, example)[1], jax.jit(optimizer.update)
    return {
        "whole step": whole,
        "corruption": corrupt(experiment.task(plain)),
        "corruption + augmentation": corrupted,
        "forward": lambda: forward(params, example),
        "forward + backward": lambda: both(params, example),
        "optimizer": lambda: update(gradients, opt_state, params),
    }


def peaks(precision: str) -> tuple[float, float]:
    """The FLOP/s of a large matrix product in this precision, and the bytes/s of a large copy, of one device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square, long = jnp.ones((size, size), precision), jnp.ones(2**26, jnp.float32)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
    times = interleaved({"product": lambda: product(square), "copy": lambda: copy(long)}, 7)
    return 2 * size**3 / min(times["product"]), 2 * long.nbytes / min(times["copy"])


def measure(case: Case, levels: int, coils: int, rounds: int) -> dict[str, Any]:
    """Everything about one combination."""
    config = make_config(case, levels)
    compiled, operations, arguments = compile_step(config, coils)
    times = interleaved(parts_of_the_step(config, coils, compiled, arguments()), rounds)
    cost, devices = compiled.cost_analysis() or {}, jax.device_count()
    median = {name: statistics.median(of_part) for name, of_part in times.items()}
    total, moved, needed = median["whole step"], cost.get("bytes accessed"), operations / devices
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
        "flops": needed,  # of one device, like the next two
        "flops_by_xla": cost.get("flops"),  # without what our own operations on CPUs do, like the next
        "bytes_by_xla": moved,
        "product_flops_per_second": product,
        "copy_bytes_per_second": copy,
        "mfu": needed / total / product,
        "roofline_share": max(needed / product, moved / copy) / total if accelerator and moved else None,
        "needed_bytes": memory.needed_bytes(compiled),
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "devices": devices,
    }


def largest_batch(case: Case, levels: int, coils: int) -> dict[str, Any]:
    """The largest batch whose step fits, to a sixteenth: doubled until one does not, bisected, and then run."""
    limit, unit = memory.available_bytes(sharding.make_mesh()), jax.device_count()
    if limit is None:
        raise UserError("--largest: this device does not say how much memory it has, expected one that does")

    def needs(batch: int) -> int:
        return memory.needed_bytes(compile_step(make_config(case._replace(batch=batch), levels), coils)[0])

    fits, too_large = 0, unit
    while needs(too_large) <= limit:
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > max(unit, fits // 16):
        middle = (fits + too_large) // 2 // unit * unit
        fits, too_large = (middle, too_large) if needs(middle) <= limit else (fits, middle)
    while fits:
        try:
            compiled, _, arguments = compile_step(make_config(case._replace(batch=fits), levels), coils)
            jax.block_until_ready(compiled(*arguments()))
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fits -= max(unit, fits // 16 // unit * unit)
    return {**case._asdict(), "batch": fits, "limit_bytes": limit}


def main(argv: list[str]) -> None:
    """Measures every combination of the flags."""
    cli.expect_no_arguments(argv)
    values = flags.FLAGS
    sizes = itertools.product(values.precision, *(map(int, x) for x in (values.size, values.channels, values.batch)))
    cases = [Case(*combination) for combination in sizes]
    results = [measure(case, values.levels, values.coils, values.rounds) for case in cases]
    columns = ("precision", "size", "channels", "batch")
    of_step, of_parts = [], []
    for case, one in zip(cases, results, strict=True):
        total = one["parts"]["whole step"]
        of_step.append(
            [
                *(*case, one["images_per_second"], spread(one["seconds"]["whole step"], 1e3)),
                *(1e-9 * one["flops"] / total, 100 * one["mfu"], 1e-9 * one["flops"]),
                *(one[name] and 1e-9 * one[name] for name in ("flops_by_xla", "bytes_by_xla")),
                *(one["needed_bytes"] / 1e9, one["peak_bytes"] and one["peak_bytes"] / 1e9),
                one["roofline_share"] and 100 * one["roofline_share"],
            ]
        )
        of_parts.append([*case, *(f"{1e3 * x:.1f} ({100 * x / total:.1f} %)" for x in one["parts"].values())])
    tables = [
        Table(
            "The whole training step (bytes, FLOPs and memory: of each device)",
            [
                *(*columns, "images/s", "ms (quartiles)", "GFLOP/s", "% of a matrix product (MFU)", "GFLOP"),
                *("GFLOP by XLA", "GB accessed by XLA", "GB needed by XLA", "GB peak", "% of the roofline"),
            ],
            of_step,
        ),
        Table("Its parts, each compiled by itself: ms (share of the step)", [*columns, *results[0]["parts"]], of_parts),
    ]
    raw: dict[str, Any] = {"cases": results}
    if values.largest:
        raw["largest"] = [
            largest_batch(case, values.levels, values.coils) for case in cases if case.batch == cases[0].batch
        ]
        rows = [[*(one[name] for name in columns), one["limit_bytes"] / 1e9] for one in raw["largest"]]
        tables.append(Table("The largest batch that fits", [*columns, "GB free"], rows))
    config = {name: values[name].value for name in (*columns, "levels", "coils", "rounds")}
    publish("step_time", config, tables, raw, values.json)


if __name__ == "__main__":
    flags.DEFINE_list("precision", ["float32"], "of the network's arithmetic: float32, bfloat16")
    flags.DEFINE_list("size", ["256"], "height and width of the images")
    flags.DEFINE_list("channels", ["32"], "of the U-Net's first level")
    flags.DEFINE_list("batch", ["4"], "slices in a step, over all devices")
    flags.DEFINE_integer("levels", 4, "of the U-Net")
    flags.DEFINE_integer("coils", 4, "of each slice")
    flags.DEFINE_integer("rounds", 5, "how often each part is timed")
    flags.DEFINE_bool("largest", False, "also find the largest batch that fits: compiles and runs many")
    flags.DEFINE_string("json", None, "file to write everything measured to")
    cli.run(main)
