"""Figures: corrupted | reconstruction | ground truth | error panels, and learning curves.

Only matplotlib's object-oriented interface and its Agg canvas are used: no display, no global state.
"""

import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# A reading room is dark, so images lie on near-black, and text does not glare.
BACKGROUND, TEXT, FAINT = "#0b0c0e", "#e3e6ea", "#9aa1ab"
GREYS, ERROR_COLOURS = (colormaps[name].with_extremes(bad="magenta") for name in ("gray", "inferno"))
INK, LINE = "#30343a", "#2f6db3"
ERROR = "absolute error"
FIGURES = {"psnr": "PSNR {:.1f} dB", "ssim": "SSIM {:.3f}", "nmse": "NMSE {:.3g}"}
DPI = 144  # 10 points are 20 pixels
SHORT_SIDE = 448  # pixels that the shorter side of an image gets, or more, so that the figures above it fit
LONG_SIDE = 2048  # pixels that a narrow image is not magnified beyond
MARGIN, GAP, TITLE, NAME, NOTE, BAR = 28, 8, 50, 36, 30, 112  # pixels


def panel(
    path: str | os.PathLike[str],
    *,
    corrupted: np.ndarray,
    reconstruction: np.ndarray,
    target: np.ndarray | None = None,
    title: str = "",
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Draws corrupted | reconstruction | ground truth | absolute error as a PNG, one row per slice.

    All images share one grey scale, from 0 (black) to the 99.5th percentile of the truth, or of the reconstruction
    where there is no truth. The error has a scale of its own, 1, 2, 5, 10, ... times as steep, and says so. A pixel of
    an image is a square of whole screen pixels; what is not finite is magenta, for black would look like no error.

    Args:
        path: the PNG; it appears under this name once it is complete.
        corrupted: real (height, width) or (slices, height, width), in any unit.
        reconstruction: the same shape and unit.
        target: the same shape and unit; without it, truth and error are left out.
        title: volume, contrast, slice.
        metrics: figures under a column's name, such as {"reconstruction": {"psnr": 32.1, "ssim": 0.95}}.
        labels: one for each slice, written into the corner of its row.
    """
    columns = {"corrupted": _stack(corrupted), "reconstruction": _stack(reconstruction)}
    truth = columns["reconstruction"] if target is None else _stack(target)
    white = _percentile(truth, 99.5) or 1.0
    if target is not None:
        columns["ground truth"] = truth
        with np.errstate(invalid="ignore"):
            error = np.abs(truth - columns["reconstruction"])
        gain = _gain(_percentile(error, 99.5) / white)
        columns[ERROR] = error

    notes = {name: "   ".join(map(_figure, values, values.values())) for name, values in (metrics or {}).items()}
    if target is not None:
        notes[ERROR] = f"\u00d7{gain}: 0 to {100 / gain:g} % of white"

    slices, height, width = truth.shape
    zoom = max(1, min(math.ceil(SHORT_SIDE / min(height, width)), LONG_SIDE // max(height, width)))
    height, width = zoom * height, zoom * width
    names = MARGIN + (TITLE if title else 0)
    top = names + NAME + (NOTE if notes else 0)
    canvas = _Canvas(
        2 * MARGIN + len(columns) * (width + GAP) - GAP + (BAR if target is not None else 0),
        top + slices * (height + GAP) - GAP + MARGIN,
    )
    canvas.text(MARGIN, MARGIN, title, size=12.5, color=TEXT, weight="bold")
    for column, (name, images) in enumerate(columns.items()):
        left = MARGIN + column * (width + GAP)
        canvas.text(left, names, name, size=10.5, color=TEXT)
        canvas.text(left, names + NAME - 4, notes.get(name, ""), size=9, color=FAINT)
        colours, brightest = (ERROR_COLOURS, white / gain) if name == ERROR else (GREYS, white)
        for row, image in enumerate(images):
            axes = canvas.axes(left, top + row * (height + GAP), width, height)
            axes.set_axis_off()
            axes.imshow(image, colours, vmin=0, vmax=brightest, interpolation="nearest", origin="upper", aspect="auto")
            if column == 0 and row < len(labels):
                canvas.text(left + 10, top + row * (height + GAP) + 8, labels[row], size=9, color=TEXT)
    if target is not None:
        bar = canvas.axes(left + width + 2 * GAP, top, 14, height)
        percent = ScalarMappable(Normalize(0, 100 / gain), ERROR_COLOURS)
        canvas.figure.colorbar(percent, cax=bar, format=StrMethodFormatter("{x:g} %"), ticks=MaxNLocator(5))
        bar.tick_params(colors=FAINT, labelsize=8.5, length=3)
        for edge in bar.spines.values():
            edge.set_visible(False)
    _save(canvas.figure, path)


def gallery(path: str | os.PathLike[str], images: Mapping[str, np.ndarray], *, title: str = "") -> None:
    """Draws one slice as several methods see it, and below each its absolute error, as a PNG.

    Args:
        path: the PNG; it appears under this name once it is complete.
        images: real (height, width) in one unit, by name; the first is the truth, and the grey scale is its own.
        title: of the whole.
    """
    truth, *others = (np.asarray(image, np.float64) for image in images.values())
    white = _percentile(truth, 99.5) or 1.0
    errors = [np.abs(image - truth) for image in others]
    gain = _gain(max(_percentile(error, 99.5) for error in errors) / white)
    height, width = (math.ceil(SHORT_SIDE / min(truth.shape)) * side for side in truth.shape)
    names = MARGIN + TITLE
    top, below = names + NAME, names + NAME + height + GAP
    canvas = _Canvas(2 * MARGIN + len(images) * (width + GAP) - GAP, below + height + MARGIN)
    canvas.text(MARGIN, MARGIN, title, size=12.5, color=TEXT, weight="bold")
    for column, (name, image) in enumerate(zip(images, [truth, *others], strict=True)):
        left = MARGIN + column * (width + GAP)
        canvas.text(left, names, name, size=10.5, color=TEXT)
        rows = [(top, image, GREYS, white)]
        rows += [(below, errors[column - 1], ERROR_COLOURS, white / gain)] if column else []
        for row, values, colours, brightest in rows:
            axes = canvas.axes(left, row, width, height)
            axes.set_axis_off()
            axes.imshow(values, colours, vmin=0, vmax=brightest, interpolation="nearest", origin="upper", aspect="auto")
    note = f"{ERROR} below, \u00d7{gain}: 0 to {100 / gain:g} % of white"
    canvas.text(MARGIN, below + 8, note, size=9, color=FAINT)
    _save(canvas.figure, path)


def curves(path: str | os.PathLike[str], rows: Iterable[Mapping[str, float]]) -> None:
    """Draws training loss (logarithmic) and validation PSNR and SSIM over steps as a PNG.

    Args:
        path: the PNG; it appears under this name once it is complete.
        rows: of metrics.jsonl: 'step' with any of 'loss', 'val/psnr' (dB) and 'val/ssim'; values that are not finite
            are left out.
    """
    rows = list(rows)
    last = max((row["step"] for row in rows), default=0) or 1
    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (key, name) in zip(
        figure.subplots(1, 3),
        (("loss", "training loss"), ("val/psnr", "validation PSNR, dB"), ("val/ssim", "validation SSIM")),
        strict=True,
    ):
        points = np.array([(row["step"], row[key]) for row in rows if key in row], np.float64).reshape(-1, 2)
        points = points[np.isfinite(points).all(1)]
        if key == "loss":
            axes.set_yscale("log")
            points = points[points[:, 1] > 0]
        if len(points):
            axes.plot(*points.T, color=LINE, linewidth=1.4, marker="." if len(points) < 30 else "", clip_on=False)
        else:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center", fontsize=9, color=INK)
        if len(points) and key != "loss":
            step, value = points[points[:, 1].argmax()]
            axes.plot(step, value, "o", color=LINE, markersize=6, clip_on=False)
            name += f": best {value:.4g} at step {step:,.0f}"
        axes.set_xlim(0, last)
        axes.set_title(name, loc="left", fontsize=9.5, color=INK)
        axes.set_xlabel("step", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.tick_params(which="both", colors=INK, labelsize=8.5)
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b9bec6")
    _save(figure, path)


class _Canvas:
    """A dark figure laid out in pixels from its upper left corner, so that no image is resampled."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
        FigureCanvasAgg(self.figure)

    def axes(self, left: int, top: int, width: int, height: int) -> Axes:
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(self, left: int, top: int, text: str, **style: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, va="top", **style)


def _stack(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images, np.float64)
    return images[None] if images.ndim == 2 else images


def _percentile(images: np.ndarray, percent: float) -> float:
    finite = images[np.isfinite(images)]
    return max(0.0, float(np.percentile(finite, percent))) if finite.size else 0.0


def _gain(fraction: float) -> int:
    """The largest of 1, 2, 5, 10, ... 1000 that keeps `fraction` times it within 1."""
    return max((g for g in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if g * fraction <= 1), default=1)


def _figure(name: str, value: float) -> str:
    return FIGURES.get(name.lower(), f"{name} {{:.3g}}").format(value)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
