"""Tasks: make a network's examples from a batch of files, on the device.

`TASKS[name](acquisition, augment)` is a task, a function `(batch, keys) -> Example`. `batch` holds arrays with a
leading batch axis; a slice may come as one of a stack, (1 + adjacent, ...), the slice itself first.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mrjax.mri.acquire import Acquisition, draw_protocol, measure
from mrjax.mri.augment import Augment, draw_affine, warp
from mrjax.mri.coils import magnitude, root_sum_of_squares
from mrjax.mri.fourier import fft2c, ifft2c

Batch = dict[str, jax.Array]


class Keys(NamedTuple):
    """PRNG keys of the examples of a batch, each (batch,); `augment` is None in evaluation."""

    augment: jax.Array | None
    protocol: jax.Array
    noise: jax.Array


class Example(NamedTuple):
    """Examples of a batch, in the file's units; `kspace` and `mask` are None for tasks on images."""

    corrupted: jax.Array  # (batch, height, width) float32, the image to be improved
    target: jax.Array  # (batch, height, width) float32
    kspace: jax.Array | None = None  # (batch, coils, height, width) complex64, as measured, zero elsewhere
    mask: jax.Array | None = None  # (batch, 1 or height, width) bool, where k-space was measured
    adjacent: jax.Array | None = None  # (batch, height, width, adjacent) float32, corrupted images; None without any


Task = Callable[[Batch, Keys], Example]


def training_keys(seed: int, index: jax.Array) -> Keys:
    """Derive keys from the seed and each example's index in the endless stream alone: alike after any restart."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)
    return Keys(*jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys))


def evaluation_keys(volume: jax.Array, slice_number: jax.Array) -> Keys:
    """Derive keys from the hash of the volume's name, and for the noise from the slice number as well.

    All slices of a volume share one mask, and every evaluation of every model sees the same one.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), volume)
    protocol, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
    return Keys(None, protocol, jax.vmap(jax.random.fold_in)(noise, slice_number))


def kspace(acquisition: Acquisition, augment: Augment) -> Task:
    """Make a task that undersamples multi-coil k-space; the target is the fully sampled root-sum-of-squares image.

    The batch holds `kspace` (batch, [1 + adjacent,] coils, height, width) complex64, and `mask` (batch, width), the
    columns to keep, if files store it.
    """

    def make_example(batch: Batch, keys: Keys) -> Example:
        stack = _as_stack(batch["kspace"], 4)
        sampled = _sampled_columns(stack)
        if "mask" in batch:
            sampled &= batch["mask"].astype(bool)
        affine = _draw_affine(keys, augment, stack)
        if affine is None:
            target = magnitude(stack[0])
        else:
            images = warp(ifft2c(stack), affine)
            stack, target = fft2c(images), root_sum_of_squares(images[0])
        return _acquire(stack, sampled, target, keys, acquisition)

    return jax.vmap(make_example)


def denoise(acquisition: Acquisition, augment: Augment, one_repetition: bool = False) -> Task:
    """Make a task whose input is one repetition of a scan; the target is the mean of the other repetitions.

    The batch holds `kspace` as for the task 'kspace', and `repetitions` (batch, repetitions, coils, height, width)
    complex64, the others; empty ones do not count. Acceleration 1 and noise 0 take `kspace` as measured.

    The mean is one of root-sum-of-squares magnitudes, as M4Raw's (Lyu et al., doi:10.1038/s41597-023-02181-4): between
    repetitions the phase drifts with the field of a 0.3 T magnet, and the mean of two complex images out of phase by p
    loses a share 1 - cos(p/2) of their signal. The price is the noise floor of a magnitude, which no averaging removes
    (about the root of signal^2 + 2 n sigma^2 for n coils); it is the same in the input and in every file's own image.

    With `one_repetition` (the task 'noise2noise') the target in training is one of the others, drawn anew each time
    (Lehtinen et al., arXiv:1803.04189): its noise is independent of the input's, so that the squared error tends to the
    same network as the mean would give.

    Augmentation by anything but flips interpolates, which smooths the noise that is to be removed: prefer flips alone.
    """

    def make_example(batch: Batch, keys: Keys) -> Example:
        stack, repetitions = _as_stack(batch["kspace"], 4), batch["repetitions"]
        sampled = _sampled_columns(stack)
        if one_repetition and keys.augment is not None:
            choice, augmentation = jax.random.split(keys.augment)
            keys = keys._replace(augment=augmentation)
            score = jnp.where(_present(repetitions), jax.random.uniform(choice, (len(repetitions),)), -1)
            repetitions = repetitions[jnp.argmax(score)][None]
        affine = _draw_affine(keys, augment, stack)
        if affine is not None:
            stack, repetitions = (fft2c(warp(ifft2c(x), affine)) for x in (stack, repetitions))
        target = magnitude(repetitions).sum(0) / jnp.maximum(_present(repetitions).sum(), 1)
        return _acquire(stack, sampled, target, keys, acquisition)

    return jax.vmap(make_example)


