"""Figures: panels of a slice, galleries of methods, and learning curves, without a display or global state."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from mrjax.data.files import replacing
from mrjax.measures.metrics import METRICS

# A reading room is dark: images lie on near-black, and text does not glare.
BACKGROUND, TEXT, FAINT = "#0b0c0e", "#e3e6ea", "#9aa1ab"
INK, LINE = "#30343a", "#2f6db3"
IMAGE_COLOURS, ERROR_COLOURS = (colormaps[name].with_extremes(bad="magenta") for name in ("gray", "inferno"))
COLUMNS = {"corrupted": "corrupted", "reconstruction": "reconstruction", "target": "ground truth"}
ERROR = "absolute error"
DPI = 144  # 10 points are 20 pixels
SHORT_SIDE = 448  # pixels of the shorter side of an image, or more, so that the metrics above it fit
LONG_SIDE = 2048  # pixels beyond which a narrow image is not magnified
MARGIN, GAP, TITLE, NAME, NOTE, BAR = 28, 8, 50, 36, 30, 112  # pixels
CURVES = {"loss": "training loss", "val/psnr": "validation PSNR, dB", "val/ssim": "validation SSIM"}


def draw_panel(
    path: str | os.PathLike[str],
    images: Mapping[str, np.ndarray],
    *,
    title: str = "",
    metrics: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draw corrupted | reconstruction | ground truth | absolute error of a slice as a PNG.

    All images share one grey scale, from 0 (black) to the 99.5th percentile of the target, or of the reconstruction
    where there is no target. The error has a scale of its own, 1, 2, 5, 10, ... times as steep, which is stated. A
    pixel of an image is a square of whole screen pixels; values that are not finite are magenta, since black would
    look like no error.

    Args:
      path: the PNG; it appears under this name once it is complete.
      images: 'corrupted', 'reconstruction' and, where known, 'target': real (height, width), in one unit.
      title: volume, contrast, slice.
      metrics: values under a column's name, such as {"reconstruction": {"psnr": 32.1, "ssim": 0.95}}.
    """
    columns = {COLUMNS[name]: np.asarray(images[name], np.float64) for name in COLUMNS if name in images}
    notes = {name: "   ".join(map(_caption, values, values.values())) for name, values in (metrics or {}).items()}
    white, gain = _percentile(columns.get("ground truth", columns["reconstruction"])) or 1.0, 0
    if "target" in images:
        with np.errstate(invalid="ignore"):
            columns[ERROR] = np.abs(columns["ground truth"] - columns["reconstruction"])
        gain = _error_gain(columns[ERROR], white)
        notes[ERROR] = _describe_gain(gain)
    grid = _Grid(1, columns, title, notes, bar=bool(gain))
    for column, (name, image) in enumerate(columns.items()):
        grid.draw_image(0, column, image, white, gain if name == ERROR else 0)
    if gain:
        grid.draw_error_bar(len(columns) - 1, gain)
    _save(grid.figure, path)


def draw_gallery(path: str | os.PathLike[str], images: Mapping[str, np.ndarray], *, title: str = "") -> None:
    """Draw the reconstructions of one slice by several methods, and below each its absolute error, as a PNG.

    Images are real (height, width) in one unit, by name; the first is the target, whose grey scale all share.
    """
    target, *reconstructions = (np.asarray(image, np.float64) for image in images.values())
    white = _percentile(target) or 1.0
    errors = [np.abs(image - target) for image in reconstructions]
    gain = min(_error_gain(error, white) for error in errors)
    grid = _Grid(2, images, title)
    for column, image in enumerate([target, *reconstructions]):
        grid.draw_image(0, column, image, white)
    for column, error in enumerate(errors, start=1):
        grid.draw_image(1, column, error, white, gain)
    grid.write(MARGIN, grid.top(1) + 8, f"{ERROR} below, {_describe_gain(gain)}", size=9, color=FAINT)
    _save(grid.figure, path)


def draw_curves(path: str | os.PathLike[str], rows: Iterable[Mapping[str, float]]) -> None:
    """Draw training loss (logarithmic) and validation PSNR and SSIM over steps as a PNG.

    Rows are those of metrics.jsonl: 'step' with any of `CURVES`; values that are not finite are left out.
    """
    rows = list(rows)
    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        points = np.array([(row["step"], row[key]) for row in rows if key in row], np.float64).reshape(-1, 2)
        points = points[np.isfinite(points).all(1)]
        if key == "loss":
            axes.set_yscale("log")
            points = points[points[:, 1] > 0]
        _draw_curve(axes, points, title, mark_best=key != "loss")
        axes.set_xlim(0, max((row["step"] for row in rows), default=0) or 1)
    _save(figure, path)


