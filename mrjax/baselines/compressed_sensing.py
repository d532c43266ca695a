"""Compressed sensing: the image of least total variation that explains what was measured (Lustig et al., 2007)."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mrjax.baselines.espirit import espirit
from mrjax.mri.coils import adaptive_maps, combine, root_sum_of_squares
from mrjax.mri.fourier import fft2c, ifft2c

# Iterations on the dual problem of a proximal step, started from the dual variable of the last step.
INNER_ITERATIONS = 10
_KERNEL = 3  # side of ESPIRiT's blocks, in samples: small, as 8x leaves few central columns


class CompressedSensing(nn.Module):
    """Estimate sensitivities by ESPIRiT, then solve for the image, in the place of a network.

    It has no parameters: `apply({"params": {}}, kspace, mask, offset)`. Its magnitude is the root-sum-of-squares of the
    coils' images, as that of the targets. Where fewer central columns were measured than ESPIRiT's kernel is wide, the
    sensitivities are the adaptive ones of the images that these columns make.
    """

    weight: float = 0.002  # of the total variation, in units of the normalised image
    iterations: int = 60  # of FISTA

    input_names: ClassVar[tuple[str, ...]] = ("kspace", "mask", "offset")

    @nn.compact
    def __call__(self, kspace: jax.Array, mask: jax.Array, offset: jax.Array) -> jax.Array:
        """Reconstruct normalised images, (batch, height, width, 1) float32: the magnitude minus `offset` (batch, 1, 1).

        `kspace` (batch, coils, height, width) complex64 is in units of the normalised image's scale.
        """
        width = kspace.shape[-1]
        central = abs(jnp.arange(width) - width // 2) <= _KERNEL // 2

        def magnitude(kspace: jax.Array, mask: jax.Array) -> jax.Array:
            # Not cropped: the target has noise outside the object too.
            maps = espirit(kspace, mask, kernel=_KERNEL, crop=0.0)
            maps = jnp.where(jnp.any(maps), maps, adaptive_maps(ifft2c(jnp.where(central, kspace, 0))))
            image = reconstruct(kspace, mask, maps, weight=self.weight, iterations=self.iterations)
            return root_sum_of_squares(maps * image)

        return (jax.vmap(magnitude)(kspace, mask) - offset)[..., None]


def differences(image: jax.Array) -> jax.Array:
    """Apply D: periodic differences along rows and columns, (height, width) to (2, height, width), |D|^2 <= 8."""
    return jnp.stack([jnp.roll(image, -1, axis) - image for axis in (0, 1)])


def differences_adjoint(gradients: jax.Array) -> jax.Array:
    """Apply D^H, the negative divergence, (2, height, width) to (height, width)."""
    rows, columns = gradients
    return jnp.roll(columns, 1, 1) - columns - rows + jnp.roll(rows, 1, 0)


def reconstruct(kspace: jax.Array, mask: jax.Array, maps: jax.Array, *, weight: float, iterations: int) -> jax.Array:
    """Minimise 1/2 |mask F(S x) - kspace|^2 + weight TV(x) over images x (height, width) complex64, by FISTA.

    Beck and Teboulle, SIAM J Imaging Sci 2 (2009) 183. The proximal step is solved by the same method on its dual
    problem (Beck and Teboulle, IEEE Trans Image Process 18 (2009) 2419), approximately; so that its errors do not add
    up, the momentum restarts whenever it points uphill (O'Donoghue and Candes, Found Comput Math 15 (2015) 715).
    `kspace` and the sensitivities `maps`, S, are (coils, height, width) complex64, `mask` (1 or height, width) bool.
    TV, the total variation, is the sum of the lengths of the image's gradients.
    """
    measured = jnp.where(mask, kspace, 0)
    curvature = (maps.real**2 + maps.imag**2).sum(0).max()  # a bound on the data term's: F and mask have norm 1
    step = 1 / jnp.where(curvature > 0, curvature, 1)

    def iterate(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        image, extrapolated, dual, t = state
        residual = jnp.where(mask, fft2c(maps * extrapolated), 0) - measured
        descended = extrapolated - step * combine(ifft2c(residual), maps)
        dual = _solve_dual(descended, dual, weight * step)
        updated = descended - differences_adjoint(dual)
        uphill = jnp.vdot(extrapolated - updated, updated - image).real > 0
        momentum, t = _momentum(jnp.where(uphill, 1, t))
        return updated, updated + momentum * (updated - image), dual, t

    image = step * combine(ifft2c(measured), maps)
    start = image, image, jnp.zeros_like(differences(image)), jnp.float32(1)
    return jax.lax.fori_loop(0, iterations, iterate, start)[0]


def _solve_dual(image: jax.Array, dual: jax.Array, radius: jax.Array) -> jax.Array:
    """Improve the dual variable of the proximal step of `image` by a few iterations of the fast gradient method."""

    def iterate(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dual, extrapolated, t = state
        ascended = extrapolated + differences(image - differences_adjoint(extrapolated)) / 8
        length = jnp.sqrt((ascended.real**2 + ascended.imag**2).sum(0))
        updated = ascended * jnp.minimum(1, radius / jnp.maximum(length, jnp.finfo(jnp.float32).tiny))
        momentum, t = _momentum(t)
        return updated, updated + momentum * (updated - dual), t

    return jax.lax.fori_loop(0, INNER_ITERATIONS, iterate, (dual, dual, jnp.float32(1)))[0]


def _momentum(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute Nesterov's momentum and the next t."""
    following = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
    return (t - 1) / following, following
