"""Say whether a training step fits an accelerator that this machine need not have, and estimate its speed there.

    python -m benchmarks.fit --config=configs/unet.py --config.precision=bfloat16 --target=h100 --batch=16

Compiles the real step ahead of time for a GPU or a TPU slice and reports memory, traffic, collectives and the
instructions that move most bytes. Targets: h100, h100:2x8 (two hosts of eight), a100, v5e:4x4, v5p:2x2x1, v6e:4x4 and
slices of other shapes. Needs the extra `aot` (`make aot-packages`) and no accelerator; takes seconds for a GPU, a
minute or two for a TPU.

Traffic on a GPU is the operands and results of every executed instruction, loops included, counted from the optimised
HLO; on a TPU it is XLA's cost analysis. Speed is an ESTIMATE: the slowest of arithmetic, memory and links, each at the
device's published peak.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks import hlo, programs
from benchmarks.report import Table, publish
from mrjax import cli, experiment
from mrjax import config as configs
from mrjax.errors import UserError
from mrjax.parallel import memory, sharding

GB = 1e9


class Device(NamedTuple):
    """Published properties of a device.

    Attributes:
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      peak: FLOP/s by precision under the compiler's defaults (float32 convolutions in TF32, on a TPU in bfloat16).
      link: bytes/s to other devices, each way: within a host, and between hosts.
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
    # Google Cloud's pages on TPU versions; all links of a chip together.
    "v5e": Device(16 << 30, 819e9, {"bfloat16": 197e12, "float32": 197e12}, (200e9, 200e9)),
    "v5p": Device(95 << 30, 2.765e12, {"bfloat16": 459e12, "float32": 459e12}, (600e9, 600e9)),
    "v6e": Device(32 << 30, 1.64e12, {"bfloat16": 918e12, "float32": 918e12}, (448e9, 448e9)),
}
EXTRA = {"gpu": "jax_cuda12_plugin", "tpu": "libtpu"}


class Target(NamedTuple):
    """A kind of device and its topology: (hosts, GPUs per host), or the sides of a TPU slice."""

    name: str
    shape: tuple[int, ...]

    @property
    def device(self) -> Device:
        """Published properties of each device."""
        return DEVICES[self.name]

    @property
    def kind(self) -> str:
        """'gpu' or 'tpu'."""
        return "gpu" if self.device.proto else "tpu"


