"""Estimate the device memory that a training step needs, and advise where that is too much."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh
from jax.stages import Compiled
from ml_collections import ConfigDict

from mrjax.errors import UserError
from mrjax.parallel import processes, sharding


def needed_bytes(compiled: Compiled) -> int:
    """Return the bytes that a compiled function takes on each device while it runs; 0 where XLA does not say."""
    if (stats := compiled.memory_analysis()) is None:
        return 0
    parts = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return int(parts - stats.alias_size_in_bytes)


def available_bytes(mesh: Mesh) -> int | None:
    """Return the bytes that each device of this process has, None if unknown. CPU devices share the host's memory."""
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return available_memory() // len(mesh.local_devices)


def available_memory() -> int:
    """Return how many bytes this process can still allocate on the host, by the machine and its control groups.

    The processes of a run on one machine have equal shares.
    """
    return _free_memory() // processes.count_on_this_machine()


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    mine = next((line[3:] for line in groups if line.startswith("0::")), "/")
    for group in (folder := Path("/sys/fs/cgroup") / mine.lstrip("/"), *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # a group without a limit has no such file, or says 'max'
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(limit - used + int(kept["inactive_file"]) + int(kept["active_file"]))
    return min(found)


@contextlib.contextmanager
def explain_out_of_memory(make_error: Callable[[], UserError]) -> Iterator[None]:
    """Raise `make_error()` in place of XLA's error that no memory is left."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise make_error() from error


def largest_batch(compile_for: Callable[[int], Compiled], batch_size: int, unit: int, limit: int) -> int:
    """Return the largest multiple of `unit` below `batch_size` whose step needs at most `limit` bytes; 0 if none."""
    if batch_size <= unit:
        return 0
    large = max(2 * unit, batch_size // 2 // unit * unit)
    small_need, large_need = (needed_bytes(compile_for(size)) for size in (unit, large))
    # The need grows linearly: two compilations, which may take minutes, give the line, and a third confirms the answer.
    slope = max(large_need - small_need, 1) / (large - unit)
    size = min(int(unit + (limit - small_need) / slope) // unit * unit, batch_size - unit)
    while size > 0 and needed_bytes(compile_for(size)) > limit:
        size -= unit
    return max(size, 0)


def cache_error(config: ConfigDict, cached: int, step: int, found: str) -> UserError:
    """Make the error for caches of `cached` bytes on each device, too many beside the `step` bytes of a step.

    `found` says in words how many there are.
    """
    advice = ["config.data.cache = 'host' or 'none'"]
    if not config.data.cache_half and config.task != "paired":  # magnitudes are never halved
        advice.append("config.data.cache_half = True")
    advice.append("a smaller config.data.image_size")
    beside = f", beside {step / 1e9:.2f} GB for a step" if step else ""
    return UserError(
        f"config.data.cache is 'device', which takes {cached / 1e9:.2f} GB on each device{beside}, found "
        f"{found}; expected {', or '.join(advice)}"
    )


def out_of_memory_error(
    config: ConfigDict, mesh: Mesh, compile_for: Callable[[int], Compiled], limit: int | None, need: int | None = None
) -> UserError:
    """Make the error for a step that needs more than `limit` bytes on each device, `need`: it names fields that help.

    The largest batch that fits is found by compiling, which fails where no memory is left: then none is named.
    """
    unit = sharding.example_shards(mesh) * config.grad_accumulation_steps
    fits, advice = config.batch_size, ["a smaller config.batch_size"]
    if limit:
        with contextlib.suppress(Exception):
            fits = largest_batch(compile_for, config.batch_size, unit, limit)
            largest = f"config.batch_size = {fits}, the largest that fits"
            advice = [largest if fits else "smaller images or a narrower network"]
    factors = (n for n in range(2, config.batch_size + 1) if config.batch_size % (n * unit) == 0)
    if factor := next((n for n in factors if config.batch_size // n <= fits), None):
        advice.append(f"config.grad_accumulation_steps = {config.grad_accumulation_steps * factor}")
    if config.data.cache == "device":
        advice.append("config.data.cache = 'host' or 'none'")
    if not config.remat:
        advice.append("config.remat = True")
    if config.precision != "bfloat16":
        advice.append("config.precision = 'bfloat16'")
    if mesh.size > 1 and mesh.shape["model"] == 1:
        advice.append("a larger second number of config.mesh, which splits the parameters")
    amount = f"{need / 1e9:.2f} GB" if need else "more memory than there is"
    expected = f", expected at most {limit / 1e9:.2f} GB" if limit else ""
    return UserError(
        f"config.batch_size is {config.batch_size}, for which a step needs {amount} on each device{expected}; set "
        f"{', or '.join(advice)}"
    )
