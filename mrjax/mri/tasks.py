"""Tasks: from a batch as it comes from disk to (corrupted, target) image pairs, on the device.

A task is a function `pair(batch, keys) -> (corrupted, target)`, both (batch, height, width) float32 in the file's
units. `batch` holds arrays with a leading batch axis; `keys` says where the randomness comes from:
  Keys(augment, protocol, noise), each (batch,) PRNG keys; augment is None in evaluation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mrjax.mri.acquire import Acquisition, undersample
from mrjax.mri.augment import Augment, draw, warp
from mrjax.mri.coils import magnitude, root_sum_of_squares
from mrjax.mri.fourier import fft2c, ifft2c

Batch = dict[str, jax.Array]


class Keys(NamedTuple):
    """PRNG keys of the examples of a batch, each (batch,)."""

    augment: jax.Array | None
    protocol: jax.Array
    noise: jax.Array


def training_keys(seed: int, index: jax.Array) -> Keys:
    """Keys that depend on the seed and on each example's place in the endless training stream, and on nothing else.

    Whatever batch, device or process an example comes through, and after any restart, it is corrupted alike.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
    return Keys(*jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0))


def evaluation_keys(volume: jax.Array, slice_number: jax.Array) -> Keys:
    """Keys that depend on the volume's name alone (its hash), and for the noise on the slice as well.

    All slices of a volume share one mask, and every evaluation of every model sees the same one.
    """
    of_volume = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), volume)
    protocol, noise = jnp.moveaxis(jax.vmap(jax.random.split)(of_volume), 1, 0)
    return Keys(None, protocol, jax.vmap(jax.random.fold_in)(noise, slice_number))


def kspace(acquisition: Acquisition, augment: Augment) -> Callable[[Batch, Keys], tuple[jax.Array, jax.Array]]:
    """Multi-coil k-space, undersampled; the truth is the root-sum-of-squares of its fully sampled coils.

    The batch holds `kspace` (batch, coils, height, width) complex64.
    """

    def example(kspace: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array]:
        sampled = jnp.any(kspace != 0, axis=(0, 1))
        if keys.augment is not None and augment.active:
            images = warp(ifft2c(kspace), draw(keys.augment, augment, *kspace.shape[-2:]))
            kspace, target = fft2c(images), root_sum_of_squares(images)
        else:
            target = magnitude(kspace)
        measured = undersample(kspace, sampled, target.max(), (keys.protocol, keys.noise), acquisition)
        return magnitude(measured), target

    return lambda batch, keys: jax.vmap(example)(batch["kspace"], keys)


def as_given(batch: Batch, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """What is corrupted already, undersampled `kspace` or an `input` image, standing for the unknown truth as well."""
    image = magnitude(batch["kspace"]) if "kspace" in batch else batch["input"]
    return image, image


def paired(acquisition: Acquisition, augment: Augment) -> Callable[[Batch, Keys], tuple[jax.Array, jax.Array]]:
    """Corrupted and clean images from the file: `input` and `target` (batch, height, width) float32."""

    def example(corrupted: jax.Array, target: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array]:
        if keys.augment is not None and augment.active:
            both = jnp.stack([corrupted, target])
            corrupted, target = warp(both, draw(keys.augment, augment, *target.shape))
        return corrupted, target

    return lambda batch, keys: jax.vmap(example)(batch["input"], batch["target"], keys)


TASKS = {"kspace": kspace, "paired": paired}
