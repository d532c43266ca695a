"""Mix a residual VarNet with compressed sensing, by least squares at measured samples that are held out (stacking).

What a network adds to compressed sensing is a gain on scans like those it was trained on, and may be a loss on others.
Stacking (Breiman, Machine Learning 24 (1996) 49) asks the scan itself: a part of its samples is held out, both
reconstruct the rest, and the mixture of the two that predicts the held-out samples best is taken for the whole. The
same samples tell how much both have shrunk what was not measured, as total variation does.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from mrjax.models.data_consistency import root_sum_of_squares
from mrjax.models.varnet import VarNet
from mrjax.mri.fourier import fft2c, ifft2c
from mrjax.mri.noise import estimate_sigma
from mrjax.mri.sense import find_centre, nearest_explanation

_EVERY = 6  # of the lines or samples outside the centre, one is held out
_RIDGE = 0.1  # on the shares of the mixture, of the mean error of both: as few lines are held out, they are uncertain
_LARGEST_SCALE = 1.25


class CrossValidatedVarNet(VarNet):
    """A `VarNet` that is `residual`, for inference; its parameters are the same, and it takes three times as long.

    It starts at compressed sensing that has converged. The network's image is brought to explain what was measured by
    `sense.nearest_explanation` before it is mixed, and then the measured samples are put in place.
    """

    start_iterations: ClassVar[int] = 60

    @nn.compact
    def __call__(self, kspace: Array, mask: Array, offset: Array) -> Array:
        """Reconstruct (batch, height, width, 1) float32 from `NetworkInputs`."""
        held_out = jax.vmap(hold_out)(mask)
        masks = jnp.concatenate([mask, mask & ~held_out])
        measured = jnp.where(masks[:, None], jnp.concatenate([kspace, kspace]), 0)
        maps, start, network = self.unroll(measured, masks)
        explained = lax.map(_explain, (root_sum_of_squares(ifft2c(network)), measured, masks, maps))
        mixed = mix_by_held_out(start, explained, kspace, held_out)
        return (root_sum_of_squares(ifft2c(jnp.where(mask[:, None], kspace, mixed))) - offset)[..., None]


def cross_validated(network: nn.Module) -> nn.Module:
    """Return the network as it is best used on undersampled k-space: a residual `VarNet` as a cross-validated one."""
    if not isinstance(network, VarNet) or not network.residual:
        return network
    fields = [field.name for field in dataclasses.fields(VarNet) if field.name not in ("parent", "name")]
    return CrossValidatedVarNet(**{name: getattr(network, name) for name in fields})


def mix_by_held_out(first: Array, second: Array, kspace: Array, held_out: Array) -> Array:
    """Mix two reconstructions of k-space in the shares that predict its held-out samples, and scale the mixture alike.

    Both are (2 batch, coils, height, width) complex64: of all samples of `kspace`, (batch, coils, height, width), then
    of those that `held_out`, (batch, 1 or height, width) bool, leaves. The result, (batch, coils, height, width), is
    the second where it holds out none. Shares are from 0 to 1, by ridge regression; they are those of Bates and Granger
    (Oper Res Q 20 (1969) 451), in proportion to the rows' sums of the inverse covariance of the errors. The scale is
    from 1 to 1.25: one below 1 is due to the samples that were held out, without which there is less to go by.
    """
    (of_all, of_rest), (second_of_all, second_of_rest) = jnp.split(first, 2), jnp.split(second, 2)
    known, predicted, of_second = (jnp.where(held_out[:, None], x, 0) for x in (kspace, of_rest, second_of_rest))
    errors = predicted - known, of_second - known
    power, second_power, common = _inner(errors[0], errors[0]), _inner(errors[1], errors[1]), _inner(*errors)
    ridge = _RIDGE * (power + second_power) / 2
    share = jnp.clip(_ratio(power - common + ridge, power + second_power - 2 * common + 2 * ridge), 0, 1)
    predicted = predicted + share * (of_second - predicted)
    scale = jnp.clip(_ratio(_inner(predicted, known), _inner(predicted, predicted)), 1, _LARGEST_SCALE)
    return scale * (of_all + share * (second_of_all - of_all))


def _inner(x: Array, y: Array) -> Array:
    return jnp.sum(x.real * y.real + x.imag * y.imag, (1, 2, 3), keepdims=True)


def _ratio(x: Array, y: Array) -> Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 1)


def hold_out(mask: Array) -> Array:
    """Choose every sixth of what was sampled outside the centre, (1 or height, width) bool to the same.

    Whole columns, or rows, where whole ones were measured, else single samples.
    """
    centre = jnp.broadcast_to(find_centre(mask[None])[0], mask.shape)
    rows, columns = mask.any(1), mask.any(0)
    of_columns = _every(columns & ~centre.any(0))
    of_rows = _every(rows & ~centre.any(1))[:, None]
    of_lines = jnp.where(rows.mean() < columns.mean(), of_rows, of_columns)
    whole_lines = jnp.all(mask == rows[:, None] & columns)
    return mask & jnp.where(whole_lines, of_lines, _every(mask & ~centre))


def _every(sampled: Array) -> Array:
    return sampled & (jnp.cumsum(sampled).reshape(sampled.shape) % _EVERY == _EVERY // 2)


def _explain(of_slice: tuple[Array, ...]) -> Array:
    image, kspace, mask, maps = of_slice
    return fft2c(maps * nearest_explanation(image, kspace, mask, maps, estimate_sigma(kspace, mask)))
