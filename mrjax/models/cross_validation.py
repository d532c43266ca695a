"""Mix a residual VarNet with compressed sensing, by least squares at measured samples that are held out (stacking).

What a network adds to compressed sensing is a gain on scans like those it was trained on, and may be a loss on others.
Stacking (Breiman, Machine Learning 24 (1996) 49) asks the scan itself: a part of its samples is held out, both
reconstruct the rest, and the mixture of the two that predicts the held-out samples best is taken for the whole.
"""

import dataclasses
import functools

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


class CrossValidatedVarNet(VarNet):
    """A `VarNet` that is `residual`, for inference; its parameters are the same, and it takes twice the time.

    Its image explains what was measured: the network's is brought to it by `sense.nearest_explanation` before it is
    mixed, and the measured samples are put in place.
    """

    @nn.compact
    def __call__(self, kspace: Array, mask: Array, offset: Array) -> Array:
        """Reconstruct (batch, height, width, 1) float32 from `NetworkInputs`."""
        held_out = jax.vmap(hold_out)(mask)
        masks = jnp.concatenate([mask, mask & ~held_out])
        measured = jnp.where(masks[:, None], jnp.concatenate([kspace, kspace]), 0)
        maps, start, network = self.unroll(measured, masks)
        explained = lax.map(_explain, (root_sum_of_squares(ifft2c(network)), measured, masks, maps))
        mix = functools.partial(mix_by_held_out, kspace=kspace, held_out=held_out)
        mixed = jnp.where(mask[:, None], kspace, jnp.split(mix(start, mix(network, explained)), 2)[0])
        return (root_sum_of_squares(ifft2c(mixed)) - offset)[..., None]


def cross_validated(network: nn.Module) -> nn.Module:
    """Return the network as it is best used on undersampled k-space: a residual `VarNet` as a cross-validated one."""
    if not isinstance(network, VarNet) or not network.residual:
        return network
    fields = [field.name for field in dataclasses.fields(VarNet) if field.name not in ("parent", "name")]
    return CrossValidatedVarNet(**{name: getattr(network, name) for name in fields})


def mix_by_held_out(first: Array, second: Array, kspace: Array, held_out: Array) -> Array:
    """Mix two reconstructions of k-space in the shares, from 0 to 1, that are nearest to it at the held-out samples.

    Both are (2 batch, coils, height, width) complex64: of all samples of `kspace`, (batch, coils, height, width), then
    of those that `held_out`, (batch, 1 or height, width) bool, leaves. It is the second where it holds out none.
    """
    difference = second - first
    known, error = (
        jnp.where(held_out[:, None], x, 0) for x in (jnp.split(difference, 2)[1], kspace - jnp.split(first, 2)[1])
    )
    power, explained = (jnp.sum(known.real * x.real + known.imag * x.imag, (1, 2, 3)) for x in (known, error))
    share = jnp.where(power > 0, jnp.clip(explained / jnp.where(power > 0, power, 1), 0, 1), 1)
    return first + jnp.concatenate([share, share])[:, None, None, None] * difference


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
