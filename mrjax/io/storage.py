"""How files store their arrays: names, order of the axes, complex numbers, origin of k-space."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mrjax.io.files import stem

AXES = "slices,coils,height,width"
# Folders side by side whose files of one name belong together: of what a reconstruction starts from, of targets.
PARALLEL_FOLDERS = (("kspace", "image"), ("input", "target"))
PAIRED_NAMES = ("_input", "_target")  # or, in one folder, files whose names differ by how they end before the suffix


@dataclasses.dataclass(frozen=True)
class Storage:
    """What a config says of its files; the defaults are those of the .t5 file.

    A data set in a group goes by its path, as in `scan/kspace`. `target` is '' for the first of `volume.TARGET_NAMES`.
    """

    kspace: str = "kspace"
    input: str = "input"
    target: str = ""
    mask: str = "mask"
    axes: str = AXES  # of arrays as their program shows them; images lack the coils, one slice may lack its axis
    shifted: bool = False  # whether k-space begins with frequency zero, as `np.fft.fft2` of an image does


NATIVE = Storage()


class Arrangement(NamedTuple):
    """The way from a slice as stored to ([coils,] height, width), real or complex."""

    order: tuple[int, ...]  # of the stored slice's axes
    parts: tuple[str, ...]  # names of real and imaginary part in a compound
    dtype: np.dtype  # of the result
    shifted: bool  # see `Storage`
    columns: slice  # those that the scanner measured

    def apply(self, data: np.ndarray) -> np.ndarray:
        """Arrange a slice; the result is C-contiguous."""
        data = data.transpose(self.order)
        if self.parts:
            data = np.stack([data[part] for part in self.parts], -1)
        if data.dtype.kind != "c" and self.dtype.kind == "c":
            real = np.ascontiguousarray(data, self.dtype.type().real.dtype)
            data = real.view(self.dtype)[..., 0]
        if self.shifted:
            # fft2 of an image with its origin in the middle, not at its first pixel.
            rows, columns = (np.exp(2j * np.pi * (n // 2) / n * np.arange(n)) for n in data.shape[-2:])
            data = np.fft.fftshift(data * np.outer(rows, columns).astype(self.dtype), (-2, -1))
        data = np.ascontiguousarray(data)
        if self.columns != slice(None):
            data[..., : self.columns.start] = data[..., self.columns.stop :] = 0
        return data


class Arranged(NamedTuple):
    """How an array is read, (slices, [coils,] height, width), and how from what is stored."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int | None  # the stored axis of slices; None: the one slice has none
    arrangement: Arrangement


def arrange(
    shape: tuple[int, ...], dtype: np.dtype, storage: Storage, *, kspace: bool, matlab: bool = False
) -> Arranged | None:
    """Find how an array of this stored shape and dtype is read; None for too few or too many axes, or no numbers."""
    parts = complex_parts(dtype)
    axes = name_axes(shape, "c" if parts else dtype.kind, storage, coils=kspace, matlab=matlab)
    if not axes or not (parts or dtype.kind in "bfciu"):
        return None
    if parts or "parts" in axes:
        dtype = complex_dtype(dtype[0] if parts else dtype)
    wanted = [axis for axis in (*AXES.split(",")[1:], "parts") if axis in axes]
    of_slice = [axis for axis in axes if axis != "slices"]
    sizes = dict(zip(axes, shape, strict=True))
    order, shifted = tuple(map(of_slice.index, wanted)), kspace and storage.shifted
    return Arranged(
        (sizes.get("slices", 1), *(sizes[axis] for axis in wanted if axis != "parts")),
        dtype,
        axes.index("slices") if "slices" in axes else None,
        Arrangement(order, parts, dtype, shifted, slice(None)),
    )


def name_axes(shape: Sequence[int], kind: str, storage: Storage, *, coils: bool, matlab: bool) -> list[str]:
    """Name the stored axes of an array of a dtype's kind; [] if there are too few or too many.

    A real array whose last axis has length 2 holds complex numbers (the axis `parts`). MATLAB writes axes in reverse.
    """
    order = storage.axes.split(",")
    shown = list(shape[::-1] if matlab else shape)
    pairs = ["parts"] if kind in "fiu" and len(shown) > 2 and shown[-1] == 2 else []
    forms = [order, [axis for axis in order if axis != "coils"]][0 if coils else 1 :]
    forms += [] if coils else [[axis for axis in order if axis in ("height", "width")]]
    names = next((form for form in forms if len(form) == len(shown) - len(pairs)), None)
    named = [] if names is None else names + pairs
    return named[::-1] if matlab else named


def complex_parts(dtype: np.dtype) -> tuple[str, ...]:
    """Return the names of real and imaginary part of a compound of two real numbers; () if it is none."""
    names = dtype.names or ()
    if len(names) != 2 or any(dtype[name].kind not in "fiu" or dtype[name].shape for name in names):
        return ()
    first, second = (name.lower() for name in names)
    return names[::-1] if first.startswith("i") and not second.startswith("i") else names


def complex_dtype(real: np.dtype) -> np.dtype:
    """Return complex128 for float64 and longer integers, else complex64."""
    return np.result_type(real, np.complex64)


def parallel_file(path: str, *, of_target: bool = False) -> str | None:
    """Return the file or folder with the target of this one, or the reverse; None if there is none.

    It has the same name in a parallel folder, or is `<name>_target` beside `<name>_input`, of the same suffix.
    """
    name, parts = stem(path), Path(path).parts
    old, new = PAIRED_NAMES[::-1] if of_target else PAIRED_NAMES
    if name.endswith(old):
        other = Path(path).with_name(name.removesuffix(old) + new + parts[-1].removeprefix(name))
        if other.is_file():
            return str(other)
    for pair in PARALLEL_FOLDERS:
        old, new = pair[::-1] if of_target else pair
        if old in parts[:-1]:
            place = len(parts) - 2 - parts[-2::-1].index(old)
            other = Path(*parts[:place], new, *parts[place + 1 :])
            if other.exists():
                return str(other)
    return None
