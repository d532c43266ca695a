"""Training losses: the registry `LOSSES` and their weighted sum."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

from mrjax.measures import metrics

# (prediction, target, offset) -> scalar float32. Prediction and target are (batch, height, width) float32, normalised;
# offset is (batch, 1, 1) float32, what was subtracted to normalise them.
Loss = Callable[[Array, Array, Array], Array]


def one_minus_ssim(prediction: Array, target: Array, offset: Array) -> Array:
    """Compute 1 - SSIM of images whose zero is zero, with the maximum of each target as its data range."""
    target = target + offset
    return 1 - metrics.ssim_slices(target, prediction + offset, target.max((-2, -1))).mean()


LOSSES: dict[str, Loss] = {
    "mse": lambda prediction, target, offset: jnp.mean(jnp.square(prediction - target)),
    "l1": lambda prediction, target, offset: jnp.mean(jnp.abs(prediction - target)),
    "ssim": one_minus_ssim,
}


def weighted_sum(weights: Mapping[str, float]) -> Loss:
    """Make the loss that sums `LOSSES` by name, each times its weight; those of weight 0 are not computed."""
    terms = [(LOSSES[name], weight) for name, weight in weights.items() if weight]

    def loss(prediction: Array, target: Array, offset: Array) -> Array:
        return sum((weight * term(prediction, target, offset) for term, weight in terms), jnp.float32(0))

    return loss
