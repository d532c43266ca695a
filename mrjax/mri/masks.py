"""Which phase-encode columns an accelerated scan measures."""

import jax
import jax.numpy as jnp


def random_columns(
    key: jax.Array, sampled: jax.Array, acceleration: jax.Array, centre_fraction: jax.Array
) -> jax.Array:
    """A random Cartesian mask: a fully sampled centre, every other column kept with one probability.

    The probability is such that, on average, the number of columns kept is that of the sampled ones divided by the
    acceleration (Zbontar et al., arXiv:1811.08839, section 4.9; fastMRI's `RandomMaskFunc`). Columns the scanner
    never measured count neither way.

    Args:
      key: PRNG key.
      sampled: (width,) bool, the columns that hold data.
      acceleration: scalar, at least 1.
      centre_fraction: scalar in 0..1, the share of the sampled columns that forms the centre.

    Returns:
      (width,) bool.
    """
    width = sampled.shape[0]
    columns = sampled.sum()
    centre = jnp.round(columns * centre_fraction)
    # As fastMRI places it: from (width - centre + 1) // 2 on.
    start = (width - centre + 1) // 2
    position = jnp.arange(width)
    is_centre = (position >= start) & (position < start + centre)
    others = jnp.maximum(columns - centre, 1)
    probability = (columns / acceleration - centre) / others
    return sampled & (is_centre | (jax.random.uniform(key, (width,)) < probability))
