"""Figures: panels of a slice, learning curves and box plots, without a display or global state."""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mrjax.errors import printable
from mrjax.io.files import replacing
from mrjax.measures.metrics import METRICS

# A reading room is dark: images lie on near-black, and text does not glare.
BACKGROUND, TEXT, FAINT = "#0b0c0e", "#e3e6ea", "#9aa1ab"
LINE, GRID = "#2f6db3", "#e6e8eb"  # of curves on white
DARK_GRID = "#2a2f36"
# Of Okabe and Ito's colours, which the colour-blind tell apart; markers differ, too.
METHOD_COLOURS, METHOD_MARKERS = {"corrupted": "#e69f00", "reconstruction": "#56b4e9"}, "oD"
IMAGE_COLOURS, ERROR_COLOURS = (colormaps[name].with_extremes(bad="magenta") for name in ("gray", "inferno"))
COLUMNS = {"corrupted": "corrupted", "reconstruction": "reconstruction", "target": "ground truth"}
DPI = 144  # 10 points are 20 pixels
SHORT_SIDE = 448  # pixels of the shorter side of an image, or more, so that the metrics above it fit
LONG_SIDE = 2048  # pixels beyond which a narrow image is not magnified
GAINS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)  # of the error's scale, where it fits
MARGIN, GAP, HEADER, BAR = 28, 8, 144, 112  # pixels
CURVES = {"loss": "training loss", "val/psnr": "validation PSNR, dB", "val/ssim": "validation SSIM"}
SVG: dict[Any, Any] = {"text.color": TEXT, "axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT}
SVG |= {"axes.edgecolor": DARK_GRID, "axes.facecolor": "none", "figure.facecolor": "none", "font.size": 9}
SVG |= {"svg.fonttype": "none"}  # text stays text


def draw_panel(
    path: str | Path, images: Mapping[str, np.ndarray], title: str, metrics: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw corrupted | reconstruction | ground truth | absolute error of a slice as a PNG, complete or not at all.

    All images share one grey scale, from 0 (black) to the 99.5th percentile of the target, or of the reconstruction
    where there is no target. The error has a scale of its own, 1, 2, 5, 10, ... times as steep, which is stated. A
    pixel of an image is a square of whole screen pixels; values that are not finite are magenta, since black would
    look like no error.

    Images are 'corrupted', 'reconstruction' and, where known, 'target': real (height, width), in one unit. Metrics are
    shown under the name of their image, such as {"reconstruction": {"psnr": 32.1, "ssim": 0.95}}.
    """
    target, reconstruction, white = images.get("target"), images["reconstruction"], white_level(images)
    panels = []
    for name in (name for name in COLUMNS if name in images):
        values = metrics.get(name, {}).items()
        note = "   ".join(f"{METRICS[key].label} {METRICS[key].format(value)}" for key, value in values)
        panels.append((images[name], IMAGE_COLOURS, white, COLUMNS[name], note))
    if target is not None:
        with np.errstate(invalid="ignore"):
            error = 100 / white * np.abs(reconstruction - target)
        gain = error_gain(error)
        scale = f"\u00d7{gain}: 0 to {100 / gain:g} % of white"
        panels.append((error, ERROR_COLOURS, 100 / gain, "absolute error", scale))
    zoom = max(1, min(math.ceil(SHORT_SIDE / min(reconstruction.shape)), LONG_SIDE // max(reconstruction.shape)))
    image_height, image_width = (zoom * side for side in reconstruction.shape)
    right = MARGIN if target is None else MARGIN + BAR
    width, height = MARGIN + len(panels) * (image_width + GAP) - GAP + right, HEADER + image_height + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
    edges = (MARGIN / width, MARGIN / height, 1 - right / width, 1 - HEADER / height)
    figure.subplots_adjust(*edges, wspace=GAP / image_width)
    # A file name may hold "$", which matplotlib would parse as mathematics.
    top_left = {"x": MARGIN / width, "y": 1 - MARGIN / height, "ha": "left"}
    figure.suptitle(printable(title), **top_left, size=12.5, color=TEXT, weight="bold", parse_math=False)
    blank = {"frame_on": False, "xticks": (), "yticks": ()}
    for i, (image, colours, limit, name, note) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), i, **blank)
        axes.set_title(name, loc="left", pad=18, size=10.5, color=TEXT)
        axes.annotate(note, (0, 1), (0, 5), "axes fraction", "offset points", size=9, color=FAINT)
        shown = axes.imshow(image, colours, vmin=0, vmax=limit, interpolation="nearest", aspect="auto")
    if target is not None:
        bar = axes.inset_axes((1.04, 0, 0.03, 1))
        figure.colorbar(shown, cax=bar, format="{x:g} %", ticks=MaxNLocator(5))
        bar.tick_params(colors=FAINT, labelsize=8.5, length=3)
        bar.spines[:].set_visible(False)
    _save(figure, path)


def draw_curves(path: str | Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw training loss (logarithmic) and validation PSNR and SSIM over steps as a PNG.

    Rows are those of metrics.jsonl: 'step' with any of `CURVES`; values that are not finite are left out.
    """
    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained")
    for axes, key in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        _draw_curve(axes, rows, key, LINE, GRID)
    _save(figure, path)


def curve_svgs(rows: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Draw each of the learning curves of `draw_curves` as an SVG for a dark page."""
    for key in CURVES:
        with matplotlib.rc_context(SVG | {"svg.hashsalt": key}):  # identifiers of its own, always the same
            figure = Figure(figsize=(4, 2.4), layout="constrained")
            _draw_curve(figure.add_subplot(), rows, key, METHOD_COLOURS["reconstruction"], DARK_GRID)
            yield _svg(figure)


def box_plot_svg(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Draw the distribution of a metric over volumes, by contrast and method, as an SVG for a dark page.

    Rows are those of `measures.evaluator`. A volume is a point; a box goes from the first quartile to the third, with
    the median, its whiskers to the last volume within 1.5 times its length. Values that are not finite are left out.
    """
    groups = sorted({row["contrast"] for row in rows})
    with matplotlib.rc_context(SVG | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4, 0.7 + 0.6 * len(groups)), layout="constrained")
        axes = figure.add_subplot()
        for (method, colour), marker, shift in zip(METHOD_COLOURS.items(), METHOD_MARKERS, (-0.18, 0.18), strict=True):
            for place, group in enumerate(groups, 1):
                values = np.array([row[method][name] for row in rows if row["contrast"] == group])
                values = values[np.isfinite(values)]
                line = {"color": colour, "linewidth": 1.2}
                axes.boxplot(
                    [values],
                    positions=[place + shift],
                    widths=0.26,
                    orientation="horizontal",
                    manage_ticks=False,
                    showfliers=False,
                    showcaps=False,
                    boxprops=line,
                    whiskerprops=line,
                    medianprops=line,
                )
                axes.plot(values, np.full(len(values), place + shift), marker, color=colour, markersize=4.5)
        # A contrast may hold "$", which matplotlib would parse as mathematics.
        axes.set_yticks(range(1, len(groups) + 1), [group[:16] for group in groups], parse_math=False)
        axes.set_ylim(len(groups) + 0.6, 0.4)
        axes.set_title(METRICS[name].label, loc="left", fontsize=9.5)
        axes.grid(axis="x", color=DARK_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        return _svg(figure)


def white_level(images: Mapping[str, np.ndarray]) -> float:
    """Return the value that is shown as white: the 99.5th percentile of the target, else of the reconstruction."""
    return _percentile(images.get("target", images["reconstruction"])) or 1.0


def error_gain(error: np.ndarray) -> int:
    """Return how many times as steep as the images' the scale of an error is, which is in % of white."""
    return max((gain for gain in GAINS if gain * _percentile(error) <= 100), default=1)


def _draw_curve(axes: Axes, rows: Sequence[Mapping[str, float]], key: str, line: str, grid: str) -> None:
    finite = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    points, title = np.array(finite, np.float64).reshape(-1, 2), CURVES[key]
    if key == "loss":
        axes.set_yscale("log")
        points = points[points[:, 1] > 0]
    elif len(points):
        step, value = points[points[:, 1].argmax()]
        axes.plot(step, value, "o", color=line, markersize=6, clip_on=False)
        title = f"{title}: best {value:.4g} at step {step:,.0f}"
    if len(points):
        axes.plot(*points.T, color=line, linewidth=1.4, marker="." if len(points) < 30 else "", clip_on=False)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center")
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.set(xlabel="step", xlim=(0, max((row["step"] for row in rows), default=0) or 1))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=grid)
    axes.spines[["top", "right"]].set_visible(False)


def _percentile(image: np.ndarray) -> float:
    """The 99.5th percentile of what is finite, at least 0."""
    finite = image[np.isfinite(image)]
    return max(0.0, float(np.percentile(finite, 99.5))) if finite.size else 0.0


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, format="png")


def _svg(figure: Figure) -> str:
    """Return a figure as an SVG element without identifiers of groups, which would be those of other figures, too."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    return re.sub(r'<g id="[^"]+">', "<g>", svg[svg.index("<svg") :])