def _draw_curve(axes: Axes, points: np.ndarray, title: str, *, mark_best: bool) -> None:
    if len(points):
        axes.plot(*points.T, color=LINE, linewidth=1.4, marker="." if len(points) < 30 else "", clip_on=False)
        if mark_best:
            step, value = points[points[:, 1].argmax()]
            axes.plot(step, value, "o", color=LINE, markersize=6, clip_on=False)
            title += f": best {value:.4g} at step {step:,.0f}"
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center", fontsize=9, color=INK)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(which="both", colors=INK, labelsize=8.5)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9bec6")


class _Grid:
    """A dark figure of rows and named columns of images, laid out in pixels so that no image is resampled."""

    def __init__(
        self,
        rows: int,
        columns: Mapping[str, np.ndarray],
        title: str,
        notes: Mapping[str, str] | None = None,
        bar: bool = False,
    ):
        shape = next(iter(columns.values())).shape
        zoom = max(1, min(math.ceil(SHORT_SIDE / min(shape)), LONG_SIDE // max(shape)))
        self.image_height, self.image_width = (zoom * side for side in shape)
        names_top = MARGIN + (TITLE if title else 0)
        self.header = names_top + NAME + (NOTE if notes else 0)
        self.width = self.left(len(columns)) - GAP + MARGIN + (BAR if bar else 0)
        self.height = self.top(rows) - GAP + MARGIN
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor=BACKGROUND)
        FigureCanvasAgg(self.figure)
        self.write(MARGIN, MARGIN, title, size=12.5, color=TEXT, weight="bold")
        for column, name in enumerate(columns):
            self.write(self.left(column), names_top, name, size=10.5, color=TEXT)
            self.write(self.left(column), names_top + NAME - 4, (notes or {}).get(name, ""), size=9, color=FAINT)

    def left(self, column: int) -> int:
        return MARGIN + column * (self.image_width + GAP)

    def top(self, row: int) -> int:
        return self.header + row * (self.image_height + GAP)

    def add_axes(self, left: int, top: int, width: int) -> Axes:
        x, y = left / self.width, 1 - (top + self.image_height) / self.height
        return self.figure.add_axes((x, y, width / self.width, self.image_height / self.height))

    def write(self, left: int, top: int, text: str, **style: Any) -> None:
        # A file name may hold "$", which matplotlib would parse as mathematics.
        self.figure.text(left / self.width, 1 - top / self.height, text, va="top", parse_math=False, **style)

    def draw_image(self, row: int, column: int, image: np.ndarray, white: float, gain: int = 0) -> None:
        """Draw an image, or an error if there is a `gain`, from 0 to `white` (over the gain)."""
        axes = self.add_axes(self.left(column), self.top(row), self.image_width)
        axes.set_axis_off()
        colours = ERROR_COLOURS if gain else IMAGE_COLOURS
        axes.imshow(image, colours, vmin=0, vmax=white / (gain or 1), interpolation="nearest", aspect="auto")

    def draw_error_bar(self, column: int, gain: int) -> None:
        axes = self.add_axes(self.left(column) + self.image_width + 2 * GAP, self.top(0), 14)
        percent = ScalarMappable(Normalize(0, 100 / gain), ERROR_COLOURS)
        self.figure.colorbar(percent, cax=axes, format=StrMethodFormatter("{x:g} %"), ticks=MaxNLocator(5))
        axes.tick_params(colors=FAINT, labelsize=8.5, length=3)
        axes.spines[:].set_visible(False)


def _percentile(images: np.ndarray) -> float:
    """The 99.5th percentile of what is finite, at least 0."""
    finite = images[np.isfinite(images)]
    return max(0.0, float(np.percentile(finite, 99.5))) if finite.size else 0.0


def _error_gain(error: np.ndarray, white: float) -> int:
    """The largest of 1, 2, 5, 10, ... 1000 that keeps `gain` times the error's 99.5th percentile within white."""
    fraction = _percentile(error) / white
    return max((gain for gain in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if gain * fraction <= 1), default=1)


def _describe_gain(gain: int) -> str:
    return f"\u00d7{gain}: 0 to {100 / gain:g} % of white"


def _caption(name: str, value: float) -> str:
    return METRICS[name].caption.format(value) if name in METRICS else f"{name} {value:.3g}"


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with replacing(path) as part:
        figure.savefig(part, format="png")
