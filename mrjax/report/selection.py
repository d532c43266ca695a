"""The images of a report: encoded as their volumes come, and as many of them kept as fit.

An image is a lossless 8-bit PNG of the square root of its values, so that dark tissue and noise keep their grey levels
in a narrow window.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mrjax.io.volume import Volume
from mrjax.measures import evaluator
from mrjax.measures.metrics import METRICS
from mrjax.report import figures

HEADROOM = 2  # the largest value that is encoded, in units of that which is white by default
NOT_FINITE = 255  # the code of a value that is no finite number; others have 0 to 254
LONGEST_SIDE = 512  # pixels of an image; of larger ones, means over blocks are shown
SPREAD = 6  # volumes, if there are so many, between which the space is divided at least
EXTREMES = 4  # of the worst slices, and of the best


@dataclasses.dataclass
class Slice:
    """A slice that is shown: its SSIM (see `_ssim`), its metrics by method as texts, and its PNGs in base64."""

    ssim: float
    scores: dict[str, list[str]]
    images: dict[str, str]


@dataclasses.dataclass(eq=False)
class Shown:
    """What is shown of a volume."""

    row: dict[str, Any]
    slices: dict[int, Slice]  # by number, from 0
    total: int  # of its slices
    white: float = 1.0  # in the file's units
    gain: int | None = None  # of the error's scale; None without a target
    whole: bool = True  # rather than single slices that are among the worst or best

    @property
    def ssim(self) -> float:
        """The SSIM of the volume, 0 if it is unknown."""
        ssim = _ssim(self.row)
        return 0.0 if math.isnan(ssim) else ssim


class Selection:
    """Keeps images of at most `budget` bytes in base64, of so many `volumes` that will be added."""

    def __init__(self, volumes: int, budget: int) -> None:
        self.shown: list[Shown] = []
        self._full = False
        self._budget, self._share = budget, max(budget, 0) / min(volumes, SPREAD)

    def add(self, row: dict[str, Any], volume: Volume, images: evaluator.Images) -> None:
        """Encode the images of a volume, as `Inference.reconstruct` returns them, with its row of the table."""
        images = {name: images[name] for name in figures.COLUMNS if name in images}
        scores = evaluator.score_each_slice(images, volume)
        shown = Shown(row, {}, volume.slices)
        numbers = set(range(volume.slices))
        if self._full and self._median([*self.shown, shown]) is shown:  # nothing else of it would stay
            shown.whole = False
            numbers = {number for number, of in scores.items() if self._is_extreme(_ssim(of))}
        if not numbers:
            return
        limits = dict.fromkeys(images, figures.white_level(images))
        shown.white = limits["reconstruction"]
        if "target" in images:
            with np.errstate(invalid="ignore"):
                images["error"] = np.abs(images["reconstruction"] - images["target"])
                shown.gain = figures.error_gain(100 / shown.white * images["error"])
            limits["error"] = shown.white / shown.gain

        def encode_slice(number: int) -> Slice:
            metrics = scores.get(number, {})
            texts = {
                method: [METRICS[name].format(value) for name, value in values.items()]
                for method, values in metrics.items()
            }
            encoded = {name: encode(image[number], limits[name]) for name, image in images.items()}
            return Slice(_ssim(metrics), texts, encoded)

        every = math.ceil(_bytes([encode_slice(volume.slices // 2)]) * len(numbers) / max(self._share, 1))
        if shown.whole and every > 1:  # the worst and the best are shown in any case
            ranked = sorted(scores, key=lambda number: _ssim(scores[number]))
            numbers = {*range(0, volume.slices, every), *ranked[:EXTREMES], *ranked[-EXTREMES:]}
        shown.slices = {number: encode_slice(number) for number in sorted(numbers)}
        self.shown.append(shown)
        self._make_room()

    def extremes(self) -> tuple[list[tuple[Shown, int]], list[tuple[Shown, int]]]:
        """Return the slices of the lowest SSIM of all volumes, worst first, and those of the highest, best first."""
        every = [
            (shown, number) for shown in self.shown for number, of in shown.slices.items() if not math.isnan(of.ssim)
        ]
        every.sort(key=lambda one: one[0].slices[one[1]].ssim)
        count = min(EXTREMES, len(every) // 2)
        return every[:count], every[len(every) - count :][::-1]

    def _make_room(self) -> None:
        """Leave out volumes, from that of the median SSIM on, but for the worst and the best slices of all.

        What is among the extremes of all volumes was so whenever it was asked, so nothing that counts was dropped.
        """
        while True:
            extremes = {one for part in self.extremes() for one in part}
            for shown in self.shown:
                if not shown.whole:
                    shown.slices = {n: of for n, of in shown.slices.items() if (shown, n) in extremes}
            self.shown = [shown for shown in self.shown if shown.slices]
            median = self._median(self.shown)
            if not median or _bytes([of for shown in self.shown for of in shown.slices.values()]) <= self._budget:
                return
            median.whole, self._full = False, True

    def _median(self, volumes: list[Shown]) -> Shown | None:
        whole = sorted((shown for shown in volumes if shown.whole), key=lambda shown: shown.ssim)
        return whole[len(whole) // 2] if whole else None

    def _is_extreme(self, ssim: float) -> bool:
        """Tell whether another slice of this SSIM would be among the worst or the best."""
        inner = [shown.slices[number].ssim for part in self.extremes() for shown, number in part[-1:]]
        return not inner or not inner[0] <= ssim <= inner[1]


def _ssim(scores: Mapping[str, Any]) -> float:
    """Return the SSIM of a reconstruction, NaN if it is unknown; one that is no number is -inf, the worst there is."""
    if "reconstruction" not in scores:
        return math.nan
    ssim = scores["reconstruction"]["ssim"]
    return -math.inf if math.isnan(ssim) else ssim


def encode(image: np.ndarray, limit: float) -> str:
    """Encode an image, real (height, width), as a PNG in base64; `limit` is the value that is white by default.

    The code is 254 sqrt(value / (HEADROOM limit)), from 0 to 254, or NOT_FINITE.
    """
    image = _shrink(np.asarray(image, np.float64))
    finite = np.isfinite(image)
    values = np.clip(np.where(finite, image, 0) / (HEADROOM * limit), 0, 1)
    codes = np.where(finite, np.round(254 * np.sqrt(values)), NOT_FINITE).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(codes).save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def _shrink(image: np.ndarray) -> np.ndarray:
    """Average an image over blocks, if it is larger than LONGEST_SIDE; an incomplete last row or column is cut off."""
    block = math.ceil(max(image.shape) / LONGEST_SIDE)
    height, width = (max(side // block, 1) for side in image.shape)
    if block == 1 or min(image.shape) < block:
        return image
    return image[: height * block, : width * block].reshape(height, block, width, block).mean((1, 3))


def _bytes(slices: list[Slice]) -> int:
    return sum(len(image) for of in slices for image in of.images.values())
