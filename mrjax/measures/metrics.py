"""Volume metrics as fastMRI's `evaluate.py` defines them: the registry `METRICS`, in float32 on the device.

The data range is the maximum of the target VOLUME. fastMRI's validation during training uses the `max` attribute of
the file instead, and slice-wise ranges are common elsewhere: all three give different numbers. For a target of zeros
the result is fastMRI's: NMSE inf, PSNR -inf, SSIM 0 where the prediction varies; NaN where it is zero, too.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mrjax.errors import UserError

WINDOW = 7
K1, K2 = 0.01, 0.03


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a volume, computed from values of its slices."""

    label: str  # its name and unit
    decimals: int  # of a value that is shown
    # Of real target and prediction (slices, height, width) and data range (slices,), to (slices, ...): float32, on the
    # device.
    slice_values: Callable[[Array, Array, Array], Array]
    # Of the slice values of one volume, float64, and its data range: on the host.
    volume_value: Callable[[np.ndarray, np.float64], np.floating]

    def format(self, value: float) -> str:
        """Format a value for a table or a picture."""
        return f"{value:.{self.decimals}f}"


def slice_values(target: ArrayLike, prediction: ArrayLike, data_range: ArrayLike) -> dict[str, Array]:
    """Compute what each slice contributes to the metrics of its volume, on the device.

    Target and prediction are real (slices, height, width); the slices may belong to different volumes, whose maximum is
    the data range, scalar or (slices,). By the name of the metric, return float32 (slices, ...).

    Raises `UserError` for complex images, shapes that differ, or slices smaller than 7x7.
    """
    shape, other = jnp.shape(target), jnp.shape(prediction)
    if shape != other or len(shape) != 3:
        raise UserError(
            f"Metrics need a target and a prediction of one shape (slices, height, width), found {shape} and {other}."
        )
    if jnp.iscomplexobj(target) or jnp.iscomplexobj(prediction):
        raise UserError("Metrics need real volumes, found complex ones: take the magnitude first.")
    target, prediction = jnp.asarray(target, jnp.float32), jnp.asarray(prediction, jnp.float32)
    data_range = jnp.broadcast_to(jnp.asarray(data_range, jnp.float32), target.shape[:1])
    return {name: metric.slice_values(target, prediction, data_range) for name, metric in METRICS.items()}


def volume_values(values: Mapping[str, ArrayLike], data_range: float) -> dict[str, float]:
    """Combine the `slice_values` of one volume to its metrics, in float64 on the host; the range is its maximum."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            name: float(metric.volume_value(np.asarray(values[name], np.float64), np.float64(data_range)))
            for name, metric in METRICS.items()
        }


def ssim_slices(target: Array, prediction: Array, data_range: Array) -> Array:
    """Compute the structural similarity of each slice with scikit-image's defaults.

    Wang et al., IEEE Trans. Image Process. 13 (2004) 600, eq. 13, with a uniform 7x7 window, sample covariances,
    K1 = 0.01, K2 = 0.03, averaged over the pixels whose window lies inside the slice. All arrays are float32: images
    (slices, height, width), data range and result (slices,). UserError for slices smaller than 7x7.
    """
    if min(target.shape[1:]) < WINDOW:
        found = "x".join(map(str, target.shape[1:]))
        raise UserError(f"SSIM needs slices of at least {WINDOW}x{WINDOW} pixels, found {found}.")
    # Ranges run from 1e-8 to 1e4 and enter to the fourth power, so work in units of the range.
    data_range = data_range[:, None, None]
    scale = jnp.where(data_range == 0, 1, data_range)
    c1, c2 = jnp.square(K1 * data_range / scale), jnp.square(K2 * data_range / scale)
    x, y = target / scale, prediction / scale
    # E[x^2] - E[x]^2 loses float32's digits to cancellation, so sum squares of deviations: first within the rows of a
    # window, then between its rows (Chan, Golub and LeVeque, The American Statistician 37 (1983) 242).
    row_x, row_y, within = _window_deviations(x, y, axis=2)
    mean_x, mean_y, between = _window_deviations(row_x, row_y, axis=1)
    var_x, var_y, covariance = (
        (_window_sum(w, axis=1) + WINDOW * b) / (WINDOW**2 - 1) for w, b in zip(within, between, strict=True)
    )
    luminance = (2 * mean_x * mean_y + c1) / (jnp.square(mean_x) + jnp.square(mean_y) + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2))


def _window_sum(x: Array, axis: int) -> Array:
    window = tuple(WINDOW if a == axis else 1 for a in range(x.ndim))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * x.ndim, "VALID")


def _window_deviations(x: Array, y: Array, axis: int) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Means of x and y over each run of 7 along `axis`, and the sums of (dx^2, dy^2, dx dy) about them."""
    mean_x, mean_y = _window_sum(x, axis) / WINDOW, _window_sum(y, axis) / WINDOW
    xx = yy = xy = jnp.zeros_like(mean_x)
    for i in range(WINDOW):
        dx = jax.lax.slice_in_dim(x, i, i + mean_x.shape[axis], axis=axis) - mean_x
        dy = jax.lax.slice_in_dim(y, i, i + mean_y.shape[axis], axis=axis) - mean_y
        xx, yy, xy = xx + dx * dx, yy + dy * dy, xy + dx * dy
    return mean_x, mean_y, (xx, yy, xy)


def _error_and_energy(target: Array, prediction: Array, data_range: Array) -> Array:
    return jnp.stack([jnp.square(x).mean((1, 2)) for x in (target - prediction, target)], -1)


def _nmse(error_and_energy: np.ndarray, data_range: np.float64) -> np.floating:
    """|target - prediction|^2 / |target|^2."""
    error, energy = error_and_energy.sum(0)
    return error / energy


def _psnr(error_and_energy: np.ndarray, data_range: np.float64) -> np.floating:
    """10 log10(data range^2 / mean squared error)."""
    return 10 * np.log10(np.square(data_range) / error_and_energy[:, 0].mean())


METRICS = {
    "nmse": Metric("NMSE", 4, _error_and_energy, _nmse),
    "psnr": Metric("PSNR (dB)", 2, _error_and_energy, _psnr),
    "ssim": Metric("SSIM", 4, ssim_slices, lambda values, _: values.mean()),
}
