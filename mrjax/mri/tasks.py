"""Tasks: from a batch as it comes from disk to what a network is given and should give, on the device.

A task is a function `make(batch, keys) -> Example`. `batch` holds arrays with a leading batch axis; `keys` says where
the randomness comes from: Keys(augment, protocol, noise), each (batch,) PRNG keys; augment is None in evaluation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mrjax.mri.acquire import Acquisition, find_echo, undersample
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

    The batch holds `kspace` (batch, coils, height, width) complex64, or (batch, 1 + neighbours, coils, height, width);
    and `mask` (batch, width), the columns to keep, if files store it.
    """

    def example(kspace: jax.Array, stored: jax.Array | None, keys: Keys) -> Example:
        kspace, beside = _apart(kspace, 3)
        sampled = jnp.any(kspace != 0, axis=(0, 1))
        if stored is not None:
            sampled &= stored.astype(bool)
        if keys.augment is not None and augment.active:
            affine = draw(keys.augment, augment, *kspace.shape[-2:])
            images = warp(ifft2c(kspace), affine)
            kspace, target = fft2c(images), root_sum_of_squares(images)
            beside = None if beside is None else _warped(beside, affine)
        else:
            target = magnitude(kspace)
        return _measured(kspace, beside, sampled, target, keys, acquisition)

    return lambda batch, keys: jax.vmap(example)(batch["kspace"], batch.get("mask"), keys)


def denoise(acquisition: Acquisition, augment: Augment) -> Task:
    """One repetition of a scan, to become the mean of its other repetitions, which share nothing of its noise.

    The batch holds `kspace` as for the task 'kspace', and `repetitions` (batch, repetitions, coils, height, width)
    complex64 without the one in `kspace`; empty ones count for nothing. Acceleration 1 and noise 0 take `kspace` as
    measured.

    The mean is one of root-sum-of-squares magnitudes, as M4Raw's (Lyu et al., doi:10.1038/s41597-023-02181-4), not of
    complex coil images: between repetitions the phase drifts with the field of a 0.3 T magnet, by different amounts
    across the head, and the mean of two complex images out of phase by p loses a share 1 - cos(p/2) of their signal.
    The price is the noise floor of a magnitude (Rice's; for n coils about the root of signal^2 + 2 n sigma^2 instead of
    the signal, 15 % more at a signal of 5 sigma in 4 coils), which no number of repetitions averages away. It is as
    high in the target as in the input and in every file's own image, and what noise2noise tends to has it too: what is
    learnt is the expected image of one scan.

    Augmentation moves input and target alike. But for flips it interpolates, which smooths the noise that is to be
    removed: prefer flips alone.
    """

    def example(kspace: jax.Array, others: jax.Array, keys: Keys) -> Example:
        kspace, beside = _apart(kspace, 3)
        sampled = jnp.any(kspace != 0, axis=(0, 1))
        if keys.augment is not None and augment.active:
            affine = draw(keys.augment, augment, *kspace.shape[-2:])
            kspace, others = _warped(kspace, affine), _warped(others, affine)
            beside = None if beside is None else _warped(beside, affine)
        count = _present(others).sum()
        target = magnitude(others).sum(0) / jnp.maximum(count, 1)
        return _measured(kspace, beside, sampled, target, keys, acquisition)

    return lambda batch, keys: jax.vmap(example)(batch["kspace"], batch["repetitions"], keys)


def noise2noise(acquisition: Acquisition, augment: Augment) -> Task:
    """One repetition, to become another one, drawn anew each time: no mean at all (Lehtinen et al., arXiv:1803.04189).

    The noise of the target is independent of the input's, so that a network trained on the squared error tends to the
    mean all the same. It is evaluated as one of the task `denoise`, whose batches these are: against the mean.
    """
    towards = denoise(acquisition, augment)

    def one_of(others: jax.Array, key: jax.Array) -> jax.Array:
        chance = jax.random.uniform(key, (len(others),))
        return others[jnp.argmax(jnp.where(_present(others), chance, -1))][None]

    def make(batch: Batch, keys: Keys) -> Example:
        if keys.augment is None:
            return towards(batch, keys)
        choose, affine = jnp.moveaxis(jax.vmap(jax.random.split)(keys.augment), 1, 0)
        return towards(
            batch | {"repetitions": jax.vmap(one_of)(batch["repetitions"], choose)}, keys._replace(augment=affine)
        )

    return make


