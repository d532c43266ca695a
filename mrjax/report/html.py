"""The report of an evaluation or a reconstruction: metrics and images in one HTML file that needs nothing else."""

import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
from markupsafe import Markup
from matplotlib import colormaps

from mrjax.data import plausibility, splits
from mrjax.errors import printable
from mrjax.io.files import replacing
from mrjax.io.volume import Volume
from mrjax.measures import evaluator
from mrjax.measures.metrics import METRICS
from mrjax.report import figures, selection

GENERATOR = '<meta name="generator" content="mrjax">'
MAX_BYTES = 15_000_000
PAGE_BYTES, ROW_BYTES = 1_000_000, 1_500  # reserved for all but images, and for a volume's row of the table
PACKAGES = ("mrjax", "jax", "jaxlib", "flax", "numpy")


class Report:
    """Collects so many `volumes`, then is written; of their images it holds only what will be in the file."""

    def __init__(self, volumes: int) -> None:
        self.rows: list[evaluator.Row] = []
        self._volumes: list[Volume] = []
        self._selection = selection.Selection(volumes, MAX_BYTES - PAGE_BYTES - ROW_BYTES * volumes)

    def add(self, volume: Volume, images: evaluator.Images, scores: Mapping[str, Any]) -> None:
        """Add a volume with its images, as `Inference.reconstruct` returns them, and its `evaluator.score_volume`."""
        notes = ["simulated"] if volume.simulated else []
        if volume.undersampled and volume.full_slices:
            notes.append(f"measured undersampled, {plausibility.acceleration(volume):.1f}x")
        row = evaluator.describe(volume) | {"volume": printable(volume.name), "note": ", ".join(notes)} | dict(scores)
        self.rows.append(row)
        self._volumes.append(dataclasses.replace(volume, stored_mask=None))
        self._selection.add(row, volume, images)

    def write(
        self,
        path: Path,
        title: str,
        labels: Sequence[str],
        facts: Mapping[str, str],
        config: Mapping[str, tuple[Any, Any]],
        curves: Sequence[Mapping[str, float]],
    ) -> None:
        """Write the report, complete or not at all.

        `labels` are those of input and reconstruction, `facts` say what was done, `config` has value and default of
        each field, and `curves` are the rows of a run's metrics.jsonl.
        """
        scored = [row for row in self.rows if "reconstruction" in row]
        places = {id(one.row): place for place, one in enumerate(self._selection.shown)}
        environment = jinja2.Environment(loader=jinja2.PackageLoader("mrjax.report"), autoescape=True)
        environment.policies["json.dumps_kwargs"] = {}  # not sorted: the order of images is that of their labels
        environment.filters |= {"svg": Markup}  # drawn by matplotlib, which escapes
        page = environment.get_template("report.html").render(
            generator=Markup(GENERATOR),
            title=title,
            labels=dict(zip(evaluator.METHODS, labels, strict=True)),
            colours=figures.METHOD_COLOURS,
            metrics=METRICS,
            rows=[(row, places.get(id(row))) for row in self.rows],
            notes=any(row["note"] for row in self.rows),
            scored=scored,
            slices=sum(row["slices"] for row in self.rows),
            summary=evaluator.summarise(scored) if scored else {},
            boxes={name: figures.box_plot_svg(scored, name) for name in METRICS} if scored else {},
            curves=dict(zip(figures.CURVES.values(), figures.curve_svgs(curves), strict=True)) if curves else {},
            shown=self._selection.shown,
            extremes=dict(zip(("worst", "best"), self._selection.extremes(), strict=True)),
            left_out=self._describe_left_out(),
            facts={**facts, "files": splits.fingerprint(self._volumes), **_describe_environment()},
            config=config,
            viewer=self._viewer(),
        )
        with replacing(path) as part:
            part.write_text(page, encoding="utf-8", errors="backslashreplace")  # a path may hold any bytes

    def _viewer(self) -> dict[str, Any]:
        """Return what the viewer's script reads, as JSON."""
        labels = figures.COLUMNS | {"error": "absolute error"}
        volumes = [
            {
                "name": shown.row["volume"],
                "contrast": shown.row["contrast"],
                "note": shown.row["note"],
                "total": shown.total,
                "white": f"{shown.white:.3g}",
                "gain": shown.gain,
                "slices": [
                    {"number": number, "scores": of.scores, "images": of.images} for number, of in shown.slices.items()
                ],
            }
            for shown in self._selection.shown
        ]
        maps = {name: (colormaps[name](range(256))[:, :3] * 255).round().astype(int) for name in ("gray", "inferno")}
        return {
            "headroom": selection.HEADROOM,
            "notFinite": selection.NOT_FINITE,
            "colours": {name: colours.tolist() for name, colours in maps.items()},
            "labels": labels,
            "volumes": volumes,
        }

    def _describe_left_out(self) -> str:
        """Say which images are not in the report, or not at full size."""
        shown = self._selection.shown
        slices, total = sum(len(one.slices) for one in shown), sum(volume.slices for volume in self._volumes)
        sentences = []
        if slices < total:
            sentences.append(
                f"{slices} of {total} slices, of {len(shown)} of {len(self._volumes)} volumes, are shown: as many as "
                f"fit into a file of {MAX_BYTES / 1e6:g} MB. Volumes near the median SSIM are left out first, the "
                "worst and the best slices never. The metrics are of all slices."
            )
        if any(max(volume.image_shape) > selection.LONGEST_SIDE for volume in self._volumes):
            sentences.append(f"Images of more than {selection.LONGEST_SIDE} pixels a side are shown reduced.")
        return " ".join(sentences)


def is_report(path: Path) -> bool:
    """Tell whether a file is a report, which another may replace."""
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(512)


def _describe_environment() -> dict[str, str]:
    versions = [f"Python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)]
    devices = jax.devices()
    return {
        "versions": ", ".join(versions),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }
