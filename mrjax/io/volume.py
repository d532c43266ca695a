"""Volumes: what a file's headers tell of one, and the protocol by which a file format is read and written."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mrjax.errors import UserError, expect, printable
from mrjax.io.files import stem
from mrjax.io.storage import NATIVE, Storage

# What a reconstruction starts from, by layout. A file that has several is of the first layout.
DATA_NAMES = {"kspace": "kspace", "paired": "input", "image": "reconstruction"}
TARGET_NAMES = {"kspace": ("reconstruction_rss", "reconstruction_esc", "target"), "paired": ("target",), "image": ()}
_NAMED_CONTRAST = re.compile(r"_(T1|T2|PD|FLAIR|GRE)(\d\d|w)?$")  # M4Raw's `_T101` and BIDS's `_T1w`
# M4Raw's study before `_T101`, BIDS's `sub-01`, and fastMRI's whole name, for a scan of its own
_NAMED_SUBJECT = re.compile(r".+(?=_(T1|T2|PD|FLAIR|GRE)\d\d$)|sub-[^_]+(?=_)|file(_.+_)?\d{7}$")


def _expect_array(label: str, array: Any, kinds: str, fits: bool, shape: str) -> None:
    expect(array.dtype.kind in kinds, f"{label} is {array.dtype}", "complex numbers" if kinds == "c" else "numbers")
    expect(fits, f"{label} has shape {tuple(array.shape)}", shape)


@dataclasses.dataclass(frozen=True)
class Volume:
    """What the headers of a file tell of its volume, and after `checks.check` what only its samples tell."""

    path: str
    layout: str  # 'kspace', 'paired' or 'image'
    data: str  # name of the array that a reconstruction starts from
    shape: tuple[int, ...]  # (slices, coils, height, width) of k-space, (slices, height, width) of images
    dtype: str
    contrast: str  # the attribute `acquisition`, else from the file's name, else 'unknown'
    target: str | None  # name of the array with the target image
    target_shape: tuple[int, ...] | None  # (slices, height, width)
    maximum: float | None  # the attribute `max` in the file's units, else, after a check, that of the target image
    # (1 or slices, 1 or height, width) bool, which samples were measured, if the file stores a `mask`
    stored_mask: np.ndarray | None = dataclasses.field(compare=False)
    undersampled: bool  # whether it stores one, or the check found samples left out
    empty: tuple[int, ...] = ()  # slices of zeros, found by the check
    repetitions: tuple[str, ...] = ()  # files of the other repetitions of this scan
    # (4, 4) float64 from (column, row, slice, 1) to millimetres towards right, front and up, as NIfTI's; None: unknown
    affine: np.ndarray | None = dataclasses.field(default=None, compare=False)
    alias: str = ""  # what results go by instead of the file's name, which may be the patient's
    simulated: bool = False  # whether k-space is computed from images, of which the phase and the coils are invented
    subject: str = ""  # who was scanned, by the attribute `patient_id`, else by the file's name; '' if neither tells
    files: tuple[str, ...] = ()  # those that hold its arrays, if not `path` alone

    @property
    def name(self) -> str:
        """The alias, or else the file's name without folder and suffix."""
        return self.alias or stem(self.path)

    @property
    def slices(self) -> int:
        """Number of slices."""
        return self.shape[0]

    @property
    def full_slices(self) -> list[int]:
        """The slices that are not empty."""
        return sorted(set(range(self.slices)) - set(self.empty))

    def mask_of_slice(self, i: int) -> np.ndarray | None:
        """Return the stored mask of a slice, (1 or height, width) bool; None if the file stores none."""
        return None if self.stored_mask is None else self.stored_mask[min(i, len(self.stored_mask) - 1)]

    @property
    def coils(self) -> int:
        """Number of receive coils, 1 for images."""
        return self.shape[1] if self.layout == "kspace" else 1

    @property
    def data_shape(self) -> tuple[int, int]:
        """(height, width) of the k-space or images."""
        return self.shape[-2], self.shape[-1]

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the target image if there is one, else of the data."""
        height, width = (self.target_shape or self.shape)[-2:]
        return height, width


class Reader(Protocol):
    """A file format. A new one is a class like this and a line in `readers.READERS`; it is pickled to worker processes.

    `suffixes` are those that its files or folders usually have, in lower case; what decides is `recognises`.
    """

    suffixes: tuple[str, ...]
    image_suffix: str  # of the file or folder that `write` makes of images; '' for a format that is only read

    def recognises(self, path: str, start: bytes) -> bool:
        """Tell whether a file or folder is of this format, by its first 512 bytes (none of a folder)."""

    def group(self, paths: list[str]) -> list[str]:
        """Return a path for each volume that files of this format, all in one folder, hold."""

    def describe(self, path: str, layout: str | None = None, storage: Storage = NATIVE) -> Volume:
        """Read the headers of a file (see `describe_arrays`); raises `UserError` if it cannot be used."""

    def read_slice(self, path: str, name: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read a slice ([coils,] height, width) of an array, from any thread; raises `UserError` if it cannot be read.

        The file is unchanged since it was described, and stored as it was described to be. `out` is C-contiguous memory
        that may be read into and returned, if its shape and dtype are those of the slice.
        """

    def write(
        self,
        path: Path,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, Any],
        source: Volume,
        keep_identity: bool = False,
    ) -> None:
        """Write a volume whose scan is `source`: complete or not at all, in the place of what was there.

        Its geometry is that of `source`, and where `source` is of this format, so is the rest of the header. Arrays go
        by `DATA_NAMES`, (slices, [coils,] height, width); formats of images write `reconstruction` alone. Attributes
        such as `max` are written where the format has a place for them. What identifies the patient
        is left out unless `keep_identity`. Raises `UserError` for what cannot be written.
        """


