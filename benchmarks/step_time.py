"""Where the time of a training step goes, on whatever device there is.

    python -m benchmarks.step_time --size=256 --channels=32 --batch=4 [--precision=bfloat16] [--json=FILE]

The parts are compiled and timed by themselves, in turn with the whole step, several rounds after a warm-up; medians and
the spread from the first to the third quartile are printed. FLOP/s are set against the fastest matrix product that the
same device does in the same precision.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mrjax import build, checkpoint, cli, losses, sharding, step
from mrjax.config import check, check_devices, defaults
from mrjax.mri.augment import Augment
from mrjax.mri.tasks import training_keys


def make_batch(batch: int, coils: int, size: int) -> dict[str, np.ndarray]:
    """K-space of noise: what it shows does not matter to the time it takes."""
    rng = np.random.default_rng(0)
    shape = (batch, coils, size, size)
    kspace = (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)
    return {"kspace": kspace, "index": np.arange(batch, dtype=np.uint32), "maximum": np.ones(batch, np.float32)}


def seconds(run: Callable[[], Any]) -> float:
    """Wall time until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(parts: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each part, round by round, so that a drift of the machine's speed meets all of them alike."""
    for run in parts.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, run in parts.items():
            times[name].append(seconds(run))
    return times


def main(argv: list[str]) -> None:
    """Builds the step of configs/unet.py's kind at the size asked for, and times it."""
    values = flags.FLAGS
    config = defaults()
    config.batch_size, config.precision = values.batch, values.precision
    config.model.channels, config.model.levels = values.channels, values.levels
    config.data.image_size = (values.size, values.size)
    check(config)
    mesh = sharding.make_mesh()
    check_devices(config, mesh.size)
    model, optimizer, task = build.model(config), build.optimizer(config), build.task(config)
    fixed = {"model": model, "normalise_by": config.normalise}
    train_step = step.compile_train(mesh, optimizer=optimizer, task=task, seed=0, **fixed)

    batch = jax.device_put(make_batch(values.batch, values.coils, values.size), sharding.by_example(mesh))
    init = jax.jit(
        lambda: step.init_state(model, optimizer, config.data.image_size, 0), out_shardings=sharding.replicated(mesh)
    )
    holder = {"state": init()}

    def whole() -> Any:
        holder["state"], metrics = train_step(holder["state"], batch)
        return metrics

    def corrupt(task: step.Task) -> Callable[[], Any]:
        jitted = jax.jit(lambda batch: task(batch, training_keys(0, batch["index"])))
        return lambda: jitted(batch)

    plain = config.copy_and_resolve_references()
    plain.augment.update({name: 0.0 for name in vars(Augment()) if name.endswith("_p")})
    images, params = corrupt(task)(), init().params

    def loss(params: Any, corrupted: jax.Array, target: jax.Array) -> jax.Array:
        return losses.mean_squared_error(step.run_network(model, params, corrupted), target)

    forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    update = jax.jit(optimizer.update)
    gradients, opt_state = both(params, *images)[1], holder["state"].opt_state
    opt_state = jax.tree.map(jnp.copy, opt_state)
    times = measure(
        {
            "whole step": whole,
            "corruption": corrupt(build.task(plain)),
            "corruption + augmentation": corrupt(task),
            "forward": lambda: forward(params, *images),
            "forward + backward": lambda: both(params, *images),
            "optimizer": lambda: update(gradients, opt_state, params),
        },
        values.rounds,
    )
    size = 4096 if jax.default_backend() != "cpu" else 2048
    square = jnp.ones((size, size), config.precision)
    product = jax.jit(lambda a: a @ a)
    peak = 2 * size**3 / min(measure({"product": lambda: product(square)}, 5)["product"])

    compiled = train_step.lower(holder["state"], batch).compile()
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    median = {name: statistics.median(of_part) for name, of_part in times.items()}
    total, flops = median["whole step"], cost.get("flops")
    rows = {
        "whole step": total,
        "  corruption": median["corruption"],
        "  augmentation": median["corruption + augmentation"] - median["corruption"],
        "  forward": median["forward"],
        "  backward": median["forward + backward"] - median["forward"],
        "  optimizer": median["optimizer"],
    }
    device = jax.devices()[0]
    result = {
        "device": f"{mesh.size} x {device.device_kind} ({platform.processor() or platform.machine()})",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "config": {name: values[name].value for name in ("size", "channels", "levels", "batch", "coils", "precision")},
        "images_per_second": values.batch / total,
        "seconds": times,
        "share_of_step": {name.strip(): value / total for name, value in rows.items()},
        "flops_by_xla": flops,
        "matrix_product_flops_per_second": peak,
        "mfu": flops / total / peak if flops else None,
        "bytes_accessed_by_xla": cost.get("bytes accessed"),
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }
    print(f"{result['device']}, JAX {jax.__version__}, {result['config']}")
    for name, value in rows.items():
        print(f"{name:<18}{1e3 * value:>10.1f} ms {100 * value / total:>6.1f} %")
    low, high = np.percentile(times["whole step"], [25, 75])
    print(f"{result['images_per_second']:.2f} images/s; step, quartiles {1e3 * low:.1f} to {1e3 * high:.1f} ms")
    if flops:
        print(f"{flops / total / 1e9:.0f} GFLOP/s by XLA's count, {100 * result['mfu']:.0f} % of a matrix product's")
    if values.json:
        checkpoint.write_json(Path(values.json), json.loads(json.dumps(result)))


if __name__ == "__main__":
    flags.DEFINE_integer("size", 256, "height and width of the images")
    flags.DEFINE_integer("channels", 32, "of the U-Net's first level")
    flags.DEFINE_integer("levels", 4, "of the U-Net")
    flags.DEFINE_integer("batch", 4, "slices in a step, over all devices")
    flags.DEFINE_integer("coils", 4, "of each slice")
    flags.DEFINE_enum("precision", "float32", ["float32", "bfloat16"], "of the network's arithmetic")
    flags.DEFINE_integer("rounds", 5, "how often each part is timed")
    flags.DEFINE_string("json", None, "file to write everything measured to")
    cli.run(main)
