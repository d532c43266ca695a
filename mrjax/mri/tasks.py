"""Tasks: from a batch as it comes from disk to what a network is given and should give, on the device.

A task is a function `make(batch, keys) -> Example`. `batch` holds arrays with a leading batch axis; `keys` says where
the randomness comes from: Keys(augment, protocol, noise), each (batch,) PRNG keys; augment is None in evaluation.
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


class Example(NamedTuple):
    """Examples of a batch, in the file's units.

    Attributes:
      corrupted: (batch, height, width) float32, the image to be improved.
      target: (batch, height, width) float32, the truth.
      kspace: (batch, coils, height, width) complex64, what was measured, zero elsewhere; None if the task has images.
      mask: (batch, 1 or height, width) bool, where k-space was measured; None if the task has images.
      around: (batch, height, width, neighbours) float32, corrupted images of the slices beside it; None if not asked.
    """

    corrupted: jax.Array
    target: jax.Array
    kspace: jax.Array | None = None
    mask: jax.Array | None = None
    around: jax.Array | None = None


Task = Callable[[Batch, Keys], Example]


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


def kspace(acquisition: Acquisition, augment: Augment) -> Task:
    """Multi-coil k-space, undersampled; the truth is the root-sum-of-squares of its fully sampled coils.

    The batch holds `kspace` (batch, coils, height, width) complex64.
    """

    def example(kspace: jax.Array, keys: Keys) -> Example:
        sampled = jnp.any(kspace != 0, axis=(0, 1))
        if keys.augment is not None and augment.active:
            images = warp(ifft2c(kspace), draw(keys.augment, augment, *kspace.shape[-2:]))
            kspace, target = fft2c(images), root_sum_of_squares(images)
        else:
            target = magnitude(kspace)
        measured, mask = undersample(kspace, sampled, target, (keys.protocol, keys.noise), acquisition)
        return Example(magnitude(measured), target, measured, mask)

    return lambda batch, keys: jax.vmap(example)(batch["kspace"], keys)


def as_given(batch: Batch, keys: Keys) -> Example:
    """What is corrupted already, undersampled `kspace` or an `input` image, standing for the unknown truth as well."""
    if "kspace" not in batch:
        return Example(batch["input"], batch["input"])
    kspace = batch["kspace"]
    image, mask = magnitude(kspace), jnp.any(kspace != 0, axis=(1, 2))
    return Example(image, image, kspace, mask[:, None])


def paired(acquisition: Acquisition, augment: Augment) -> Task:
    """Corrupted and clean images from the file: `input` and `target` (batch, height, width) float32."""

    def example(corrupted: jax.Array, target: jax.Array, keys: Keys) -> Example:
        if keys.augment is not None and augment.active:
            both = jnp.stack([corrupted, target])
            corrupted, target = warp(both, draw(keys.augment, augment, *target.shape))
        return Example(corrupted, target)

    return lambda batch, keys: jax.vmap(example)(batch["input"], batch["target"], keys)


TASKS: dict[str, Callable[[Acquisition, Augment], Task]] = {"kspace": kspace, "paired": paired}
