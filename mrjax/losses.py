"""What training minimises."""

import jax
import jax.numpy as jnp


def mean_squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all pixels of two float32 arrays of one shape -> scalar float32."""
    return jnp.mean(jnp.square(prediction - target))
