"""What is wrong with the samples of a file."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mrjax.data.readers import reader_for
from mrjax.data.resize import crop_or_pad
from mrjax.data.volume import Volume
from mrjax.errors import UserError
from mrjax.mri.fourier import centred_ifft2_host


def check(volume: Volume) -> tuple[Volume, list[str]]:
    """Read every sample of a volume.

    Returns:
      The volume with what only its samples tell: `empty` slices; whether it is `undersampled`, also without a stored
      mask; and its `maximum`, that of the target image if the attribute is missing, None if that image is not in the
      units of the k-space.
      A sentence for each fault: NaN or Inf, a target image that is not of this k-space, a file that ends too soon.
      Empty slices are left to `describe_empty_slices`.
    """
    faults: list[str] = []
    empty: set[int] = set()
    largest = 0.0
    reader = reader_for(volume.path)
    for name in filter(None, (volume.data, volume.target)):
        not_finite = []
        for i in range(volume.slices):
            try:
                data = reader.read_slice(volume.path, name, i)
            except UserError as error:
                return volume, [*faults, f"{error}, expected a whole file"]
            # In float64 a sum of finite float32 cannot overflow, and one NaN or Inf shows in it.
            if not np.isfinite(data.sum(dtype=np.complex128 if data.dtype.kind == "c" else np.float64)):
                not_finite.append(i)
            elif not data.any():
                empty.add(i)
            if name == volume.target:
                largest = max(largest, float(np.abs(np.nan_to_num(data)).max()))
        if not_finite:
            faults.append(f"{volume.path}: `{name}` holds NaN or Inf in {_list(not_finite)}, expected finite numbers")
    if volume.target and volume.maximum is None:
        volume = dataclasses.replace(volume, maximum=largest)
    volume = dataclasses.replace(volume, empty=tuple(sorted(empty)))
    if volume.layout == "kspace" and not faults:
        return _check_kspace(volume)
    return volume, faults


def _check_kspace(volume: Volume) -> tuple[Volume, list[str]]:
    """Look for missing columns, and compare the target image with k-space, in the first and the middle full slice."""
    reader = reader_for(volume.path)
    full = [i for i in range(volume.slices) if i not in volume.empty]
    if not full:
        return volume, []
    probes = sorted({full[0], full[len(full) // 2]})
    kspace = [reader.read_slice(volume.path, "kspace", i) for i in probes]
    undersampled = volume.undersampled or any(has_gaps(sampled_columns(data)) for data in kspace)
    volume = dataclasses.replace(volume, undersampled=undersampled)
    if not volume.target or undersampled:
        return volume, []
    images = [reader.read_slice(volume.path, volume.target, i) for i in probes]
    correlation, ratio = max(map(_compare, kspace, images))
    if not 0.5 < ratio < 2:  # The image was scaled: its maximum says nothing about this k-space.
        volume = dataclasses.replace(volume, maximum=None)
    if correlation >= 0.5:
        return volume, []
    return volume, [
        f"{volume.path}: `{volume.target}` is not an image of `kspace` (correlation {correlation:.2f}), expected the "
        "root-sum-of-squares of its coils"
    ]


def describe_empty_slices(volume: Volume) -> list[str]:
    """Return a sentence about the empty slices of a checked volume, if it has any."""
    if not volume.empty:
        return []
    return [f"{volume.path}: nothing but zeros in {_list(volume.empty)}, expected an image in every slice"]


def sampled_columns(kspace: np.ndarray) -> np.ndarray:
    """Find the columns of k-space (..., height, width) that are not all zero: (width,) bool."""
    return np.any(kspace.reshape(-1, kspace.shape[-1]), axis=0)


def has_gaps(columns: np.ndarray) -> bool:
    """Tell whether columns are missing between sampled ones; missing edges are zero-padding by the scanner."""
    sampled = np.flatnonzero(columns)
    return sampled.size > 0 and sampled.size < sampled[-1] - sampled[0] + 1


def _compare(kspace: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    """Compare |image| with the root-sum-of-squares of k-space, in the centre that both cover.

    Returns:
      Their Pearson correlation, which survives the scaling, cropping and filtering of real pipelines, but not an image
      of something else; and the ratio of their norms.
    """
    coils = centred_ifft2_host(kspace.reshape(-1, *kspace.shape[-2:]))
    rss = np.sqrt((np.abs(coils) ** 2).sum(0))
    height, width = (min(pair) for pair in zip(rss.shape, image.shape, strict=True))
    rss, image = (crop_or_pad(x, (height, width)).ravel() for x in (rss, np.abs(image)))
    spread = float(rss.std() * image.std())
    correlation = float(((rss - rss.mean()) * (image - image.mean())).mean() / spread) if spread else 1.0
    return correlation, float(np.linalg.norm(image) / max(np.linalg.norm(rss), np.finfo(np.float32).tiny))


def _list(slices: Sequence[int]) -> str:
    shown = ", ".join(map(str, slices[:8])) + (", ..." if len(slices) > 8 else "")
    return f"slice{'s' if len(slices) > 1 else ''} {shown}"