def paired(acquisition: Acquisition, augment: Augment) -> Task:
    """Make a task of corrupted and clean images from the file; nothing is simulated.

    The batch holds `input` (batch, [1 + adjacent,] height, width) and `target` (batch, height, width) float32.
    """

    def make_example(batch: Batch, keys: Keys) -> Example:
        images = jnp.concatenate([_as_stack(batch["input"], 3), batch["target"][None]])
        affine = _draw_affine(keys, augment, images)
        if affine is not None:
            images = warp(images, affine)
        return _gather(images[:-1], images[-1])

    return jax.vmap(make_example)


@jax.vmap
def as_measured(batch: Batch, keys: Keys) -> Example:
    """Take undersampled `kspace`, or an `input` image, as it is, for the target as well, which nobody knows."""
    if "kspace" not in batch:
        images = _as_stack(batch["input"], 3)
        return _gather(images, images[0])
    stack = _as_stack(batch["kspace"], 4)
    images = magnitude(stack)
    return _gather(images, images[0], stack[0], _sampled_columns(stack)[None])


def _as_stack(data: jax.Array, axes: int) -> jax.Array:
    """Return a stack (1 + adjacent, ...) of so many axes, of a slice alone too."""
    return data if data.ndim == axes else data[None]


def _draw_affine(keys: Keys, augment: Augment, image: jax.Array) -> jax.Array | None:
    """Draw the augmentation of an example; None in evaluation, and where none is configured."""
    if keys.augment is None or not augment.active:
        return None
    return draw_affine(keys.augment, augment, *image.shape[-2:])


def _sampled_columns(stack: jax.Array) -> jax.Array:
    return jnp.any(stack[0] != 0, axis=(0, 1))


def _present(repetitions: jax.Array) -> jax.Array:
    """Find which repetitions (repetitions, coils, height, width) were measured: (repetitions,) bool."""
    return jnp.any(repetitions != 0, axis=(1, 2, 3))


def _acquire(stack: jax.Array, sampled: jax.Array, target: jax.Array, keys: Keys, acquisition: Acquisition) -> Example:
    """Measure a slice and its adjacent slices by one protocol, each with noise of its own."""
    protocol = draw_protocol(keys.protocol, stack[0], sampled, target, acquisition)
    # Numbers above those of the slice's coils, which `white_noise` folds into the same key.
    others = jax.vmap(jax.random.fold_in, (None, 0))(keys.noise, 2**30 + jnp.arange(len(stack) - 1))
    noise_keys = jnp.concatenate([keys.noise[None], others])
    measured = jax.vmap(lambda key, kspace: measure(key, kspace, protocol, acquisition))(noise_keys, stack)
    return _gather(magnitude(measured), target, measured[0], protocol.mask)


def _gather(
    images: jax.Array, target: jax.Array, kspace: jax.Array | None = None, mask: jax.Array | None = None
) -> Example:
    """Make the example of corrupted images (1 + adjacent, height, width)."""
    return Example(images[0], target, kspace, mask, jnp.moveaxis(images[1:], 0, -1) if len(images) > 1 else None)


TASKS: dict[str, Callable[[Acquisition, Augment], Task]] = {
    "kspace": kspace,
    "paired": paired,
    "denoise": denoise,
    "noise2noise": functools.partial(denoise, one_repetition=True),
}
