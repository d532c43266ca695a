"""Time inference: the latency of one slice and of one volume, and images/s by batch beside PyTorch.

    python -m benchmarks.inference --size=256 --channels=32 --precision=float32 --batches=1,2,4,8 [--json=FILE]

A slice and a volume go through `predict` as in `mrjax.reconstruct`, in batches of 8: k-space in host memory to images
in host memory. By batch, both sides start from images on the device: mrjax runs `predict`, which normalises and scales
back; PyTorch runs fastMRI's network alone, under `inference_mode`, in the forms of `benchmarks.peers`. Rounds take
turns; the fastest form is the peer.
"""

import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from jax.sharding import Mesh

from benchmarks import programs
from benchmarks.report import PYTORCH_FORMS, Table, interleaved, publish, require_packages, spread
from mrjax import cli
from mrjax.config import check
from mrjax.parallel import sharding

_BATCH = 8
Predict = Callable[[programs.Batch], Any]


def measure_latency(predict: Predict, mesh: Mesh) -> tuple[Table, dict[str, Any]]:
    """Time one slice and one volume of k-space, from host memory to host memory."""
    values = flags.FLAGS
    kspace = programs.random_kspace(values.slices, values.coils, values.size, values.size)

    def reconstruct(kspace: np.ndarray, batch_size: int) -> list[np.ndarray]:
        padded = np.pad(kspace, [(0, -len(kspace) % batch_size), (0, 0), (0, 0), (0, 0)])
        results = [
            predict(programs.evaluation_batch({"kspace": padded[i : i + batch_size]}, mesh))
            for i in range(0, len(padded), batch_size)
        ]
        return [np.asarray(images["reconstruction"]) for images, _ in results]

    one = mesh.size  # the smallest batch that the devices can share
    many = -(-_BATCH // mesh.size) * mesh.size
    parts = {
        "one slice": lambda: reconstruct(kspace[:1], one),
        f"a volume of {values.slices} slices": lambda: reconstruct(kspace, many),
    }
    times = interleaved(parts, values.rounds)
    title = f"Latency from k-space, {values.coils} coils, {values.size}x{values.size}, {values.precision}"
    return Table(title, ["what", "ms: median (quartiles)"], [[n, spread(t, 1e3)] for n, t in times.items()]), times


def measure_throughput(predict: Predict, mesh: Mesh, batch_sizes: list[int]) -> tuple[Table, dict[int, Any]]:
    """Time mrjax and every form of PyTorch at each batch size."""
    from benchmarks import pytorch

    values, rows, raw = flags.FLAGS, [], {}
    network = (values.channels, values.levels, values.precision)
    for batch_size in batch_sizes:
        images = np.random.default_rng(0).random((batch_size, values.size, values.size), dtype=np.float32)
        batch = programs.evaluation_batch({"input": images}, mesh)

        def make(form: str, images: np.ndarray = images) -> Callable[[], None]:
            return pytorch.inference_step(form, *network, images)

        forms = pytorch.warm_up(values.forms, make)
        parts: dict[str, Any] = {name: run for name, run in forms.items() if callable(run)}
        times = interleaved(parts | {"mrjax": functools.partial(predict, batch)}, values.rounds)
        speed = {name: batch_size / statistics.median(seconds) for name, seconds in times.items()}
        best = max(parts, key=speed.__getitem__, default=None)
        latency = spread(times["mrjax"], 1e3)
        pytorch_speeds = [speed.get(name, forms[name]) for name in values.forms]
        rows.append([batch_size, latency, speed["mrjax"], *pytorch_speeds, best and speed["mrjax"] / speed[best]])
        raw[batch_size] = times
    columns = ["batch", "mrjax, ms: median (quartiles)", "mrjax, images/s"]
    columns += [f"PyTorch {name}, images/s" for name in values.forms] + ["mrjax over the best PyTorch form"]
    title = f"Throughput by batch, {values.size}x{values.size}, {values.channels} channels, {values.precision}"
    return Table(title, columns, rows), raw


def main(_: list[str]) -> None:
    """Time inference with an untrained network."""
    require_packages("torch", "fastmri")
    values = flags.FLAGS
    batch_sizes, mesh = [int(size) for size in values.batches], sharding.make_mesh()
    for batch_size in batch_sizes:
        config = programs.unet_config(
            size=values.size,
            channels=values.channels,
            levels=values.levels,
            batch=batch_size,
            precision=values.precision,
        )
    config.model.pool = "avg"
    check(config)
    predict = functools.partial(programs.jit_reconstruct(config, mesh), programs.initial_state(config, mesh).params)
    latency, latency_times = measure_latency(predict, mesh)
    by_batch, batch_times = measure_throughput(predict, mesh, batch_sizes)
    names = ("size", "channels", "levels", "coils", "slices", "precision", "rounds")
    config_shown = {name: values[name].value for name in names}
    raw = {"latency": latency_times, "throughput": batch_times}
    publish("inference", config_shown, [latency, by_batch], raw, values.json)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU
    flags.DEFINE_integer("size", 256, "height and width of the images")
    flags.DEFINE_integer("channels", 32, "channels of the U-Net's first level")
    flags.DEFINE_integer("levels", 4, "levels of the U-Net")
    flags.DEFINE_integer("coils", 4, "coils of the k-space")
    flags.DEFINE_integer("slices", 18, "slices of the volume")
    flags.DEFINE_list("batches", ["1", "2", "4", "8"], "batch sizes of the throughput")
    flags.DEFINE_enum("precision", "float32", ["float32", "bfloat16"], "precision of the network's arithmetic")
    flags.DEFINE_multi_enum("forms", PYTORCH_FORMS, PYTORCH_FORMS, "forms of PyTorch; may be given more than once")
    flags.DEFINE_integer("rounds", 5, "how often each is timed")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