def parse_target(text: str) -> Target:
    """Parse `h100`, `h100:2x8`, `v5e:4x4` or `v5p:2x2x1`; a `UserError` lists the known targets."""
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
    """Describe the target's devices without having any of them.

    Raises:
      UserError: its compiler is not installed, or knows no such slice.
    """
    if importlib.util.find_spec(EXTRA[target.kind]) is None:
        raise UserError(
            f"--target={target.name} needs the package {EXTRA[target.kind]}, which is not installed: "
            "make aot-packages, or pip install 'mrjax[aot]'"
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
    """Return the mesh of config.mesh, and the checked config with `batch` images for each device."""
    config = config.copy_and_resolve_references()
    config.data.image_size = tuple(config.data.image_size) or (256, 256)
    if batch:
        # Divisible by every mesh, until it is known over how many devices the examples are split.
        config.batch_size = batch * len(devices) * config.grad_accumulation_steps
        data, model, _ = experiment.mesh_shape(config, len(devices))
        config.batch_size = batch * data * model
    configs.check(config)
    mesh = sharding.make_mesh(experiment.mesh_shape(config, len(devices)), devices)
    experiment.check_sizes(config, [], mesh.shape["spatial"])
    return mesh, config


def bytes_per_device(tree: Any) -> int:
    """Count the bytes on each device of a tree of arrays or of their shapes and shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(config: ConfigDict, mesh: Mesh, batch: dict[str, Any], target: Target) -> tuple[Any, int]:
    """Return the compiled training step, and its FLOPs over all devices; a `UserError` if it cannot fit."""
    # Without a device there is nothing to autotune on.
    options = {"xla_gpu_autotune_level": 0} if target.kind == "gpu" else {}
    try:
        return programs.compile_train_step(config, mesh, batch, options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
        need = f"needs {used.group(1)} of {used.group(2)} of memory" if used else "needs more than its memory"
        raise UserError(
            f"--target={target.name} is too small: the step {need} on each device; {advice(config, mesh)}"
        ) from error


def advice(config: ConfigDict, mesh: Mesh, largest_batch: int = 0) -> str:
    """List the changes that would make a step smaller."""
    changes = [f"--batch={largest_batch}, about the largest that fits" if largest_batch else "a smaller --batch"]
    changes += ["config.precision=bfloat16"] * (config.precision == "float32")
    changes += [f"config.grad_accumulation_steps={2 * config.grad_accumulation_steps}"]
    changes += ["config.remat=True"] * (not config.remat)
    changes += ["a model axis in config.mesh, which splits the parameters"] * (mesh.size > 1 == mesh.shape["model"])
    return "change one of: " + ", ".join(changes)


def verdict(need: int, limit: int, fixed: int, batch: int, config: ConfigDict, mesh: Mesh) -> str:
    """Say whether a step fits.

    Args:
      need: bytes on each device.
      limit: bytes that a device has.
      fixed: bytes that do not grow with the batch: the state and its gradients.
      batch: images on each device.
      config: of the step.
      mesh: of the step.
    """
    amounts = f"{need / GB:.2f} GB of {limit / GB:.1f} GB on each device"
    largest_batch = int(max(limit - fixed, 0) / max((need - fixed) / batch, 1))
    if need <= limit:
        return f"fits: {amounts}; about {largest_batch} images a device would"
    return f"does not fit: {amounts}, {(need - limit) / GB:.2f} GB too much; {advice(config, mesh, largest_batch)}"


class Analysis(NamedTuple):
    """What a compiled step takes; bytes and seconds are of one step on each device.

    Attributes:
      state, gradients, batch, temporary, needed: bytes of memory.
      flops_per_image: of convolutions and matrix products.
      traffic: bytes read and written.
      traffic_source: how the traffic was counted.
      main_memory_traffic: bytes read from and written to main memory, as laid out there.
      collectives: (count, bytes) by kind.
      seconds: estimated time of arithmetic, memory and links at the published peaks.
      instructions: all executed instructions.
    """

    state: int
    gradients: int
    batch: int
    temporary: int
    needed: int
    flops_per_image: float
    traffic: float
    traffic_source: str
    main_memory_traffic: int
    collectives: dict[str, tuple[int, int]]
    seconds: dict[str, float]
    instructions: list[hlo.Instruction]

    @property
    def slowest(self) -> str:
        """Which of arithmetic, memory and links limits the speed."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def analyse(config: ConfigDict, mesh: Mesh, target: Target, coils: int) -> Analysis:
    """Compile the training step for the target and read off what it takes."""
    batch, state = programs.abstract_batch(config, mesh, coils), programs.abstract_state(config, mesh)
    compiled, flops = compile_step(config, mesh, batch, target)
    device, instructions = target.device, list(hlo.instructions(compiled.as_text()))
    by_xla = (compiled.cost_analysis() or {}).get("bytes accessed")
    traffic = by_xla or sum(instruction.moved for instruction in instructions)
    collectives = hlo.collectives(instructions)
    # On a ring of devices, an all-reduce sends everything twice.
    sent = sum(size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in collectives.items())
    return Analysis(
        state=bytes_per_device(state),
        gradients=bytes_per_device(state.params),
        batch=bytes_per_device(batch),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        needed=memory.needed_bytes(compiled),
        flops_per_image=flops / config.batch_size,
        traffic=traffic,
        traffic_source="XLA's account" if by_xla else "operands + results",
        main_memory_traffic=sum(instruction.stored * instruction.times for instruction in instructions),
        collectives=collectives,
        seconds={
            "arithmetic": flops / mesh.size / device.peak[config.precision.removesuffix("_exact")],
            "memory": traffic / device.bandwidth,
            "links": sent / device.link[target.kind == "gpu" and target.shape[0] > 1],
        },
        instructions=instructions,
    )


def make_tables(found: Analysis, device: Device, images: float, speed: float) -> list[Table]:
    """Return the tables of memory, work and the instructions that move most; `images` are those on each device."""
    memory_rows = [
        ("state: parameters and optimizer", found.state / GB),
        ("batch", found.batch / GB),
        ("temporary", found.temporary / GB),
        ("in all", found.needed / GB),
        ("the device has", device.memory / GB),
    ]
    collectives = found.collectives.items()
    work_rows = [
        (f"traffic an image ({found.traffic_source}), GB", found.traffic / images / GB),
        ("of main memory alone, by layouts, GB", found.main_memory_traffic / images / GB),
        ("convolutions and matrix products an image, GFLOP", found.flops_per_image / GB),
        *((f"{kind} a step on each device: {count}, MB", size / 1e6) for kind, (count, size) in collectives),
        *((f"estimated time of {name}, ms", 1e3 * seconds) for name, seconds in found.seconds.items()),
        (f"ESTIMATE at the published peaks, held by {found.slowest}: images/s", speed),
    ]
    movers = sorted(found.instructions, key=lambda instruction: instruction.moved, reverse=True)[:10]
    return [
        Table("Memory on each device", ("what", "GB"), memory_rows),
        Table("Work", ("what", "amount"), work_rows),
        Table(
            "The ten instructions that move most (operands + results, without padding)",
            ("MB an image", "times", "instruction", "result", "from"),
            [(m.moved / images / 1e6, m.times, m.opcode, _short(m.shape), _short(m.source, 60)) for m in movers],
        ),
    ]


def main(_: list[str]) -> None:
    """Compile for the target and publish the analysis."""
    values = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # ignore accelerators of this machine
    jax.config.update("jax_enable_compilation_cache", False)  # cached programs cannot be loaded without the device
    target = parse_target(values.target)
    mesh, config = mesh_and_config(values.config, topology_of(target).devices, values.batch)
    found = analyse(config, mesh, target, values.coils)
    images, device = config.batch_size / mesh.size, target.device
    speed = config.batch_size / found.seconds[found.slowest]
    conclusion = verdict(found.needed, device.memory, found.state + found.gradients, int(images), config, mesh)
    tables = [*make_tables(found, device, images, speed)]
    tables.append(Table("Verdict", ("target", "verdict"), [(values.target, conclusion)]))
    raw = {
        "memory": {
            "state": found.state,
            "batch": found.batch,
            "temporary": found.temporary,
            "needed": found.needed,
        },
        "traffic_per_image": found.traffic / images,
        "main_memory_per_image": found.main_memory_traffic / images,
        "flops_per_image": found.flops_per_image,
        "gradients": found.gradients,
        "collectives": {kind: {"count": count, "bytes": size} for kind, (count, size) in found.collectives.items()},
        "estimated_seconds": found.seconds,
        "estimated_images_per_second": speed,
        "verdict": conclusion,
    }
    shown = {"target": values.target, "mesh": dict(mesh.shape), "images_on_each_device": images}
    shown |= {name: value for name, value in configs.flat(config).items() if name in SHOWN}
    publish("fit (compiled ahead of time)", shown, tables, raw, values.json)


SHOWN = ["task", "precision", "grad_accumulation_steps", "remat"]
SHOWN += ["model.name", "model.channels", "model.levels", "data.image_size"]


def _short(text: str, length: int = 40) -> str:
    """Shorten a path to its end, a shape to its beginning."""
    text = text.removeprefix("jit(train_step)/").replace("|", "/")
    if len(text) <= length:
        return text
    return f"{text[:length]}..." if text.startswith("(") else f"...{text[-length:]}"


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "file of the experiment, e.g. configs/unet.py")
    flags.DEFINE_string("target", None, "h100, h100:2x8, a100, v5e:4x4, v5p:2x2x1, v6e:4x4, ...", required=True)
    flags.DEFINE_integer(
        "batch", None, "images on each device; by default config.batch_size over all devices", lower_bound=1
    )
    flags.DEFINE_integer("coils", 4, "coils of each slice, for the task 'kspace'", lower_bound=1)
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main, configs.check_flags)
