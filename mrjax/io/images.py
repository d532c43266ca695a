"""What the formats of images, such as NIfTI and DICOM, have in common: layouts, pairs, and simulated k-space."""

import abc
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mrjax.io.files import stem
from mrjax.io.storage import NATIVE, Storage, parallel_file
from mrjax.io.volume import DATA_NAMES, TARGET_NAMES, Volume, describe_arrays
from mrjax.mri import simulate

KSPACE, MAGNITUDE = DATA_NAMES["kspace"], TARGET_NAMES["kspace"][0]


class ImageHeader(NamedTuple):
    """What the header of a file of images tells."""

    shape: tuple[int, ...]  # (slices, height, width)
    dtype: np.dtype  # as the images are read
    contrast: str  # '' if only the file's name may tell
    affine: np.ndarray | None  # see `Volume`
    files: tuple[str, ...] = ()  # likewise


class ImageReader(abc.ABC):
    """Reads files of images: layout `image`, or `paired` with the target that `parallel_file` finds.

    Where `kspace` is asked for, it is simulated from the images by `mri.simulate`, and they are its target.
    """

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
        arrays, files = {DATA_NAMES["image"]: header}, header.files
        if layout == "kspace":
            slices, *size = header.shape
            kspace = header._replace(shape=(slices, simulate.COILS, *size), dtype=np.dtype(np.complex64))
            arrays = {KSPACE: kspace, MAGNITUDE: header._replace(dtype=np.dtype(np.float32))}
        elif twin := parallel_file(path):
            target = self.read_header(twin)
            arrays, files = {DATA_NAMES["paired"]: header, TARGET_NAMES["paired"][0]: target}, files + target.files
        elif layout == "paired":
            arrays = {DATA_NAMES["paired"]: header}
        attributes: dict[str, Any] = {"acquisition": header.contrast} if header.contrast else {}
        if header.affine is not None:
            attributes["affine"] = header.affine
        volume = describe_arrays(path, arrays, attributes, layout)
        return dataclasses.replace(volume, simulated=layout == "kspace", files=files)

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read a slice of `reconstruction`, `input` or `target`, or of `kspace` or its image (see `volume.Reader`)."""
        twin = parallel_file(path) if name == TARGET_NAMES["paired"][0] else None
        image = self.read_image(twin or path, index)
        if name == KSPACE:
            return simulate.simulate_kspace(image, stem(path), index, self.read_header(path).shape[0])
        return simulate.magnitude(image) if name == MAGNITUDE else image
