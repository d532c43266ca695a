"""What every benchmark shares: rounds that take turns, the machine it ran on, tables on the screen and as JSON."""

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

from mrjax.checkpoint import write_json


class Table(NamedTuple):
    """Rows of text and numbers under a title; numbers are printed to three digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def interleaved(parts: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each part, round by round, so that a drift of the machine's speed meets all of them alike.

    A part's time ends when the arrays that it returns are there.
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
    """The median and, in brackets, the first and third quartile."""
    low, high = np.percentile(values, [25, 75])
    return f"{_text(scale * statistics.median(values))} ({_text(scale * low)} to {_text(scale * high)})"


def environment() -> dict[str, Any]:
    """The device, the processor and the versions that a figure belongs to."""
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


def publish(name: str, config: dict[str, Any], tables: Sequence[Table], raw: Any, json_file: str | None) -> None:
    """Prints the tables under where and how they were measured, and writes all of it to `json_file` if one is given."""
    where = environment()
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    print(f"{name}: {where['device']} ({where['processor']}); {versions}")
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
    """A table as Markdown that also reads well on a screen."""
    rows = [list(map(_text, row)) for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *rows, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (table.columns, *rows)
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return f"**{table.title}**\n\n" + "\n".join(f"| {line} |" for line in lines)


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
