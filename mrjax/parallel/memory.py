"""What a step needs of a device's memory, and what to do when that is too much."""

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


def needed(compiled: Compiled) -> int:
    """Bytes on each device while a compiled function runs, by XLA's account; 0 where it gives none."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    parts = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(parts - found.alias_size_in_bytes)


def available(mesh: Mesh) -> int | None:
    """Bytes that each of this process's devices has; None where that is not known.

    Devices of a CPU share what the machine can still give.
    """
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
def answered(explain: Callable[[], UserError]) -> Iterator[None]:
    """Turns XLA's error that there is no memory left into what `explain` makes of it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise explain() from error


def largest_batch(compile_for: Callable[[int], Compiled], batch: int, unit: int, limit: int) -> int:
    """The largest multiple of `unit` below `batch` whose step fits; 0 if none does.

    What a step needs grows in a straight line with its batch, so two compilations tell where it ends, and a third one
    makes sure of it.

    Args:
      compile_for: compiles the step for a batch size.
      batch: one that does not fit.
      unit: what batch sizes are multiples of.
      limit: bytes.
    """
    if batch <= unit:
        return 0
    small, large = unit, max(2 * unit, batch // 2 // unit * unit)
    at_small, at_large = (needed(compile_for(size)) for size in (small, large))
    slope = max(at_large - at_small, 1) / (large - small)
    guess = min(int(small + (limit - at_small) / slope) // unit * unit, batch - unit)
    while guess > 0 and needed(compile_for(guess)) > limit:
        guess -= unit
    return max(guess, 0)


def explain(
    config: ConfigDict, mesh: Mesh, compile_for: Callable[[int], Compiled], need: int | None = None
) -> UserError:
    """The answer to a step that is too large: by how much, the largest batch that would fit, the fields to turn."""
    limit = available(mesh) or 0
    unit = sharding.example_shards(mesh) * config.accumulate
    fits = largest_batch(compile_for, config.batch_size, unit, limit)
    advice = [f"config.batch_size = {fits}, the largest that fits" if fits else "smaller images or a narrower network"]
    turns = (n for n in range(2, config.batch_size + 1) if config.batch_size % (n * unit) == 0)
    turn = next((n for n in turns if config.batch_size // n <= fits), None)
    if turn:
        advice.append(f"config.accumulate = {config.accumulate * turn}")
    if not config.remat:
        advice.append("config.remat = True")
    if config.precision == "float32":
        advice.append("config.precision = 'bfloat16'")
    if mesh.size > 1 and mesh.shape["model"] == 1:
        advice.append("a larger second number of config.mesh, which splits the parameters")
    amount = f"{need / 1e9:.2f} GB" if need else "more memory than there is"
    return UserError(
        f"config.batch_size is {config.batch_size}, for which a step needs {amount} on each device, expected at most "
        f"{limit / 1e9:.2f} GB; set {', or '.join(advice)}"
    )
