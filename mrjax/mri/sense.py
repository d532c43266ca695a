"""SENSE: coil sensitivities, and the image whose coil images explain what was measured in the least-squares sense."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from mrjax.mri.coils import adaptive_maps, combine, root_sum_of_squares
from mrjax.mri.encoding import Encoding, to_centre, to_first
from mrjax.mri.espirit import espirit
from mrjax.mri.fourier import fft2c, ifft2c
from mrjax.mri.noise import estimate_sigma

_KERNEL = 3  # side of ESPIRiT's blocks, in samples: small, as 8x leaves few central columns
_ITERATIONS, _LEAST_WEIGHT = 12, 0.003  # of `explain_measured`


def estimate_maps(kspace: Array, mask: Array, sigma: ArrayLike) -> Array:
    """Estimate sensitivities by ESPIRiT: (coils, height, width) complex64 with sum |S|^2 = 1 at every pixel.

    Where the fully sampled centre of k-space has no room for ESPIRiT's kernel, they are the adaptive ones of its
    images, or of the zero-filled ones if it has less than a row or column. `kspace` is (coils, height, width) complex64
    with noise of this sigma, `mask` (1 or height, width) bool.
    """
    # Not cropped: targets have noise outside the object too.
    maps = espirit(kspace, mask, kernel=_KERNEL, crop=0.0, sigma=sigma)
    centre = jnp.broadcast_to(find_centre(mask[None])[0], kspace.shape[1:])
    known = centre | (centre.sum() < min(centre.shape))
    return jnp.where(jnp.any(maps), maps, adaptive_maps(ifft2c(jnp.where(known & mask, kspace, 0))))


def conjugate_gradient(
    kspace: Array, mask: Array, maps: Array, *, weight: ArrayLike, iterations: int, prior: ArrayLike = 0
) -> Array:
    """Minimise |mask F(S x) - kspace|^2 + weight |x - prior|^2 over images x (height, width) complex64.

    By conjugate gradients on the normal equations (Pruessmann et al., Magn Reson Med 46 (2001) 638), up to float32's
    resolution. `kspace` and the sensitivities `maps`, S, are (coils, height, width) complex64, `mask` (1 or height,
    width) bool.
    """

    encoding, measured = Encoding.of(kspace, mask, maps)

    def normal(image: Array) -> Array:
        return encoding.adjoint(encoding.apply(image)) + weight * image

    # Solved for the difference from the prior: rounding is relative to it, and is not divided by a small weight. An
    # earlier stop would let rounding decide how many iterations there are, each of which changes the image visibly.
    start = to_first(jnp.broadcast_to(jnp.asarray(prior, jnp.complex64), maps.shape[1:]))
    right = encoding.adjoint(measured - encoding.apply(start))
    return to_centre(start + cg(normal, right, maxiter=iterations, tol=float(jnp.finfo(jnp.float32).eps))[0])


def explain_measured(image: Array, kspace: Array, mask: Array) -> Array:
    """Return the magnitude image nearest to `image`, (height, width) float32, that explains the measured k-space.

    `kspace` is (coils, height, width) complex64, `mask` (1 or height, width) bool. See `nearest_explanation`.
    """
    sigma = estimate_sigma(kspace, mask)
    maps = estimate_maps(kspace, mask, sigma)
    return root_sum_of_squares(maps * nearest_explanation(image, kspace, mask, maps, sigma))


def nearest_explanation(image: Array, kspace: Array, mask: Array, maps: Array, sigma: Array) -> Array:
    """Find the image (height, width) complex64 nearest to the magnitude `image` that explains the measured k-space.

    It minimises `conjugate_gradient`'s cost with `image` as prior, to which the zero-filled image gives its phase: the
    data-consistency step of MoDL (Aggarwal et al., IEEE Trans Med Imaging 38 (2019) 394, equation 10). The weight is a
    tenth of the variance of the noise, whose deviation is `sigma`, over that of the error of `image`, both as measured
    k-space shows them: the error is greater where nothing was measured. `kspace` and the sensitivities `maps` are
    (coils, height, width) complex64, `mask` (1 or height, width) bool.
    """
    zero_filled = combine(ifft2c(jnp.where(mask, kspace, 0)), maps)
    prior = image * jnp.exp(1j * jnp.angle(zero_filled))
    measured = mask & (kspace != 0)
    difference = jnp.where(measured, abs(fft2c(maps * prior) - kspace) ** 2, 0)
    noise, total = 2 * sigma**2, difference.sum() / jnp.maximum(measured.sum(), 1)
    error = jnp.maximum(total - noise, 0.2 * noise)
    weight = jnp.maximum(0.1 * noise / jnp.where(error > 0, error, 1), _LEAST_WEIGHT)
    return conjugate_gradient(kspace, mask, maps, weight=weight, iterations=_ITERATIONS, prior=prior)


def wiener_weight(kspace: Array, mask: Array, sigma: Array) -> Array:
    """Choose the weight of a Wiener filter: the variance of the noise over the mean power of the zero-filled image."""
    power = jnp.sum(jnp.where(mask, abs(kspace) ** 2, 0)) / kspace[0].size
    return 2 * sigma**2 / jnp.where(power > 0, power, 1)


def find_centre(mask: Array) -> Array:
    """Find the fully sampled centre of k-space, (batch, 1 or height, width) bool to the same.

    Of a mask of columns it is what fastMRI takes: as many columns on either side as are contiguous on the side that
    has fewer; one column if that is none, or if a whole side is sampled. Of any other mask, it is all that is nearer to
    the centre, along height or width as a share of it, than the nearest sample that was not measured.
    """
    height, width = mask.shape[1:]
    position, middle, columns = jnp.arange(width), width // 2, mask.any(1).astype(jnp.int8)
    # The first column that is not sampled, 0 where all are.
    left, right = jnp.argmin(columns[:, :middle][:, ::-1], 1), jnp.argmin(columns[:, middle:], 1)
    count = jnp.maximum(2 * jnp.minimum(left, right), 1)[:, None]
    start = (width - count + 1) // 2
    central_columns = ((position >= start) & (position < start + count))[:, None]
    if height == 1:
        return central_columns
    y, x = (abs(np.arange(side) - side // 2) / side for side in (height, width))
    distance = jnp.asarray(np.maximum(y[:, None], x), jnp.float32)
    nearest = jnp.where(mask, jnp.inf, distance).min((1, 2), keepdims=True)
    of_columns = jnp.all(mask == mask.any(1, keepdims=True), (1, 2), keepdims=True) & ~mask.all((1, 2), keepdims=True)
    return jnp.where(of_columns, central_columns, (distance < nearest) | (distance == 0))
