"""The .t5 file: an HDF5 file holding one volume. Read, write, describe and check it.

Layouts (what counts is the contents, not whether the name ends in .t5, .h5 or .hdf5):
  kspace: `kspace` complex (slices, [coils,] height, width), maybe with an image of it as `reconstruction_rss`,
          `reconstruction_esc` or `target` (slices, height, width) and a `mask` (width,) if it is undersampled
          (or is to be, in training with config.acquisition.mask = 'stored')
  paired: `input` and `target`, real or complex (slices, height, width)
  result: `reconstruction` (slices, height, width) float32, what mrjax.reconstruct writes
Attributes follow fastMRI: `max`, `norm`, `acquisition`, `patient_id`.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mrjax.data.layout import Layout, layout_of
from mrjax.errors import UserError
from mrjax.mri.fourier import centred_ifft2_host

SUFFIXES = (".t5", ".h5", ".hdf5")
IMAGES = ("reconstruction_rss", "reconstruction_esc", "target")
_CONTRAST = re.compile(r"_(T1|T2|FLAIR|GRE)\d\d$")


@dataclasses.dataclass(frozen=True)
class Volume:
    """What a file holds: from its headers (`describe`), and what only its samples tell (`check`).

    Attributes:
      path: the file.
      layout: 'kspace', 'paired' or 'result'.
      shape: (slices, coils, height, width) for k-space, (slices, height, width) otherwise.
      dtype: of `kspace`, `input` or `reconstruction`.
      contrast: the attribute `acquisition`, else what an M4Raw name says, else 'unknown'.
      target: name of the data set with the true image, None where there is none.
      target_shape: (slices, height, width) of it.
      maximum: the attribute `max` in the file's units; else, once checked, that of its true image; else None.
      stored_mask: the sampled columns, (width,) of bool, where the file stores a `mask`.
      undersampled: whether it does, or `check` found columns left out.
      layouts: where the slices of its data and of its true image lie in the file, by name of the data set; None where
        HDF5 has to find or decode them.
      empty: slices whose samples are all zero; only `check` finds them.
      others: files of the other repetitions of this scan, where a task asks for them (see `repetitions`).
    """

    path: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    contrast: str
    target: str | None
    target_shape: tuple[int, ...] | None
    maximum: float | None
    stored_mask: tuple[bool, ...] | None
    undersampled: bool
    layouts: tuple[tuple[str, Layout | None], ...] = ()
    empty: tuple[int, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name without folder and suffix."""
        return Path(self.path).stem

    @property
    def slices(self) -> int:
        """Number of slices."""
        return self.shape[0]

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
        """(height, width) of the images of this volume: of the true image if stored, else of the data."""
        height, width = (self.target_shape or self.shape)[-2:]
        return height, width

    @property
    def data(self) -> str:
        """Name of the data set that a reconstruction starts from."""
        return {"kspace": "kspace", "paired": "input", "result": "reconstruction"}[self.layout]


def find(where: str | Iterable[str]) -> list[str]:
    """The .t5, .h5 and .hdf5 files of a folder (with its subfolders), a glob, a file, or a list of these; sorted.

    Raises:
      UserError: nothing there.
    """
    if not isinstance(where, str):
        return sorted({path for one in where for path in find(str(one))})
    if os.path.isdir(where):
        paths = [str(path) for path in Path(where).rglob("*") if path.suffix.lower() in SUFFIXES]
    elif os.path.exists(where):
        return [where]
    else:
        paths = [path for path in glob.glob(where, recursive=True) if os.path.isfile(path)]
    paths = [path for path in paths if not Path(path).name.startswith(".")]
    if not paths:
        what = "no .t5, .h5 or .hdf5 file in it" if os.path.isdir(where) else "no such file or folder"
        raise UserError(f"{where}: {what}, expected a file, a folder of them or a glob")
    return sorted(paths)


