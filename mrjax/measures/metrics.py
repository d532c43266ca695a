"""NMSE, PSNR and SSIM of whole volumes, as fastMRI's `evaluate.py` defines them, in float32 on the device.

The data range is the maximum of the target VOLUME. fastMRI's validation during training uses the `max` attribute of
the file instead, and slice-wise ranges are common elsewhere: all three give different numbers.

Identical volumes have NMSE 0, PSNR inf and SSIM 1. A target of zeros has no range, and what comes out is what fastMRI
gives: NMSE inf, PSNR -inf, SSIM 0 where the prediction varies; NaN wherever the prediction is zero, too.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mrjax.errors import UserError

WINDOW = 7
K1, K2 = 0.01, 0.03


def nmse(target: ArrayLike, prediction: ArrayLike) -> Array:
    """Normalised mean squared error |target - prediction|^2 / |target|^2 over the volume.

    Args:
        target: real (slices, height, width).
        prediction: the same shape.

    Returns:
        A float32 scalar.

    Raises:
        UserError: complex volumes, or shapes that differ.
    """
    target, prediction = _volumes(target, prediction)
    return _energy(target - prediction).sum() / _energy(target).sum()


def psnr(target: ArrayLike, prediction: ArrayLike) -> Array:
    """Peak signal-to-noise ratio 10 log10(range^2 / mean squared error) over the volume, in dB.

    Args:
        target: real (slices, height, width); its maximum is the range.
        prediction: the same shape.

    Returns:
        A float32 scalar.

    Raises:
        UserError: complex volumes, or shapes that differ.
    """
    target, prediction = _volumes(target, prediction)
    mean_squared_error = _energy(target - prediction).sum() / target.size
    return 10 * jnp.log10(jnp.square(target.max()) / mean_squared_error)


def ssim(target: ArrayLike, prediction: ArrayLike) -> Array:
    """Structural similarity, the mean of `ssim_slices` with the maximum of the target volume as the range.

    Args:
        target: real (slices, height, width).
        prediction: the same shape.

    Returns:
        A float32 scalar.

    Raises:
        UserError: complex volumes, shapes that differ, or slices smaller than 7x7.
    """
    return ssim_slices(target, prediction, jnp.max(target)).mean()


def ssim_slices(target: ArrayLike, prediction: ArrayLike, data_range: ArrayLike) -> Array:
    """Structural similarity of each slice with scikit-image's defaults.

    Wang et al., IEEE Trans. Image Process. 13 (2004) 600, eq. 13, with a uniform 7x7 window, sample covariances,
    K1 = 0.01, K2 = 0.03, averaged over the pixels whose window lies inside the slice.

    Args:
        target: real (slices, height, width); the slices may belong to different volumes.
        prediction: the same shape.
        data_range: scalar or (slices,), in the unit of the target.

    Returns:
        float32 (slices,).

    Raises:
        UserError: complex volumes, shapes that differ, or slices smaller than 7x7.
    """
    x, y = _volumes(target, prediction)
    if min(x.shape[1:]) < WINDOW:
        raise UserError(f"SSIM needs slices of at least {WINDOW}x{WINDOW} pixels, found {x.shape[1]}x{x.shape[2]}.")
    data_range = jnp.broadcast_to(jnp.asarray(data_range, jnp.float32), x.shape[:1])[:, None, None]

    # Ranges run from 1e-8 to 1e4 and enter to the fourth power, so work in units of the range.
    scale = jnp.where(data_range == 0, 1, data_range)
    c1, c2 = jnp.square(K1 * data_range / scale), jnp.square(K2 * data_range / scale)
    x, y = x / scale, y / scale
    # E[x^2] - E[x]^2 loses float32's digits to cancellation, so sum squares of deviations: first within the rows of a
    # window, then between its rows (Chan, Golub and LeVeque, The American Statistician 37 (1983) 242).
    row_x, row_y, within = _deviations(x, y, axis=2)
    mean_x, mean_y, between = _deviations(row_x, row_y, axis=1)
    var_x, var_y, covariance = (
        (_window_sum(w, axis=1) + WINDOW * b) / (WINDOW**2 - 1) for w, b in zip(within, between, strict=True)
    )
    luminance = (2 * mean_x * mean_y + c1) / (jnp.square(mean_x) + jnp.square(mean_y) + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2))


def slice_sums(target: ArrayLike, prediction: ArrayLike, data_range: ArrayLike) -> dict[str, Array]:
    """What each slice adds to the metrics of its volume; `combine` makes them whole.

    Args:
        target: real (slices, height, width); the slices may belong to different volumes.
        prediction: the same shape.
        data_range: scalar or (slices,), the maximum of the target volume that a slice belongs to.

    Returns:
        float32 (slices,) arrays: 'squared_error' and 'squared_target', sums over pixels, and 'ssim'.

    Raises:
        UserError: complex volumes, shapes that differ, or slices smaller than 7x7.
    """
    target, prediction = _volumes(target, prediction)
    return {
        "squared_error": _energy(target - prediction),
        "squared_target": _energy(target),
        "ssim": ssim_slices(target, prediction, data_range),
    }


def combine(sums: Mapping[str, ArrayLike], pixels: int, data_range: float) -> dict[str, float]:
    """Metrics of one volume from the `slice_sums` of its slices, in float64 on the host.

    Args:
        sums: 'squared_error', 'squared_target' and 'ssim', each (slices,).
        pixels: the number of pixels of ONE slice.
        data_range: the maximum of the target volume.

    Returns:
        'nmse', 'psnr' in dB, and 'ssim'.
    """
    error, energy, similarity = (np.asarray(sums[k], np.float64) for k in ("squared_error", "squared_target", "ssim"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "nmse": float(error.sum() / energy.sum()),
            "psnr": float(10 * np.log10(np.square(np.float64(data_range)) / (error.sum() / (error.size * pixels)))),
            "ssim": float(similarity.mean()),
        }


def _volumes(target: ArrayLike, prediction: ArrayLike) -> tuple[Array, Array]:
    shapes = jnp.shape(target), jnp.shape(prediction)
    if shapes[0] != shapes[1] or len(shapes[0]) != 3:
        raise UserError(
            "Metrics need a target and a prediction of one shape (slices, height, width), "
            f"found {shapes[0]} and {shapes[1]}."
        )
    if jnp.iscomplexobj(target) or jnp.iscomplexobj(prediction):
        raise UserError("Metrics need real volumes, found complex ones: take the magnitude first.")
    return jnp.asarray(target, jnp.float32), jnp.asarray(prediction, jnp.float32)


def _energy(volume: Array) -> Array:
    return jnp.square(volume).sum((1, 2))


def _window_sum(x: Array, axis: int) -> Array:
    window = tuple(WINDOW if a == axis else 1 for a in range(x.ndim))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * x.ndim, "VALID")


def _deviations(x: Array, y: Array, axis: int) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Means of x and y over each run of 7 along `axis`, and the sums of (dx^2, dy^2, dx dy) about them."""
    mean_x, mean_y = _window_sum(x, axis) / WINDOW, _window_sum(y, axis) / WINDOW
    xx = yy = xy = jnp.zeros_like(mean_x)
    for i in range(WINDOW):
        dx = jax.lax.slice_in_dim(x, i, i + mean_x.shape[axis], axis=axis) - mean_x
        dy = jax.lax.slice_in_dim(y, i, i + mean_y.shape[axis], axis=axis) - mean_y
        xx, yy, xy = xx + dx * dx, yy + dy * dy, xy + dx * dy
    return mean_x, mean_y, (xx, yy, xy)
