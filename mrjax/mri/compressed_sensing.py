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
INNER = 5  # iterations on the dual problem of a proximal step, which go on from the last step's
# Daubechies' scaling filter of four taps and two vanishing moments (Ten Lectures on Wavelets, 1992, section 6.4).
_ROOT = math.sqrt(3)
_LOW = np.array([1 + _ROOT, 3 + _ROOT, 3 - _ROOT, 1 - _ROOT]) / (4 * math.sqrt(2))
_HIGH = _LOW[::-1] * [1, -1, 1, -1]


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

    It is that of every shift of the image at once, and with the approximation left out here a tight frame of unit
    norm, for any size (Coifman and Donoho, Translation-invariant de-noising, 1995).
    """
    details = []
    for level in range(LEVELS):
        low, high = (_filtered(image, taps, level, 0) for taps in (_LOW, _HIGH))
        details += [_filtered(low, _HIGH, level, 1), _filtered(high, _LOW, level, 1), _filtered(high, _HIGH, level, 1)]
        image = _filtered(low, _LOW, level, 1)
    return jnp.stack(details)


def _filtered(image: jax.Array, taps: np.ndarray, level: int, axis: int) -> jax.Array:
    # Half of a filter's energy: without decimation there are twice as many values.
    terms = [float(tap) / math.sqrt(2) * jnp.roll(image, k << level, axis) for k, tap in enumerate(taps)]
    return sum(terms[1:], terms[0])


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

    By FISTA (Beck and Teboulle, SIAM J Imaging Sci 2 (2009) 183). The proximal step is solved on its dual problem
    (Chambolle, J Math Imaging Vis 20 (2004) 89; Beck and Teboulle, IEEE Trans Image Process 18 (2009) 2419).

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

    def gradient(image: jax.Array) -> jax.Array:
        difference = jnp.where(mask, jnp.fft.fft2(maps * image, norm="ortho"), 0) - measured
        return combine(jnp.fft.ifft2(difference, norm="ortho"), maps)

    def iterate(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        image, ahead, dual, t = state
        smooth = ahead - step * gradient(ahead)
        dual = jax.lax.fori_loop(0, INNER, lambda _, p: improve(p, smooth), dual)
        newer = smooth - analysis.adjoint(dual)
        t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        return newer, newer + (t - 1) / t_next * (newer - image), dual, t_next

    def improve(dual: jax.Array, smooth: jax.Array) -> jax.Array:
        moved = dual + analysis.forward(smooth - analysis.adjoint(dual)) / analysis.norm
        longest = jnp.maximum(_lengths(moved, analysis.joint), jnp.finfo(jnp.float32).tiny)
        return moved * jnp.minimum(1, weight * step / longest)

    start = combine(jnp.fft.ifft2(measured, norm="ortho"), maps) * step
    state = start, start, jnp.zeros_like(analysis.forward(start)), jnp.float32(1)
    return jnp.fft.fftshift(jax.lax.fori_loop(0, iterations, iterate, state)[0], axes)


def _lengths(bands: jax.Array, joint: bool) -> jax.Array:
    squares = bands.real**2 + bands.imag**2
    return jnp.sqrt(squares.sum(0, keepdims=True) if joint else squares)
