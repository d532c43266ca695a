"""Tasks: make a network's examples from a batch of files, on the device.

`TASKS[name](acquisition, augment)` is a task, a function `(batch, keys) -> Example`. `batch` holds arrays with a
leading batch axis; a slice may come as one of a stack, (1 + adjacent, ...), the slice itself first.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mrjax.mri.acquire import Acquisition, draw_protocol, measure
from mrjax.mri.augment import Augment, draw_affine, vary, warp
from mrjax.mri.coils import magnitude, root_sum_of_squares
from mrjax.mri.fourier import fft2c, ifft2c

Batch = dict[str, Array]


class Keys(NamedTuple):
    """PRNG keys of the examples of a batch, each (batch,); `augment` is None in evaluation."""

    augment: Array | None
    protocol: Array
    noise: Array


class Example(NamedTuple):
    """Examples of a batch, in the file's units; `kspace` and `mask` are None for tasks on images."""

    corrupted: Array  # (batch, height, width) float32, the image to be improved
    target: Array  # (batch, height, width) float32
    kspace: Array | None = None  # (batch, coils, height, width) complex64, as measured, zero elsewhere
    mask: Array | None = None  # (batch, 1 or height, width) bool, where k-space was measured
    adjacent: Array | None = None  # (batch, height, width, adjacent) float32, corrupted images; None without any


Task = Callable[[Batch, Keys], Example]


def training_keys(seed: int, index: Array) -> Keys:
    """Derive keys from the seed and each example's index in the endless stream alone: alike after any restart."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
    return Keys(*jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys))


def evaluation_keys(volume: Array, slice_number: Array) -> Keys:
    """Derive keys from the hash of the volume's name, and for the noise from the slice number as well.

    All slices of a volume share one mask, and every evaluation of every model sees the same one.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), volume)
    protocol, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
    return Keys(None, protocol, jax.vmap(jax.random.fold_in)(noise, slice_number))


def kspace(acquisition: Acquisition, augment: Augment) -> Task:
    """Make a task that undersamples multi-coil k-space; the target is the fully sampled root-sum-of-squares image.

    The batch holds `kspace` (batch, [1 + adjacent,] coils, height, width) complex64, and `mask` (batch, 1 or height,
    width) bool, the samples to keep, if files store it.
    """
    return jax.vmap(functools.partial(_acquire, acquisition, augment))


def denoise(acquisition: Acquisition, augment: Augment, one_repetition: bool = False) -> Task:
    """Make a task whose input is one repetition of a scan; the target is the mean of the other repetitions.

    The batch holds `kspace` as for the task 'kspace', and `repetitions` (batch, repetitions, coils, height, width)
    complex64, the others; empty ones do not count. Acceleration 1 and noise 0 take `kspace` as measured.

    The mean is one of root-sum-of-squares magnitudes, as M4Raw's (Lyu et al., doi:10.1038/s41597-023-02181-4): between
    repetitions the phase drifts, and the mean of two complex images out of phase by p loses 1 - cos(p/2) of the signal.
    The noise floor of a magnitude stays (about the root of signal^2 + 2 n sigma^2 for n coils), as in the input.

    With `one_repetition` (the task 'noise2noise') the target in training is one of the others, drawn anew each time.
    Its noise is independent of the input's: the squared error tends to the same network (Lehtinen, arXiv:1803.04189).

    Augmentation by anything but flips interpolates, which smooths the noise that is to be removed: prefer flips alone.
    """

    def make_example(batch: Batch, keys: Keys) -> Example:
        repetitions = batch["repetitions"]
        if one_repetition and keys.augment is not None:
            choice, augmentation = jax.random.split(keys.augment)
            keys = keys._replace(augment=augmentation)
            present = jnp.any(repetitions != 0, axis=(1, 2, 3))
            drawn = jnp.argmax(jnp.where(present, jax.random.uniform(choice, present.shape), -1))
            repetitions = repetitions[drawn][None]
        return _acquire(acquisition, augment, batch, keys, repetitions)

    return jax.vmap(make_example)


