"""Whether a training step fits an accelerator that this machine need not have, and what it would do there.

    python -m benchmarks.fit --config=configs/unet.py --config.precision=bfloat16 --target=h100 --batch=16

Compiles the real step ahead of time for a GPU or a slice of TPUs and reads off memory, traffic, collectives and the
instructions that move most. Targets: h100, h100:2x8 (two hosts of eight), a100, v5e:4x4, v5p:2x2x1, v6e:4x4 and
slices of other sizes. Needs the extra `aot` and no accelerator; a TPU takes a minute or two, a GPU seconds.

Traffic on a GPU is the operands and results of every instruction that runs, loops included, counted from the optimised
program; on a TPU it is XLA's own account. Speed is an ESTIMATE: the slowest of arithmetic, memory and links, each at
the device's published peak.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks import hlo, report
from mrjax import cli, experiment, train_step
from mrjax import config as configs
from mrjax.data import splits
from mrjax.errors import UserError
from mrjax.parallel import memory, sharding

GB = 1e9


class Device(NamedTuple):
    """What is published of a device.

    Attributes:
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      peak: FLOP/s by precision, as the compiler's default has it (float32 convolutions in TF32, on a TPU in bfloat16).
      link: bytes/s to other devices, each way; between hosts for GPUs of several.
      proto: XLA's description of a GPU; empty for a TPU.
    """

    memory: int
    bandwidth: float
    peak: dict[str, float]
    link: tuple[float, float]
    proto: str = ""


def _gpu(name: str, memory: int, bandwidth: int, cores: int, clock: float, cache: int, shared: int, major: int) -> str:
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores}
      fpus_per_core: {128 if major == 9 else 64} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
      device_memory_size: {memory} shared_memory_per_block_optin: {shared - 1024}
      cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 12 minor: 8 }}
    device_description_str: "{name}" """


DEVICES = {
    # NVIDIA H100 SXM and A100 SXM 80 GB data sheets, without sparsity; NVLink, and one 400 or 200 Gbit/s port a GPU.
    "h100": Device(
        *(84_929_347_584, 3.35e12, {"bfloat16": 989e12, "float32": 495e12}, (450e9, 50e9)),
        _gpu("NVIDIA H100 80GB HBM3", 84_929_347_584, 3_352_320_000_000, 132, 1.98, 52_428_800, 233_472, 9),
    ),
    "a100": Device(
        *(85_094_825_984, 2.04e12, {"bfloat16": 312e12, "float32": 156e12}, (300e9, 25e9)),
        _gpu("NVIDIA A100-SXM4-80GB", 85_094_825_984, 2_039_000_000_000, 108, 1.41, 41_943_040, 167_936, 8),
    ),
    # Google Cloud's pages on TPU versions; links of a chip together.
    "v5e": Device(16 << 30, 819e9, {"bfloat16": 197e12, "float32": 197e12}, (200e9, 200e9)),
    "v5p": Device(95 << 30, 2.765e12, {"bfloat16": 459e12, "float32": 459e12}, (600e9, 600e9)),
    "v6e": Device(32 << 30, 1.64e12, {"bfloat16": 918e12, "float32": 918e12}, (448e9, 448e9)),
}
EXTRA = {"gpu": "jax_cuda12_plugin", "tpu": "libtpu"}


class Target(NamedTuple):
    """A device and how many: hosts by GPUs of each, or the sides of a slice of TPUs."""

    name: str
    shape: tuple[int, ...]

    @property
    def device(self) -> Device:
        """What is known of each of them."""
        return DEVICES[self.name]

    @property
    def kind(self) -> str:
        """'gpu' or 'tpu'."""
        return "gpu" if self.device.proto else "tpu"


def parse_target(text: str) -> Target:
    """`h100`, `h100:2x8`, `v5e:4x4`, `v5p:2x2x1`; a `UserError` lists what is known."""
    found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*))?", text)
    name = found.group(1) if found else ""
    shape = tuple(map(int, found.group(2).split("x"))) if found and found.group(2) else ()
    if name in DEVICES and all(shape):
        sides = {"h100": (0, 2), "a100": (0, 2), "v5p": (3,)}.get(name, (2,))
        if len(shape) in sides:
            return Target(name, shape or (1, 1))
    raise UserError(
        f"--target is {text!r}, expected h100 or a100, alone or with hosts and GPUs of each as in h100:2x8, "
        "or a slice of TPUs as in v5e:4x4, v6e:4x4 or v5p:2x2x1"
    )


def topology_of(target: Target) -> Any:
    """The target's devices, described without any of them being there.

    Raises:
      UserError: its compiler is not installed, or knows no such slice.
    """
    if importlib.util.find_spec(EXTRA[target.kind]) is None:
        raise UserError(
            f"--target={target.name} needs the package {EXTRA[target.kind]}, which is not installed: "
            "pip install 'mrjax[aot]'"
        )
    sides = "x".join(map(str, target.shape))
    try:
        if target.kind == "gpu":
            proto = target.device.proto
            return topologies.get_topology_desc(target.name, "cuda", target_config=proto, topology=f"1x{sides}")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{target.name}:{sides}")
    except Exception as error:  # what a plugin raises differs from one to the next
        raise UserError(f"--target={target.name}:{sides} cannot be described: {error}") from error


