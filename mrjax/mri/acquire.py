"""From a ground truth to what a scanner with less time would have measured."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mrjax.mri import masks


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """How an accelerated scan is simulated.

    Attributes:
      accelerations: one of these is drawn.
      centre_fractions: of the sampled columns, for each acceleration.
      noise: (low, high), drawn uniformly: standard deviation of the real and of the imaginary part of the noise added
        to every coil, as a fraction of the ground truth's maximum.
    """

    accelerations: tuple[float, ...]
    centre_fractions: tuple[float, ...]
    noise: tuple[float, float]


def undersample(
    kspace: jax.Array, sampled: jax.Array, peak: jax.Array, keys: tuple[jax.Array, jax.Array], how: Acquisition
) -> tuple[jax.Array, jax.Array]:
    """Keeps random columns of one slice's k-space and adds complex Gaussian noise to them.

    Args:
      kspace: (coils, height, width) complex64.
      sampled: (width,) bool, the columns the scanner measured.
      peak: scalar, maximum of the ground truth.
      keys: two PRNG keys: one for the mask and the noise level, one for the noise itself.
      how: accelerations, centre fractions and noise levels to draw from.

    Returns:
      (coils, height, width) complex64, zero where nothing was measured; and the mask (1, width) bool.
    """
    protocol, samples = keys
    choose, columns, level = jax.random.split(protocol, 3)
    choice = jax.random.randint(choose, (), 0, len(how.accelerations))
    mask = masks.random_columns(
        columns, sampled, jnp.asarray(how.accelerations)[choice], jnp.asarray(how.centre_fractions)[choice]
    )
    if how.noise[1] > 0:
        sigma = peak * jax.random.uniform(level, (), minval=how.noise[0], maxval=how.noise[1])
        # A key for each coil: batches hold empty coils where files differ in their number, which must change nothing.
        of_coil = jax.vmap(jax.random.fold_in, (None, 0))(samples, jnp.arange(len(kspace)))
        draw = lambda key: jax.random.normal(key, kspace.shape[1:], jnp.complex64)  # noqa: E731
        # JAX's complex normal has half its variance in each part.
        noise = math.sqrt(2) * sigma * jax.vmap(draw)(of_coil)
        present = jnp.any(kspace != 0, axis=(-2, -1), keepdims=True)
        kspace = kspace + jnp.where(present, noise, 0)
    return jnp.where(mask, kspace, 0), mask[None]
