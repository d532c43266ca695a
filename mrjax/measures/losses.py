"""What training minimises."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mrjax.measures import metrics

# Of the prediction, the target, both (batch, height, width) float32 normalised, the offset (batch, 1, 1) float32 that
# was subtracted to normalise them.
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def mean_squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all pixels of two float32 arrays of one shape -> scalar float32."""
    return jnp.mean(jnp.square(prediction - target))


def weighted_sum(weights: Mapping[str, float]) -> Loss:
    """The sum of the losses named, each times its weight: 'mse', 'l1' and 'ssim' (1 - SSIM).

    SSIM needs images whose zero is zero, and a data range: the maximum of each target (`metrics.ssim_slices`).
    """
    kept = {name: weight for name, weight in weights.items() if weight}

    def loss(prediction: jax.Array, target: jax.Array, offset: jax.Array) -> jax.Array:
        terms = {
            "mse": lambda: jnp.mean(jnp.square(prediction - target)),
            "l1": lambda: jnp.mean(jnp.abs(prediction - target)),
            "ssim": lambda: 1 - _ssim(prediction + offset, target + offset),
        }
        first, *others = (weight * terms[name]() for name, weight in kept.items())
        return sum(others, first)

    return loss


def _ssim(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return metrics.ssim_slices(target, prediction, target.max((-2, -1))).mean()
