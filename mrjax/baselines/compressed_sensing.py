"""Compressed sensing: the sparse image that explains what was measured (Lustig et al., 2007), a baseline."""

import functools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mrjax.baselines.espirit import espirit
from mrjax.errors import UserError
from mrjax.mri.coils import adaptive_maps, combine, root_sum_of_squares
from mrjax.mri.fourier import ifft2c

LEVELS = 3
# Iterations on the dual problem of a proximal step, started from the dual variable of the last step.
INNER_ITERATIONS = 10
# Daubechies' scaling filter of four taps and two vanishing moments (Ten Lectures on Wavelets, 1992, section 6.4).
_ROOT = math.sqrt(3)
_LOW_PASS = np.array([1 + _ROOT, 3 + _ROOT, 3 - _ROOT, 1 - _ROOT]) / (4 * math.sqrt(2))
_FILTER_PAIR = np.stack([_LOW_PASS, _LOW_PASS[::-1] * [1, -1, 1, -1]])
# Low and high pass along rows and columns, (4, 1, 4, 4); halved, as without decimation values are four times as many.
_FILTERS = np.einsum("ak,bl->abkl", _FILTER_PAIR, _FILTER_PAIR).reshape(4, 1, 4, 4).astype(np.float32) / 2


class CompressedSensing(nn.Module):
    """Estimate sensitivities by ESPIRiT, then solve for the sparse image, in the place of a network.

    It has no parameters: `apply({"params": {}}, kspace, mask, offset)`. Its magnitude is the root-sum-of-squares of the
    coils' images, as that of the targets. Where fewer central columns were measured than ESPIRiT's kernel is wide, the
    sensitivities are the adaptive ones of the images that these columns make.
    """

    regulariser: str = "tv"  # or 'wavelet', see `reconstruct`
    weight: float = 0.002  # of the regulariser, in units of the normalised image
    iterations: int = 60  # of FISTA
    calibration: int = 24  # side of ESPIRiT's square calibration region, in samples
    kernel: int = 3  # side of ESPIRiT's blocks, in samples: small, as 8x leaves few central columns

    input_names: ClassVar[tuple[str, ...]] = ("kspace", "mask", "offset")

    @nn.compact
    def __call__(self, kspace: jax.Array, mask: jax.Array, offset: jax.Array) -> jax.Array:
        """Reconstruct normalised images, (batch, height, width, 1) float32: the magnitude minus `offset` (batch, 1, 1).

        `kspace` (batch, coils, height, width) complex64 is in units of the normalised image's scale.
        """
        solve = functools.partial(
            reconstruct, regulariser=self.regulariser, weight=self.weight, iterations=self.iterations
        )
        maps = jax.vmap(self._estimate_maps)(kspace, mask)
        image = jax.vmap(solve)(kspace, mask, maps)
        return (root_sum_of_squares(maps * image[:, None]) - offset)[..., None]

    def _estimate_maps(self, kspace: jax.Array, mask: jax.Array) -> jax.Array:
        # Not cropped: the target has noise outside the object too.
        maps = espirit(kspace, mask, calibration=self.calibration, kernel=self.kernel, crop=0.0)
        width = kspace.shape[-1]
        central = abs(jnp.arange(width) - width // 2) <= self.kernel // 2
        return jnp.where(jnp.any(maps), maps, adaptive_maps(ifft2c(jnp.where(central, kspace, 0))))


class Analysis(NamedTuple):
    """An analysis operator D, linear and real, whose coefficients should be sparse, on periodic images."""

    forward: Callable[[jax.Array], jax.Array]  # D, (height, width) complex64 to (bands, height, width)
    norm: float  # a bound on the square of D's largest singular value
    joint: bool  # whether the penalty is the length of the vector of all bands of a pixel, or of each value

    def adjoint(self, bands: jax.Array) -> jax.Array:
        """Apply D^H, (bands, height, width) to (height, width) complex64: the transpose, as D is real."""
        image = jax.ShapeDtypeStruct(bands.shape[1:], bands.dtype)
        return jax.linear_transpose(self.forward, image)(bands)[0]

    def project(self, bands: jax.Array, radius: jax.Array) -> jax.Array:
        """Project coefficients (bands, height, width) onto the dual ball: lengths of at most `radius`."""
        squares = bands.real**2 + bands.imag**2
        length = jnp.sqrt(squares.sum(0, keepdims=True) if self.joint else squares)
        return bands * jnp.minimum(1, radius / jnp.maximum(length, jnp.finfo(jnp.float32).tiny))


def differences(image: jax.Array) -> jax.Array:
    """Compute finite differences along rows and columns, (height, width) to (2, height, width)."""
    return jnp.stack([jnp.roll(image, -1, axis) - image for axis in (0, 1)])


def wavelets(image: jax.Array) -> jax.Array:
    """Compute the details of the undecimated wavelet transform, (height, width) to (3 LEVELS, height, width).

    With the approximation, left out here, it is a tight frame of unit norm for any size (Coifman and Donoho, 1995).
    """
    low, details = jnp.stack([image.real, image.imag])[:, None], []
    for level in range(LEVELS):
        reach = len(_LOW_PASS) - 1 << level
        periodic = jnp.pad(low, [(0, 0), (0, 0), (0, reach), (0, reach)], mode="wrap")
        dilation = (1 << level, 1 << level)
        # A convolution, not a sum of shifted images: XLA fuses those over all levels and recomputes each many times.
        bands = jax.lax.conv_general_dilated(
            periodic, _FILTERS, (1, 1), "VALID", rhs_dilation=dilation, precision=jax.lax.Precision.HIGHEST
        )
        low = bands[:, :1]
        details.append(bands[:, 1:])
    real, imaginary = jnp.concatenate(details, 1)
    return jax.lax.complex(real, imaginary)


ANALYSES = {"tv": Analysis(differences, norm=8, joint=True), "wavelet": Analysis(wavelets, norm=1, joint=False)}


def reconstruct(
    kspace: jax.Array, mask: jax.Array, maps: jax.Array, *, regulariser: str, weight: float, iterations: int
) -> jax.Array:
    """Minimise 1/2 |mask F(S x) - kspace|^2 + weight |D x|_1 over images x, by FISTA.

    Beck and Teboulle, SIAM J Imaging Sci 2 (2009) 183. The proximal step is solved by the same method on its dual
    problem (Beck and Teboulle, IEEE Trans Image Process 18 (2009) 2419), approximately; so that its errors do not add
    up, the momentum restarts whenever it points uphill (O'Donoghue and Candes, Found Comput Math 15 (2015) 715).
    `kspace` and the sensitivities `maps`, S, are (coils, height, width) complex64, `mask` (1 or height, width) bool.
    The regulariser 'tv' is the lengths of the image's gradients, 'wavelet' the details of its wavelet transform.
    """
    if regulariser not in ANALYSES:
        raise UserError(f"regulariser is {regulariser!r}, expected one of: {', '.join(ANALYSES)}.")
    analysis, axes = ANALYSES[regulariser], (-2, -1)
    # Inputs in the order of a plain FFT, as D is periodic: two shifts in all instead of four in each iteration.
    mask = jnp.fft.ifftshift(jnp.broadcast_to(mask, kspace.shape[1:]), axes)
    maps = jnp.fft.ifftshift(maps, axes)
    measured = jnp.where(mask, jnp.fft.ifftshift(kspace, axes), 0)
    curvature = (maps.real**2 + maps.imag**2).sum(0).max()  # a bound on the data term's: F and mask have norm 1
    step = 1 / jnp.where(curvature > 0, curvature, 1)

    def iterate(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        image, extrapolated, dual, t = state
        residual = jnp.where(mask, jnp.fft.fft2(maps * extrapolated, norm="ortho"), 0) - measured
        descended = extrapolated - step * combine(jnp.fft.ifft2(residual, norm="ortho"), maps)
        dual = _solve_dual(descended, dual, weight * step, analysis)
        updated = descended - analysis.adjoint(dual)
        uphill = jnp.vdot(extrapolated - updated, updated - image).real > 0
        momentum, t = _momentum(jnp.where(uphill, 1, t))
        return updated, updated + momentum * (updated - image), dual, t

    image = step * combine(jnp.fft.ifft2(measured, norm="ortho"), maps)
    start = image, image, jnp.zeros_like(analysis.forward(image)), jnp.float32(1)
    return jnp.fft.fftshift(jax.lax.fori_loop(0, iterations, iterate, start)[0], axes)


def _solve_dual(image: jax.Array, dual: jax.Array, radius: jax.Array, analysis: Analysis) -> jax.Array:
    """Improve the dual variable of the proximal step of `image` by a few iterations of the fast gradient method."""

    def iterate(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dual, extrapolated, t = state
        ascended = extrapolated + analysis.forward(image - analysis.adjoint(extrapolated)) / analysis.norm
        updated = analysis.project(ascended, radius)
        momentum, t = _momentum(t)
        return updated, updated + momentum * (updated - dual), t

    return jax.lax.fori_loop(0, INNER_ITERATIONS, iterate, (dual, dual, jnp.float32(1)))[0]


def _momentum(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute Nesterov's momentum and the next t."""
    following = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
    return (t - 1) / following, following
