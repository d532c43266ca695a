"""Reconstruction without a network: the image that explains what was measured and is sparse (Lustig et al., 2007)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mrjax.errors import UserError
from mrjax.mri.coils import combine

LEVELS = 3
INNER = 10  # iterations on the dual problem of a proximal step, which go on from where the last step's ended
# Daubechies' scaling filter of four taps and two vanishing moments (Ten Lectures on Wavelets, 1992, section 6.4).
_ROOT = math.sqrt(3)
_LOW = np.array([1 + _ROOT, 3 + _ROOT, 3 - _ROOT, 1 - _ROOT]) / (4 * math.sqrt(2))
_PAIR = np.stack([_LOW, _LOW[::-1] * [1, -1, 1, -1]])
# Low and high along rows and columns, (4, 1, 4, 4). Halved: without decimation there are four times as many values.
_FILTERS = np.einsum("ak,bl->abkl", _PAIR, _PAIR).reshape(4, 1, 4, 4).astype(np.float32) / 2


class Analysis(NamedTuple):
    """A linear map D whose result should be sparse, over periodic images.

    Attributes:
      forward: (height, width) complex64 to (bands, height, width), D.
      adjoint: back, D^H.
      norm: a bound on the square of D's greatest singular value.
      joint: whether the bands of a pixel are one vector, of which the length counts.
    """

    forward: Callable[[jax.Array], jax.Array]
    adjoint: Callable[[jax.Array], jax.Array]
    norm: float
    joint: bool

    def penalty(self, image: jax.Array) -> jax.Array:
        """Scalar: the sum of the lengths of D's values."""
        return _lengths(self.forward(image), self.joint).sum()


def differences(image: jax.Array) -> jax.Array:
    """(height, width) to (2, height, width): to the next row and to the next column."""
    return jnp.stack([jnp.roll(image, -1, axis) - image for axis in (0, 1)])


def wavelets(image: jax.Array) -> jax.Array:
    """(height, width) to (3 LEVELS, height, width): the details of the undecimated wavelet transform.

    It is that of every shift of the image at once, and with the approximation, left out here, a tight frame of unit
    norm for any size (Coifman and Donoho, Translation-invariant de-noising, 1995).
    """
    low, parts = jnp.stack([image.real, image.imag])[:, None], []
    for level in range(LEVELS):
        reach = len(_LOW) - 1 << level
        periodic = jnp.pad(low, [(0, 0), (0, 0), (0, reach), (0, reach)], mode="wrap")
        spacing = (1 << level, 1 << level)
        # A convolution, not a sum of shifted images: those XLA fuses over all levels, and computes each many times.
        bands = jax.lax.conv_general_dilated(
            periodic, _FILTERS, (1, 1), "VALID", rhs_dilation=spacing, precision=jax.lax.Precision.HIGHEST
        )
        low = bands[:, :1]
        parts.append(bands[:, 1:])
    real, imaginary = jnp.concatenate(parts, 1)
    return jax.lax.complex(real, imaginary)


def _linear(forward: Callable[[jax.Array], jax.Array], norm: float, joint: bool) -> Analysis:
    def adjoint(bands: jax.Array) -> jax.Array:
        image = jax.ShapeDtypeStruct(bands.shape[1:], bands.dtype)
        return jax.linear_transpose(forward, image)(bands)[0]  # D is real: its transpose is its adjoint

    return Analysis(forward, adjoint, norm, joint)


ANALYSES = {"tv": _linear(differences, 8, True), "wavelet": _linear(wavelets, 1, False)}


def reconstruct(
    kspace: jax.Array, mask: jax.Array, maps: jax.Array, *, regulariser: str, weight: float, iterations: int
) -> jax.Array:
    """The image x that minimises 1/2 |mask F(S x) - kspace|^2 + weight |D x|_1.

    By FISTA (Beck and Teboulle, SIAM J Imaging Sci 2 (2009) 183). The proximal step is solved by the same method on
    its dual problem (Beck and Teboulle, IEEE Trans Image Process 18 (2009) 2419). What it lacks after few iterations
    the momentum would heap up, so that starts anew whenever it points uphill (O'Donoghue and Candes, Found Comput Math
    15 (2015) 715, gradient scheme).

    Args:
      kspace: (coils, height, width) complex64, what was measured; batched by vmap.
      mask: (1 or height, width) bool, where it was.
      maps: (coils, height, width) complex64, the sensitivities S.
      regulariser: 'tv', the lengths of the image's gradients, or 'wavelet', the values of its undecimated wavelet
        transform but for the approximation.
      weight: in units of the image.
      iterations: of FISTA.

    Returns:
      (height, width) complex64.

    Raises:
      UserError: an unknown regulariser.
    """
    if regulariser not in ANALYSES:
        raise UserError(f"regulariser is {regulariser!r}, expected one of: {', '.join(ANALYSES)}.")
    analysis = ANALYSES[regulariser]
    axes = (-2, -1)
    # All in the order of a plain FFT: D is periodic, so that only what enters and what leaves need be shifted.
    mask = jnp.fft.ifftshift(jnp.broadcast_to(mask, kspace.shape[1:]), axes)
    maps = jnp.fft.ifftshift(maps, axes)
    measured = jnp.where(mask, jnp.fft.ifftshift(kspace, axes), 0)
    # A bound on the data term's curvature: transform and mask have norm 1.
    curvature = (maps.real**2 + maps.imag**2).sum(0).max()
    step = 1 / jnp.where(curvature > 0, curvature, 1)

    def iterate(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        image, ahead, dual, t = state
        difference = jnp.where(mask, jnp.fft.fft2(maps * ahead, norm="ortho"), 0) - measured
        smooth = ahead - step * combine(jnp.fft.ifft2(difference, norm="ortho"), maps)
        inner = dual, dual, jnp.float32(1)
        dual = jax.lax.fori_loop(0, INNER, lambda _, inner: improve(smooth, *inner), inner)[0]
        newer = smooth - analysis.adjoint(dual)
        uphill = jnp.vdot(ahead - newer, newer - image).real > 0
        momentum, t = _momentum(jnp.where(uphill, 1, t))
        return newer, newer + momentum * (newer - image), dual, t

    def improve(smooth: jax.Array, dual: jax.Array, ahead: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
        moved = ahead + analysis.forward(smooth - analysis.adjoint(ahead)) / analysis.norm
        length = jnp.maximum(_lengths(moved, analysis.joint), jnp.finfo(jnp.float32).tiny)
        newer = moved * jnp.minimum(1, weight * step / length)
        momentum, t = _momentum(t)
        return newer, newer + momentum * (newer - dual), t

    image = step * combine(jnp.fft.ifft2(measured, norm="ortho"), maps)
    state = image, image, jnp.zeros_like(analysis.forward(image)), jnp.float32(1)
    return jnp.fft.fftshift(jax.lax.fori_loop(0, iterations, iterate, state)[0], axes)


def _momentum(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    newer = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
    return (t - 1) / newer, newer


def _lengths(bands: jax.Array, joint: bool) -> jax.Array:
    squares = bands.real**2 + bands.imag**2
    return jnp.sqrt(squares.sum(0, keepdims=True) if joint else squares)