def mesh_and_config(config: ConfigDict, devices: list[Any], batch: int | None) -> tuple[Mesh, ConfigDict]:
    """config.mesh over the devices, and the config with `batch` images for each of them, checked."""
    config = config.copy_and_resolve_references()
    config.data.image_size = tuple(config.data.image_size) or (256, 256)
    if batch:
        # A batch that any mesh divides, until it is known over how many devices the examples are split.
        config.batch_size = batch * len(devices) * config.accumulate
        data, model, _ = configs.mesh_shape(config, len(devices))
        config.batch_size = batch * data * model
    configs.check(config)
    mesh = sharding.make_mesh(configs.mesh_shape(config, len(devices)), devices)
    configs.check_image_size(config, mesh.shape["spatial"])
    return mesh, config


def abstract_batch(config: ConfigDict, mesh: Mesh, coils: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch of config.task, split by example."""
    size, split = tuple(config.data.image_size), sharding.by_example(mesh)
    several = (1 + 2 * config.data.neighbours,) if config.data.neighbours else ()
    images: dict[str, Any] = {"kspace": ((*several, coils, *size), jnp.complex64)}
    if config.task == "paired":
        images = {"input": ((*several, *size), jnp.float32), "target": (size, jnp.float32)}
    elif config.task in splits.REPEATED:
        images["repetitions"] = ((2, coils, *size), jnp.complex64)  # as M4Raw's T1 and T2 have them
    shapes = images | {"index": ((), jnp.uint32), "maximum": ((), jnp.float32)}
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=split)
        for name, (shape, dtype) in shapes.items()
    }


def bytes_of(tree: Any) -> int:
    """Bytes on each device of arrays that are described with their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def flops(jaxpr: Any) -> int:
    """Floating-point operations of the convolutions and matrix products of a program, over its devices and loops."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * inner
        elif name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[out]
        elif name == "ffi_call" and params["target_name"].startswith("mrjax_"):
            kernel = (equation.outvars if params["target_name"] == "mrjax_filter_gradient" else equation.invars[1:])[0]
            total += 2 * math.prod(equation.invars[0].aval.shape[:3]) * kernel.aval.size
        inside = [flops(getattr(inner, "jaxpr", inner)) for inner in jaxprs_in_params(params)]
        times = params["mesh"].size if name == "shard_map" else params.get("length", 1)
        total += max(inside, default=0) if name == "cond" else sum(inside) * times
    return total


def compile_step(config: ConfigDict, mesh: Mesh, batch: dict[str, Any], target: Target) -> tuple[Any, int]:
    """The training step compiled for the mesh, and its FLOPs over all devices; a `UserError` if it cannot fit."""
    fixed = {"model": experiment.model(config, mesh), "task": experiment.task(config), "normalise_by": config.normalise}
    fixed |= {"optimizer": experiment.optimizer(config), "seed": config.seed, "accumulate": config.accumulate}
    traced = train_step.compile_train(mesh, **fixed).trace(
        experiment.abstract_state(experiment.initial_state(config), mesh), batch
    )
    # There is no device to try algorithms on.
    options = {"xla_gpu_autotune_level": 0} if target.kind == "gpu" else {}
    try:
        return traced.lower().compile(compiler_options=options), flops(traced.jaxpr.jaxpr)
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found_text = f"needs {found.group(1)} of {found.group(2)} of memory" if found else "needs more than its memory"
        raise UserError(
            f"--target={target.name} is too small: the step {found_text} on each device; {advice(config, mesh)}"
        ) from error


def advice(config: ConfigDict, mesh: Mesh, fits: int = 0) -> str:
    """What would make a step smaller, in one phrase."""
    turns = [f"--batch={fits}, about the largest that fits" if fits else "a smaller --batch"]
    turns += ["config.precision=bfloat16"] * (config.precision == "float32")
    turns += [f"config.accumulate={2 * config.accumulate}"]
    turns += ["config.remat=True"] * (not config.remat)
    turns += ["a model axis in config.mesh, which splits the parameters"] * (mesh.size > 1 == mesh.shape["model"])
    return "change one of: " + ", ".join(turns)


def verdict(need: int, limit: int, fixed: int, batch: int, config: ConfigDict, mesh: Mesh) -> str:
    """Fits, or by how much not; what grows with the batch is what is not the state and its gradients."""
    amounts = f"{need / GB:.2f} GB of {limit / GB:.1f} GB on each device"
    fits = int(max(limit - fixed, 0) / max((need - fixed) / batch, 1))
    if need <= limit:
        return f"fits: {amounts}; about {fits} images a device would"
    return f"does not fit: {amounts}, {(need - limit) / GB:.2f} GB too much; {advice(config, mesh, fits)}"


def main(argv: list[str]) -> None:
    """Compiles for the target and publishes what was found."""
    cli.expect_no_arguments(argv)
    values = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # what there is of accelerators here is not looked at
    jax.config.update("jax_enable_compilation_cache", False)  # without the device, what was kept cannot be loaded
    target = parse_target(values.target)
    mesh, config = mesh_and_config(values.config, topology_of(target).devices, values.batch)
    batch = abstract_batch(config, mesh, values.coils)
    state = experiment.abstract_state(experiment.initial_state(config), mesh)
    compiled, operations = compile_step(config, mesh, batch, target)

    device, images = target.device, config.batch_size / mesh.size
    found = list(hlo.instructions(compiled.as_text()))
    cost = compiled.cost_analysis() or {}
    traffic = cost.get("bytes accessed") or sum(one.moved for one in found)
    in_main_memory = sum(one.stored * one.times for one in found)
    sent = hlo.collectives(found)
    needs, parts = memory.needed(compiled), compiled.memory_analysis()
    peak, link = device.peak[config.precision], device.link[target.kind == "gpu" and target.shape[0] > 1]
    # Around a ring of devices, an all-reduce sends everything twice.
    on_links = sum(size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in sent.items())
    times = {
        "arithmetic": operations / mesh.size / peak,
        "memory": traffic / device.bandwidth,
        "links": on_links / link,
    }
    slowest = max(times, key=lambda name: times[name])
    speed = config.batch_size / times[slowest]
    of_state, of_batch = bytes_of(state), bytes_of(batch)
    conclusion = verdict(needs, device.memory, of_state + bytes_of(state.params), int(images), config, mesh)

    by_opcode = "XLA's account" if cost.get("bytes accessed") else "operands + results"
    memory_table = report.Table(
        "Memory on each device",
        ("what", "GB"),
        [
            ("state: parameters and optimizer", of_state / GB),
            ("batch", of_batch / GB),
            ("temporary", parts.temp_size_in_bytes / GB),
            ("in all", needs / GB),
            ("the device has", device.memory / GB),
        ],
    )
    work_table = report.Table(
        "Work",
        ("what", "amount"),
        [
            (f"traffic an image ({by_opcode}), GB", traffic / images / GB),
            ("of main memory alone, by layouts, GB", in_main_memory / images / GB),
            ("convolutions and matrix products an image, GFLOP", operations / config.batch_size / GB),
            *((f"{kind} a step on each device: {count}, MB", size / 1e6) for kind, (count, size) in sent.items()),
            *((f"estimated time of {name}, ms", 1e3 * seconds) for name, seconds in times.items()),
            (f"ESTIMATE at the published peaks, held by {slowest}: images/s", speed),
        ],
    )
    movers = sorted(found, key=lambda one: one.moved, reverse=True)[:10]
    mover_table = report.Table(
        "The ten instructions that move most (operands + results, without padding)",
        ("MB an image", "times", "instruction", "result", "from"),
        [(m.moved / images / 1e6, m.times, m.opcode, _short(m.shape), _short(m.source, 60)) for m in movers],
    )
    verdict_table = report.Table("Verdict", ("target", "verdict"), [(values.target, conclusion)])
    raw = {
        "memory": {"state": of_state, "batch": of_batch, "temporary": parts.temp_size_in_bytes, "needed": needs},
        "traffic_per_image": traffic / images,
        "main_memory_per_image": in_main_memory / images,
        "flops_per_image": operations / config.batch_size,
        "gradients": bytes_of(state.params),
        "collectives": {kind: {"count": count, "bytes": size} for kind, (count, size) in sent.items()},
        "estimated_seconds": times,
        "estimated_images_per_second": speed,
        "verdict": conclusion,
    }
    about = {"target": values.target, "mesh": dict(mesh.shape), "images_on_each_device": images}
    about |= {name: value for name, value in configs.flat(config) if name in SHOWN}
    tables = [memory_table, work_table, mover_table, verdict_table]
    report.publish("fit (compiled ahead of time)", about, tables, raw, values.json)


SHOWN = ("task", "precision", "accumulate", "remat", "model.name", "model.channels", "model.levels", "data.image_size")


def _short(text: str, length: int = 40) -> str:
    """The end of a path, the beginning of a shape."""
    text = text.removeprefix("jit(train_step)/").replace("|", "/")
    if len(text) <= length:
        return text
    return f"{text[:length]}..." if text.startswith("(") else f"...{text[-length:]}"


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "file of the experiment, e.g. configs/unet.py")
    flags.DEFINE_string("target", None, "h100, h100:2x8, a100, v5e:4x4, v5p:2x2x1, v6e:4x4, ...", required=True)
    flags.DEFINE_integer("batch", None, "images on each device; config.batch_size over all by default", lower_bound=1)
    flags.DEFINE_integer("coils", 4, "of each slice, for the task 'kspace'", lower_bound=1)
    flags.DEFINE_string("json", None, "file to write everything to")
    cli.run(main, configs.check_flags)
