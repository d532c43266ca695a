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
from mrjax.parallel import sharding


def needed_bytes(compiled: Compiled) -> int:
    """Return the bytes that a compiled function takes on each device while it runs; 0 where XLA does not say."""
    if (stats := compiled.memory_analysis()) is None:
        return 0
    parts = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return int(parts - stats.alias_size_in_bytes)


def available_bytes(mesh: Mesh) -> int | None:
    """Return the bytes that each device of this process has, None if unknown. CPU devices share the free memory."""
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return available_memory() // len(mesh.local_devices)


def available_memory() -> int:
    """Return how many bytes this process can still allocate on the host, by the machine and its control groups."""
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


def out_of_memory_error(
    config: ConfigDict, mesh: Mesh, compile_for: Callable[[int], Compiled], need: int | None = None
) -> UserError:
    """Make the error for a step that needs `need` bytes, too many: it names the limit and the fields that help."""
    limit = available_bytes(mesh) or 0
    unit = sharding.example_shards(mesh) * config.grad_accumulation_steps
    fits = largest_batch(compile_for, config.batch_size, unit, limit)
    advice = [f"config.batch_size = {fits}, the largest that fits" if fits else "smaller images or a narrower network"]
    factors = (n for n in range(2, config.batch_size + 1) if config.batch_size % (n * unit) == 0)
    if factor := next((n for n in factors if config.batch_size // n <= fits), None):
        advice.append(f"config.grad_accumulation_steps = {config.grad_accumulation_steps * factor}")
    if not config.remat:
        advice.append("config.remat = True")
    if config.precision != "bfloat16":
        advice.append("config.precision = 'bfloat16'")
    if mesh.size > 1 and mesh.shape["model"] == 1:
        advice.append("a larger second number of config.mesh, which splits the parameters")
    amount = f"{need / 1e9:.2f} GB" if need else "more memory than there is"
    return UserError(
        f"config.batch_size is {config.batch_size}, for which a step needs {amount} on each device, expected at most "
        f"{limit / 1e9:.2f} GB; set {', or '.join(advice)}"
    )