def as_given(batch: Batch, keys: Keys) -> Example:
    """What is corrupted already, undersampled `kspace` or an `input` image, standing for the unknown truth as well."""

    def of_kspace(kspace: jax.Array) -> Example:
        kspace, beside = _apart(kspace, 3)
        image, mask = magnitude(kspace), jnp.any(kspace != 0, axis=(0, 1))
        return Example(image, image, kspace, mask[None], _channels(None if beside is None else magnitude(beside)))

    def of_image(corrupted: jax.Array) -> Example:
        corrupted, beside = _apart(corrupted, 2)
        return Example(corrupted, corrupted, around=_channels(beside))

    return jax.vmap(of_kspace)(batch["kspace"]) if "kspace" in batch else jax.vmap(of_image)(batch["input"])


def paired(acquisition: Acquisition, augment: Augment) -> Task:
    """Corrupted and clean images from the file.

    The batch holds `input` (batch, height, width) float32, or (batch, 1 + neighbours, height, width), and `target`
    (batch, height, width) float32.
    """

    def example(corrupted: jax.Array, target: jax.Array, keys: Keys) -> Example:
        corrupted, beside = _apart(corrupted, 2)
        if keys.augment is not None and augment.active:
            affine = draw(keys.augment, augment, *target.shape)
            corrupted, target = warp(jnp.stack([corrupted, target]), affine)
            beside = None if beside is None else warp(beside, affine)
        return Example(corrupted, target, around=_channels(beside))

    return lambda batch, keys: jax.vmap(example)(batch["input"], batch["target"], keys)


def _apart(data: jax.Array, axes: int) -> tuple[jax.Array, jax.Array | None]:
    """A slice, of so many axes, and its neighbours if it comes with any."""
    return (data, None) if data.ndim == axes else (data[0], data[1:])


def _present(repetitions: jax.Array) -> jax.Array:
    """(repetitions,) bool: which of (repetitions, coils, height, width) were measured."""
    return jnp.any(repetitions != 0, axis=(1, 2, 3))


def _warped(kspace: jax.Array, affine: jax.Array) -> jax.Array:
    """K-space (..., coils, height, width) of the images moved by `warp`."""
    images = ifft2c(kspace)
    return fft2c(warp(images.reshape(-1, *images.shape[-2:]), affine).reshape(images.shape))


def _channels(images: jax.Array | None) -> jax.Array | None:
    """(neighbours, height, width) -> (height, width, neighbours)."""
    return None if images is None else jnp.moveaxis(images, 0, -1)


def _measured(
    kspace: jax.Array,
    beside: jax.Array | None,
    sampled: jax.Array,
    target: jax.Array,
    keys: Keys,
    acquisition: Acquisition,
) -> Example:
    """One slice undersampled, and its neighbours by the same mask and noise level, each with noise of its own."""
    echo = find_echo(kspace)

    def measure(kspace: jax.Array, samples: jax.Array) -> tuple[jax.Array, jax.Array]:
        return undersample(kspace, sampled, target, (keys.protocol, samples), acquisition, echo)

    measured, mask = measure(kspace, keys.noise)
    around = None
    if beside is not None:
        # From numbers that the slice's own coils will never take.
        own = jax.vmap(jax.random.fold_in, (None, 0))(keys.noise, 2**30 + jnp.arange(len(beside)))
        around = _channels(magnitude(jax.vmap(measure)(beside, own)[0]))
    return Example(magnitude(measured), target, measured, mask, around)


TASKS: dict[str, Callable[[Acquisition, Augment], Task]] = {
    "kspace": kspace,
    "paired": paired,
    "denoise": denoise,
    "noise2noise": noise2noise,
}