def describe_arrays(
    path: str,
    arrays: Mapping[str, Any],
    attributes: Mapping[str, Any],
    layout: str | None = None,
    storage: Storage = NATIVE,
) -> Volume:
    """Describe a volume by its arrays, with `shape` and `dtype`, and by its attributes.

    These are `max`, `acquisition`, `patient_id` and `affine`, all optional.
    `layout` is 'kspace' or 'paired' if one is needed; by default the first that the file has. The arrays go by the
    names of `storage`, their axes are in order. Raises `UserError` if an array is missing, or its shape or dtype is not
    that of the layout.
    """
    names = DATA_NAMES | {"kspace": storage.kspace, "paired": storage.input}
    layout = layout or next((one for one, name in names.items() if name in arrays), None)
    if layout is None or names[layout] not in arrays:
        needed = f"{names['kspace']}` nor `{names['paired']}" if layout is None else names[layout]
        found = ", ".join(f"`{name}`" for name in sorted(arrays)) or "no data set at all"
        raise UserError(f"{path}: has no data set `{needed}`, found: {found} (config.data.names.kspace=NAME tells)")
    name, kspace = names[layout], layout == "kspace"
    label, shape = f"{path}: `{name}`", tuple(map(int, arrays[name].shape))
    if kspace:
        _expect_array(label, arrays[name], "c", len(shape) in (3, 4), "(slices, coils, height, width)")
        shape = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    else:
        _expect_array(label, arrays[name], "fciu", len(shape) == 3, "(slices, height, width)")
    expect(0 not in shape, f"{label} has shape {shape}", "at least one sample along each axis")
    candidates = (storage.target,) if storage.target else TARGET_NAMES[layout]
    target = next((one for one in candidates if one in arrays), None)
    if target:
        size = tuple(arrays[target].shape)
        fits = len(size) == 3 and size[0] == shape[0] if kspace else size == shape
        slices = f"(slices, height, width) with the {shape[0]} slices of `kspace`"
        expected = slices if kspace else f"{shape}, the shape of `input`"
        _expect_array(f"{path}: `{target}`", arrays[target], "fciu", fits, expected)
    stored_mask = None
    if kspace and (mask := arrays.get(storage.mask)) is not None:
        stored_mask = shape_mask(f"{path}: `{storage.mask}`", np.nan_to_num(mask) != 0, shape)  # NaN keeps nothing
        stored_mask = np.fft.fftshift(stored_mask, (1, 2)) if storage.shifted else stored_mask
    maximum = attributes.get("max")
    named = _NAMED_CONTRAST.search(stem(path))
    contrast = _text(attributes.get("acquisition", named.group(1) if named else "unknown"))
    named = _NAMED_SUBJECT.match(stem(path))
    return Volume(
        path=path,
        layout=layout,
        data=name,
        shape=shape,
        dtype=str(arrays[name].dtype),
        contrast=printable(contrast)[:64],
        target=target,
        target_shape=arrays[target].shape if target else None,
        maximum=None if maximum is None else float(np.ravel(maximum)[0]),
        stored_mask=stored_mask,
        undersampled=stored_mask is not None,
        affine=_read_affine(path, attributes),
        subject=_text(attributes.get("patient_id", "")) or (named.group() if named else ""),
    )


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _read_affine(path: str, attributes: Mapping[str, Any]) -> np.ndarray | None:
    if (affine := attributes.get("affine")) is None:
        return None
    affine = np.asarray(affine)
    fits = affine.shape == (4, 4) and affine.dtype.kind in "fiu" and np.isfinite(affine).all()
    expect(fits, f"{path}: its attribute affine is {affine.dtype} of shape {affine.shape}", "finite numbers (4, 4)")
    return affine.astype(np.float64)


def shape_mask(label: str, mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bring a mask to (1 or slices, 1 or height, width), for k-space of this shape."""
    slices, _, height, width = shape
    forms: dict[tuple[int, ...], tuple[int, int, int]] = {(width,): (1, 1, width), (slices, width): (slices, 1, width)}
    forms |= {(height, width): (1, height, width), (slices, height, width): (slices, height, width)}
    form = forms.get(tuple(size for size in mask.shape if size > 1))
    kinds = f"({width},), a value per column, or ({height}, {width}), either with an axis of {slices} slices before it"
    expect(form is not None, f"{label} has shape {mask.shape}", kinds)
    expect(mask.any(), f"{label} keeps no sample", "at least one that is not zero")
    return mask.reshape(form)
