"""Time in turns, describe the machine, print tables, write them as JSON and as sections of benchmarks/README.md."""

import datetime
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mrjax.errors import UserError
from mrjax.io.files import replacing, write_json

PYTORCH_FORMS = ["eager", "channels_last", "compiled", "compiled, channels_last"]


class Table(NamedTuple):
    """Rows of text and numbers under a title; numbers are printed to three digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def require_packages(*names: str) -> None:
    """Raise a `UserError` unless packages are installed that benchmarks compare with."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"not installed: {', '.join(missing)}; `make bench-packages` installs what benchmarks compare with"
        )


def interleaved(parts: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Time all parts round by round, so that a drift of the machine's speed affects them alike.

    Returns:
      Seconds of each round by part, each up to when the arrays that the part returns are computed.
    """
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(warm_up + rounds):
        for name, run in parts.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Format the median and, in brackets, the first and third quartile."""
    low, high = np.percentile(values, [25, 75])
    return f"{_text(scale * statistics.median(values))} ({_text(scale * low)} to {_text(scale * high)})"


def environment() -> dict[str, Any]:
    """Return the device, the processor and the versions that a figure belongs to."""
    devices = jax.devices()
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "torch", "fastmri"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "processor": f"{os.cpu_count()} cores, {_processor()}",
        "versions": {"python": platform.python_version()} | versions,
    }


def format_environment(where: dict[str, Any]) -> str:
    """Format what `environment` returns in one line."""
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    return f"{where['device']} ({where['processor']}); {versions}"


def publish(name: str, config: dict[str, Any], tables: Sequence[Table], raw: Any, json_file: str | None) -> None:
    """Print the tables under where and how they were measured, and write all of it to `json_file` if given."""
    where = environment()
    print(f"{name}: {format_environment(where)}")
    print(", ".join(f"{field}={value}" for field, value in config.items()))
    for table in tables:
        print(f"\n{markdown(table)}")
    if json_file:
        shown = [
            {"title": t.title, "columns": list(t.columns), "rows": [[_text(x) for x in r] for r in t.rows]}
            for t in tables
        ]
        write_json(Path(json_file), {"name": name, **where, "config": config, "tables": shown, "raw": raw})


def markdown(table: Table) -> str:
    """Format a table as Markdown with aligned columns."""
    rows = [list(map(_text, row)) for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *rows, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (table.columns, *rows)
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return f"**{table.title}**\n\n" + "\n".join(f"| {line} |" for line in lines)


def page_section(name: str, flags: dict[str, Any], tables: Sequence[Table]) -> str:
    """Return a section of benchmarks/README.md: the command, where and when it ran, its tables."""
    command = " ".join([f"python -m benchmarks.{name}", *(f"--{flag}={value}" for flag, value in flags.items())])
    place = f"{format_environment(environment())}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d}\n"
    return "\n".join([f"## {name}\n\n    {command}\n", place, *(f"{markdown(table)}\n" for table in tables)])


def replace_section(page: Path, name: str, section: str) -> None:
    """Replace the section of this name in a page, or append it."""
    before, found, after = (page.read_text() if page.exists() else "").partition(f"## {name}\n")
    _, next_heading, rest = after.partition("\n## ") if found else ("", "", "")
    write_text(f"{before.rstrip()}\n\n{section.rstrip()}\n" + (f"\n## {rest}" if next_heading else ""), page)


def write_text(text: str, file: Path) -> None:
    """Write a temporary file beside `file`, then rename it, so that `file` is never half written."""
    with replacing(file) as part:
        part.write_text(text)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "not measured" if value is None else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
