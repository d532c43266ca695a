"""What the formats of images, such as NIfTI and DICOM, have in common: layouts, and targets in a parallel folder."""

import abc
from typing import Any, NamedTuple

import numpy as np

from mrjax.io.storage import NATIVE, Storage, parallel_file
from mrjax.io.volume import DATA_NAMES, TARGET_NAMES, Volume, describe_arrays


class ImageHeader(NamedTuple):
    """What the header of a file of images tells."""

    shape: tuple[int, ...]  # (slices, height, width)
    dtype: np.dtype  # as the images are read
    contrast: str
    affine: np.ndarray | None  # see `Volume`


class ImageReader(abc.ABC):
    """Reads files of images: layout `image`, or `paired` with a target of the same name in a parallel folder."""

    @abc.abstractmethod
    def read_header(self, path: str) -> ImageHeader:
        """Read the header of a volume; raises `UserError` if it cannot be used."""

    @abc.abstractmethod
    def read_image(self, path: str, index: int) -> np.ndarray:
        """Read a slice (height, width), upright, from any thread; raises `UserError` if it cannot be read."""

    def group(self, paths: list[str]) -> list[str]:
        """Return the files: each is a volume."""
        return paths

    def describe(self, path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
        """Describe a volume by its header (see `volume.Reader`)."""
        header = self.read_header(path)
        arrays = {DATA_NAMES["image"]: header}
        if twin := parallel_file(path):
            arrays = {DATA_NAMES["paired"]: header, TARGET_NAMES["paired"][0]: self.read_header(twin)}
        elif layout == "paired":
            arrays = {DATA_NAMES["paired"]: header}
        attributes: dict[str, Any] = {"acquisition": header.contrast}
        if header.affine is not None:
            attributes["affine"] = header.affine
        return describe_arrays(path, arrays, attributes, layout)

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read a slice of `reconstruction`, `input` or `target` (see `volume.Reader`)."""
        twin = parallel_file(path) if name == TARGET_NAMES["paired"][0] else None
        return self.read_image(twin or path, index)
