"""Scans in memory: arrays checked as files are, and cut into batches for a network."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from mrjax.data.buffers import Batch
from mrjax.data.checks import LARGEST
from mrjax.errors import expect
from mrjax.io.volume import shape_mask


def stack_kspace(kspace: ArrayLike, mask: ArrayLike | None) -> np.ndarray:
    """Return k-space, ([slices,] coils, height, width) complex, as (slices, coils, height, width) complex64.

    What `mask`, bool (width,) or (height, width) or either with an axis of slices before it, says was not measured is
    zero. Raises `UserError` for another shape or dtype, and for NaN or Inf.
    """
    array = np.asarray(kspace)
    expect(array.dtype.kind == "c", f"the k-space is {array.dtype}", "complex numbers")
    forms = "(coils, height, width) or (slices, coils, height, width); that of one coil is kspace[None]"
    stack = _stack("k-space", array, 3, forms).astype(np.complex64, copy=False)
    if mask is None:
        return stack
    mask = np.asarray(mask)
    expect(mask.dtype == bool, f"the mask is {mask.dtype}", "bool: True where k-space was measured")
    return np.where(shape_mask("the mask", mask, stack.shape)[:, None], stack, 0)


def stack_images(images: ArrayLike) -> np.ndarray:
    """Return images, ([slices,] height, width) real or complex, as magnitudes (slices, height, width) float32.

    Real ones keep their sign. Raises `UserError` for another shape or dtype, and for NaN or Inf.
    """
    array = np.asarray(images)
    expect(array.dtype.kind in "fciu", f"the image is {array.dtype}", "numbers")
    stack = _stack("image", array, 2, "(height, width) or (slices, height, width)")
    return (np.abs(stack) if stack.dtype.kind == "c" else stack).astype(np.float32)


def _stack(label: str, array: np.ndarray, axes: int, forms: str) -> np.ndarray:
    expect(array.ndim in (axes, axes + 1) and array.size, f"the {label} has shape {array.shape}", forms)
    largest = np.abs(array).max()
    expect(largest <= LARGEST, f"the {label} holds {largest:.3g}", f"finite numbers of at most {LARGEST:g}")
    return array if array.ndim > axes else array[None]


def batches(name: str, stack: np.ndarray, size: int, adjacent_slices: int, maximum: float) -> Iterator[Batch]:
    """Yield batches of so many slices of `kspace` or `input` as those of a `SliceDataset`, the last slice repeated."""
    offsets = np.array([0, *range(-adjacent_slices, 0), *range(1, adjacent_slices + 1)])
    for start in range(0, len(stack), size):
        number = np.minimum(np.arange(start, start + size, dtype=np.int32), len(stack) - 1)
        slices = np.clip(number[:, None] + offsets, 0, len(stack) - 1) if adjacent_slices else number
        labels = {"name": np.zeros(size, np.uint32), "maximum": np.full(size, maximum, np.float32)}
        yield {name: stack[slices], "slice": number, **labels}