def paired(acquisition: Acquisition, augment: Augment) -> Task:
    """Make a task of corrupted and clean images from the file; nothing is simulated.

    The batch holds `input` (batch, [1 + adjacent,] height, width) and `target` (batch, height, width) float32.
    """

    def make_example(batch: Batch, keys: Keys) -> Example:
        (corrupted, adjacent), target = _split_adjacent(batch["input"], 2), batch["target"]
        affine = draw_affine(keys.augment, augment, *target.shape[-2:])
        if affine is not None:
            corrupted, target = warp(jnp.stack([corrupted, target]), affine)
            adjacent = warp(adjacent, affine)
        return Example(corrupted, target, adjacent=_channels(adjacent))

    return jax.vmap(make_example)


@jax.vmap
def as_measured(batch: Batch, keys: Keys) -> Example:
    """Take undersampled `kspace`, or an `input` image, as it is, for the target as well, which nobody knows."""
    if "kspace" not in batch:
        image, adjacent = _split_adjacent(batch["input"], 2)
        return Example(image, image, adjacent=_channels(adjacent))
    kspace, adjacent = _split_adjacent(batch["kspace"], 3)
    image, mask = magnitude(kspace), jnp.any(kspace != 0, axis=0)
    return Example(image, image, kspace, mask, _channels(magnitude(adjacent)))


def _split_adjacent(data: Array, axes: int) -> tuple[Array, Array]:
    """Split a stack (1 + adjacent, ...), or a slice alone, into the slice of so many axes and its adjacent slices."""
    stack = data[None] if data.ndim == axes else data
    return stack[0], stack[1:]


def _channels(adjacent: Array) -> Array | None:
    """Make images (adjacent, height, width) channels, the last axis; None without any."""
    return jnp.moveaxis(adjacent, 0, -1) if len(adjacent) else None


def _augment(kspace: Array, present: Array, key: Array | None, augment: Augment) -> tuple[Array, Array, Array]:
    """Augment k-space (..., coils, height, width) with these coils (..., coils) bool, and reconstruct its image.

    Returns k-space, the coils that are present in it, and the root-sum-of-squares image.
    """
    affine = draw_affine(key, augment, *kspace.shape[-2:])
    if key is None or affine is None:
        return kspace, present, magnitude(kspace)
    images, present = vary(jax.random.fold_in(key, 1), augment, warp(ifft2c(kspace), affine), present)
    return fft2c(images), present, root_sum_of_squares(images)


def _acquire(
    acquisition: Acquisition, augment: Augment, batch: Batch, keys: Keys, repetitions: Array | None = None
) -> Example:
    """Augment an example, then measure the slice and its adjacent slices by one protocol, each with noise of its own.

    The target is the image of the slice, or the mean one of `repetitions` (repetitions, coils, height, width).
    """
    kspace, adjacent = _split_adjacent(batch["kspace"], 3)
    columns = jnp.any(kspace != 0, axis=1)  # of each coil
    sampled, present = columns.any(0), columns.any(1)
    if "mask" in batch:
        sampled &= batch["mask"].any(0)
    kspace, present, target = _augment(kspace, present, keys.augment, augment)
    adjacent, adjacent_present, _ = _augment(adjacent, _present(adjacent), keys.augment, augment)
    if repetitions is not None:
        measured_coils = _present(repetitions)
        images = _augment(repetitions, measured_coils, keys.augment, augment)[2]
        target = images.sum(0) / jnp.maximum(measured_coils.any(1).sum(), 1)
    protocol = draw_protocol(keys.protocol, kspace, sampled, target, acquisition)
    if "mask" in batch:
        protocol = protocol._replace(mask=protocol.mask & batch["mask"])
    measured = measure(keys.noise, kspace, present, protocol, acquisition)
    # Numbers above those of the slice's coils, which `white_noise` folds into the same key.
    noise_keys = jax.vmap(jax.random.fold_in, (None, 0))(keys.noise, 2**30 + jnp.arange(len(adjacent)))
    measure_adjacent = jax.vmap(lambda key, x, coils: measure(key, x, coils, protocol, acquisition))
    adjacent = measure_adjacent(noise_keys, adjacent, adjacent_present)
    return Example(magnitude(measured), target, measured, protocol.mask, _channels(magnitude(adjacent)))


def _present(kspace: Array) -> Array:
    """Find the coils (..., coils) bool of k-space (..., coils, height, width) that are not empty."""
    return jnp.any(kspace != 0, axis=(-2, -1))


TASKS: dict[str, Callable[[Acquisition, Augment], Task]] = {
    "kspace": kspace,
    "paired": paired,
    "denoise": denoise,
    "noise2noise": functools.partial(denoise, one_repetition=True),
}
