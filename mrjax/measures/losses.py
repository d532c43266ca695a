"""What training minimises."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mrjax import sizes
from mrjax.measures import metrics

# Of the prediction, the target, both (batch, height, width) float32 normalised, the offset (batch, 1, 1) float32 that
# was subtracted to normalise them, and where images differ in size the (batch, 2) int32 of each, else None.
Loss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def mean_squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all pixels of two float32 arrays of one shape -> scalar float32."""
    return jnp.mean(jnp.square(prediction - target))


def _mean(errors: jax.Array, size: jax.Array | None) -> jax.Array:
    """Over all pixels; of images that differ in size the mean over images of each one's mean."""
    if size is None:
        return jnp.mean(errors)
    return jnp.mean(jnp.where(sizes.inside(size, errors), errors, 0).sum((1, 2)) / size.prod(1))


def weighted_sum(weights: Mapping[str, float]) -> Loss:
    """The sum of the losses named, each times its weight: 'mse', 'l1' and 'ssim' (1 - SSIM).

    SSIM needs images whose zero is zero, and a data range: the maximum of each target (`metrics.ssim_slices`).
    """
    kept = {name: weight for name, weight in weights.items() if weight}

    def loss(prediction: jax.Array, target: jax.Array, offset: jax.Array, size: jax.Array | None = None) -> jax.Array:
        terms = {
            "mse": lambda: _mean(jnp.square(prediction - target), size),
            "l1": lambda: _mean(jnp.abs(prediction - target), size),
            "ssim": lambda: 1 - _ssim(prediction + offset, target + offset, size),
        }
        first, *others = (weight * terms[name]() for name, weight in kept.items())
        return sum(others, first)

    return loss


def _ssim(prediction: jax.Array, target: jax.Array, size: jax.Array | None) -> jax.Array:
    own = target if size is None else jnp.where(sizes.inside(size, target), target, -jnp.inf)
    return metrics.ssim_slices(target, prediction, own.max((-2, -1)), size).mean()