def open_file(path: str) -> h5py.File:
    """Opens a file for reading; a file that cannot be read is a `UserError` saying why."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if not os.path.exists(path):
            reason = "no such file"
        elif os.path.isdir(path):
            reason = "is a folder, expected an HDF5 file"
        elif os.path.getsize(path) == 0:
            reason = "is empty, expected an HDF5 file"
        elif "truncated" in str(error):
            reason = f"is truncated ({os.path.getsize(path)} bytes are left), expected a whole HDF5 file; copy it again"
        elif "signature" in str(error):
            reason = "is not an HDF5 file, expected one with `kspace`, or with `input` and `target`"
        else:
            reason = f"cannot be opened as HDF5 ({error})"
        raise UserError(f"{path}: {reason}") from error


def describe(path: str, layout: str | None = None) -> Volume:
    """Reads the headers of a file.

    Args:
      path: the file.
      layout: 'kspace' or 'paired' where one is needed; by default the first that the file has.

    Raises:
      UserError: not HDF5, truncated, or a data set missing or misshapen.
    """
    with open_file(path) as file:
        try:
            return _describe(path, file, layout)
        except UserError:
            raise
        except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is damaged ({error}), expected readable data sets and attributes") from error


def _describe(path: str, file: h5py.File, layout: str | None) -> Volume:
    names = {name for name, item in file.items() if isinstance(item, h5py.Dataset)}
    layouts = {"kspace": "kspace", "paired": "input", "result": "reconstruction"}
    if layout is None:
        layout = next((one for one, needs in layouts.items() if needs in names), None)
        if layout is None:
            raise UserError(f"{path}: has no data set `kspace` nor `input`, found: {_listed(names)}")
    elif layouts[layout] not in names:
        raise UserError(f"{path}: has no data set `{layouts[layout]}`, found: {_listed(names)}")
    data = file[layouts[layout]]
    shape, dtype = data.shape, data.dtype
    if layout == "kspace":
        if dtype.kind != "c":
            raise UserError(f"{path}: `kspace` is {dtype}, expected complex numbers")
        if len(shape) not in (3, 4):
            raise UserError(f"{path}: `kspace` has shape {shape}, expected (slices, coils, height, width)")
        shape = (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape
    else:
        if dtype.kind not in "fciu":
            raise UserError(f"{path}: `{layouts[layout]}` is {dtype}, expected numbers")
        if len(shape) != 3:
            raise UserError(f"{path}: `{layouts[layout]}` has shape {shape}, expected (slices, height, width)")
    if 0 in shape:
        raise UserError(f"{path}: `{layouts[layout]}` has shape {shape}, expected at least one sample along each axis")

    candidates = {"kspace": IMAGES, "paired": ("target",), "result": ()}[layout]
    target = next((name for name in candidates if name in names), None)
    target_shape = file[target].shape if target else None
    if target_shape is not None:
        where = f"{path}: `{target}` has shape {target_shape}"
        if len(target_shape) != 3 or target_shape[0] != shape[0]:
            raise UserError(
                f"{where}, expected (slices, height, width) with the {shape[0]} slices of `{data.name[1:]}`"
            )
        if layout == "paired" and target_shape != shape:
            raise UserError(f"{where}, expected {shape}, the shape of `input`")
        if file[target].dtype.kind not in "fciu":
            raise UserError(f"{path}: `{target}` is {file[target].dtype}, expected numbers")
    undersampled = layout == "kspace" and "mask" in names
    if undersampled and file["mask"].size != shape[-1]:
        raise UserError(f"{path}: `mask` has shape {file['mask'].shape}, expected ({shape[-1]},), a value per column")

    stored_mask = tuple(bool(kept == kept and kept) for kept in file["mask"][()].reshape(-1)) if undersampled else None
    if stored_mask and not any(stored_mask):
        raise UserError(f"{path}: `mask` keeps no column, expected at least one that is not zero")

    maximum = file.attrs.get("max")
    match = _CONTRAST.search(Path(path).stem)
    acquisition = file.attrs.get("acquisition", match.group(1) if match else "unknown")
    return Volume(
        path=path,
        layout=layout,
        shape=tuple(int(n) for n in shape),
        dtype=str(dtype),
        contrast=acquisition.decode() if isinstance(acquisition, bytes) else str(acquisition),
        target=target,
        target_shape=target_shape,
        maximum=None if maximum is None else float(np.asarray(maximum).reshape(-1)[0]),
        stored_mask=stored_mask,
        undersampled=undersampled,
        layouts=tuple((name, layout_of(file[name])) for name in (layouts[layout], target) if name),
    )


def check(volume: Volume) -> tuple[Volume, list[str]]:
    """Reads every sample of a described file.

    Returns:
      The volume with what only the samples tell: its empty slices, whether k-space has columns left out (also without a
      stored mask), and its maximum: of the stored true image where the attribute is missing, unknown where that image
      is not in the units of the k-space; and a sentence for each fault but empty slices
      (see `empty_slices`): NaN or Inf, a true image that is not of this k-space, a file that ends too soon.
    """
    faults, empty, largest = [], [], 0.0
    with open_file(volume.path) as file:
        names = [volume.data, *([volume.target] if volume.target else [])]
        try:
            for name in names:
                bad = []
                for i in range(volume.slices):
                    data = file[name][i]
                    # In float64 a sum of finite float32 cannot overflow, and one NaN or Inf shows in it.
                    if not np.isfinite(data.sum(dtype=np.complex128 if data.dtype.kind == "c" else np.float64)):
                        bad.append(i)
                    elif not data.any() and i not in empty:
                        empty.append(i)
                    if name == volume.target:
                        largest = max(largest, float(np.abs(np.nan_to_num(data)).max()))
                if bad:
                    faults.append(
                        f"{volume.path}: `{name}` holds NaN or Inf in {_slices(bad)}, expected finite numbers"
                    )
        except (OSError, RuntimeError) as error:
            return volume, [*faults, f"{volume.path}: cannot be read to its end ({error}), expected a whole file"]
        undersampled = volume.undersampled
        maximum = largest if volume.target and volume.maximum is None else volume.maximum
        if not faults and volume.layout == "kspace":
            filled = [i for i in range(volume.slices) if i not in empty]
            some = {filled[0], filled[len(filled) // 2]} if filled else set()
            undersampled |= any(has_gaps(sampled_columns(file["kspace"][i])) for i in some)
            if some and volume.target and not undersampled:
                agreement, ratio = max(_compare(file["kspace"][i], file[volume.target][i]) for i in some)
                if not 0.5 < ratio < 2:
                    # The image was scaled on the way: its maximum says nothing of this k-space's.
                    maximum = None
                if agreement < 0.5:
                    faults.append(
                        f"{volume.path}: `{volume.target}` is not an image of `kspace` (correlation {agreement:.2f}), "
                        "expected the root-sum-of-squares of its coils"
                    )
    return dataclasses.replace(volume, maximum=maximum, empty=tuple(sorted(empty)), undersampled=undersampled), faults


def empty_slices(volume: Volume) -> list[str]:
    """The fault that a checked volume has slices of nothing but zeros, if it has."""
    if not volume.empty:
        return []
    return [f"{volume.path}: nothing but zeros in {_slices(volume.empty)}, expected an image in every slice"]


def sampled_columns(kspace: np.ndarray) -> np.ndarray:
    """(..., height, width) -> (width,) bool: the columns that hold anything but zeros."""
    return np.any(kspace.reshape(-1, kspace.shape[-1]), axis=0)


def has_gaps(columns: np.ndarray) -> bool:
    """Whether columns are missing between sampled ones; missing edges are how a scanner zero-pads, and are no gap."""
    inside = np.flatnonzero(columns)
    return inside.size > 0 and inside.size < inside[-1] - inside[0] + 1


def _compare(kspace: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    """Compares |image| with the root-sum-of-squares of k-space, over the centre that both cover.

    Returns:
      Their Pearson correlation, which survives the scaling, crops and filters of real pipelines, while an image of
      something else does not; and the ratio of their norms.
    """
    coils = centred_ifft2_host(kspace.reshape(-1, *kspace.shape[-2:]))
    rss = np.sqrt((np.abs(coils) ** 2).sum(0))
    size = [min(pair) for pair in zip(rss.shape, image.shape, strict=True)]
    one, other = (
        np.abs(x)[tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(x.shape, size, strict=True))].ravel()
        for x in (rss, image)
    )
    spread = float(one.std() * other.std())
    correlation = float(((one - one.mean()) * (other - other.mean())).mean() / spread) if spread else 1.0
    return correlation, float(np.linalg.norm(other) / max(np.linalg.norm(one), np.finfo(np.float32).tiny))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "no data set at all"


def _slices(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"slice{'s' if len(numbers) > 1 else ''} {shown}"


def read(path: str, name: str) -> np.ndarray:
    """A whole data set, as stored."""
    with open_file(path) as file:
        return file[name][()]


def write(path: str | os.PathLike[str], arrays: dict[str, Any], attributes: dict[str, Any] | None = None) -> None:
    """Writes a volume: uncompressed, one chunk a slice; beside its place first, then renamed into it.

    Args:
      path: the file; its folder is made if need be.
      arrays: data sets by name; those of three or more axes are chunked by slice, a str is written as text.
      attributes: of the file, e.g. `max`, `norm`, `acquisition`, `patient_id`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(part, "w") as file:
            for name, data in arrays.items():
                by_slice = isinstance(data, np.ndarray) and data.ndim >= 3
                file.create_dataset(name, data=data, chunks=(1, *data.shape[1:]) if by_slice else None)
            file.attrs.update(attributes or {})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
