"""How fast a trained network is used: one slice, one volume, and images/s by batch beside PyTorch, in one run.

    python -m benchmarks.inference --size=256 --channels=32 --precision=float32 --batches=1,2,4,8 [--json=FILE]

A slice and a volume go the way that `mrjax.reconstruct` takes: k-space on the host to images on the host, through
`predict`, in batches of 8. By batch, both sides start from images that are on the device: mrjax runs `predict`,
normalisation and its inverse included; PyTorch runs the network of fastMRI alone, under `inference_mode`, in its forms
of `benchmarks.peers`. Rounds take turns; the fastest form is the peer.
"""

import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from absl import flags

from benchmarks import peers
from benchmarks.report import Table, interleaved, publish, spread
from mrjax import cli, experiment, train_step
from mrjax.config import check, defaults
from mrjax.mri.tasks import as_measured
from mrjax.parallel import sharding

_BATCH = 8


def torch_inference(form: str, images: np.ndarray) -> Callable[[], None]:
    """fastMRI's network applied to images (batch, height, width) float32."""
    values = flags.FLAGS
    unet, layout = peers.network(form, values.channels, values.levels)
    unet.eval()
    inputs = torch.from_numpy(images[:, None]).to(peers.device(), memory_format=layout)

    def run() -> None:
        with torch.inference_mode(), peers.autocast(values.precision):
            unet(inputs)
        peers.finish()

    return run


def latencies(predict: Callable[[dict[str, Any]], Any], mesh: jax.sharding.Mesh) -> tuple[Table, dict[str, Any]]:
    """One slice and one volume of k-space, from the host's memory and back to it."""
    values = flags.FLAGS
    rng = np.random.default_rng(0)
    shape = (values.slices, values.coils, values.size, values.size)
    kspace = (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)

    def reconstruct(kspace: np.ndarray, batch_size: int) -> list[np.ndarray]:
        padded = np.pad(kspace, [(0, -len(kspace) % batch_size), (0, 0), (0, 0), (0, 0)])
        results = [
            predict(jax.device_put(_batch("kspace", padded[i : i + batch_size]), sharding.by_example(mesh)))
            for i in range(0, len(padded), batch_size)
        ]
        return [np.asarray(images["reconstruction"]) for images, _ in results]

    one = -(-1 // mesh.size) * mesh.size
    many = -(-_BATCH // mesh.size) * mesh.size
    parts = {
        "one slice": lambda: reconstruct(kspace[:1], one),
        f"a volume of {values.slices} slices": lambda: reconstruct(kspace, many),
    }
    times = interleaved(parts, values.rounds)
    title = f"Latency from k-space, {values.coils} coils, {values.size}x{values.size}, {values.precision}"
    return Table(title, ["what", "ms: median (quartiles)"], [[n, spread(t, 1e3)] for n, t in times.items()]), times


def throughput(
    predict: Callable[[dict[str, Any]], Any], mesh: jax.sharding.Mesh, sizes: list[int]
) -> tuple[Table, dict[int, Any]]:
    """Images/s of each batch size, of mrjax and of every form of PyTorch."""
    values, rows, raw = flags.FLAGS, [], {}
    for batch_size in sizes:
        images = np.random.default_rng(0).random((batch_size, values.size, values.size), dtype=np.float32)
        batch = jax.device_put(_batch("input", images), sharding.by_example(mesh))
        forms = dict(peers.torch_forms(values.forms, functools.partial(torch_inference, images=images)))
        parts = {name: run for name, run in forms.items() if callable(run)}
        times = interleaved(parts | {"mrjax": functools.partial(predict, batch)}, values.rounds)
        speed = {name: batch_size / statistics.median(seconds) for name, seconds in times.items()}
        best = max(parts, key=speed.__getitem__, default=None)
        latency = spread(times["mrjax"], 1e3)
        theirs = [speed.get(name, forms[name]) for name in values.forms]
        rows.append([batch_size, latency, speed["mrjax"], *theirs, best and speed["mrjax"] / speed[best]])
        raw[batch_size] = times
    columns = ["batch", "mrjax, ms: median (quartiles)", "mrjax, images/s"]
    columns += [f"PyTorch {name}, images/s" for name in values.forms] + ["mrjax over the best PyTorch form"]
    title = f"Throughput by batch, {values.size}x{values.size}, {values.channels} channels, {values.precision}"
    return Table(title, columns, rows), raw


def _batch(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    number = np.arange(len(values), dtype=np.uint32)
    return {name: values, "name": np.zeros_like(number), "slice": number, "maximum": np.ones(len(values), np.float32)}


def main(argv: list[str]) -> None:
    """Times inference with a network of the size asked for, its parameters as they come."""
    cli.expect_no_arguments(argv)
    values = flags.FLAGS
    config = defaults()
    config.precision = values.precision
    config.model.channels, config.model.levels, config.model.pool = values.channels, values.levels, "avg"
    config.data.image_size = (values.size, values.size)
    sizes = [int(size) for size in values.batches]
    mesh = sharding.make_mesh()
    for config.batch_size in sizes:
        check(config)
    model, optimizer = experiment.model(config), experiment.optimizer(config)
    init = jax.jit(
        lambda: train_step.init_state(model, optimizer, config.data.image_size, 0).params,
        out_shardings=sharding.replicated(mesh),
    )
    compiled = train_step.compile_predict(mesh, model=model, task=as_measured, normalise_by=config.normalise)
    predict = functools.partial(compiled, init())
    latency, latency_times = latencies(predict, mesh)
    by_batch, batch_times = throughput(predict, mesh, sizes)
    names = ("size", "channels", "levels", "coils", "slices", "precision", "rounds")
    config_shown = {name: values[name].value for name in names}
    raw = {"latency": latency_times, "throughput": batch_times}
    publish("inference", config_shown, [latency, by_batch], raw, values.json)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch lives on the same GPU
    flags.DEFINE_integer("size", 256, "height and width of the images")
    flags.DEFINE_integer("channels", 32, "of the U-Net's first level")
    flags.DEFINE_integer("levels", 4, "of the U-Net")
    flags.DEFINE_integer("coils", 4, "of the k-space")
    flags.DEFINE_integer("slices", 18, "of the volume")
    flags.DEFINE_list("batches", ["1", "2", "4", "8"], "batch sizes of the throughput")
    flags.DEFINE_enum("precision", "float32", ["float32", "bfloat16"], "of the network's arithmetic")
    flags.DEFINE_multi_enum(
        "forms", list(peers.FORMS), list(peers.FORMS), "of PyTorch; --forms=eager --forms=compiled, and so on"
    )
    flags.DEFINE_integer("rounds", 5, "how often each is timed")
    flags.DEFINE_string("json", None, "file to write everything measured to")
    cli.run(main)
