"""Augmentation of clean images inside the jitted step: random geometry, contrast and coils."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from mrjax.mri.coils import root_sum_of_squares
from mrjax.ops.platform import by_platform


@dataclasses.dataclass(frozen=True)
class Augment:
    """Ranges and probabilities (`_p`) of the transformations; by default none happens.

    Values are drawn uniformly and independently, scales log-uniformly. An image is flipped, scaled along its own axes
    and rotated, both about its centre, and translated; then its contrast is changed, and its coils are mixed.
    """

    rotation: float = 180.0  # degrees, either way
    rotation_p: float = 0.0
    scale: tuple[float, float] = (0.9, 1.1)  # of height and width alike
    scale_p: float = 0.0
    anisotropy: tuple[float, float] = (0.9, 1.1)  # of height over width, at constant area
    anisotropy_p: float = 0.0
    translation: float = 0.1  # fraction of height and of width, either way
    translation_p: float = 0.0
    flip_p: float = 0.0  # left and right
    flip_vertical_p: float = 0.0
    contrast: tuple[float, float] = (-1.0, 1.3)  # what the brightest pixel loses of its signal (see `change_contrast`)
    contrast_p: float = 0.0
    coils_p: float = 0.0  # other coils: random mixtures of the file's, of a random number


def draw_affine(key: Array | None, augment: Augment, height: int, width: int) -> Array | None:
    """Draw the affine map of one example: float32 (2, 3), from (row, column, 1) in the output to those in the input.

    It is exactly the identity if nothing was drawn, and exact for flips alone. None without a key (in evaluation), and
    if no transformation has a probability.
    """
    if key is None or not any(value > 0 for name, value in vars(augment).items() if name.endswith("_p")):
        return None
    shift = augment.translation
    low, high, probability, neutral = jnp.array(
        [
            (-augment.rotation, augment.rotation, augment.rotation_p, 0),
            (*augment.scale, augment.scale_p, 1),
            (*augment.anisotropy, augment.anisotropy_p, 1),
            (-1, -1, augment.flip_vertical_p, 1),
            (-1, -1, augment.flip_p, 1),
            (-shift * height, shift * height, augment.translation_p, 0),
            (-shift * width, shift * width, augment.translation_p, 0),
        ],
        jnp.float32,
    ).T
    chance, value = jax.random.uniform(key, (2, len(low)))
    chance = chance.at[-1].set(chance[-2])  # a translation happens in both directions or in none
    angle, scale, anisotropy, flip_y, flip_x, shift_y, shift_x = jnp.where(
        chance < probability, low + (high - low) * value, neutral
    )
    angle, stretch = jnp.deg2rad(angle), jnp.sqrt(anisotropy)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    unscale = jnp.array([flip_y / (scale * stretch), flip_x * stretch / scale])
    linear = unscale[:, None] * jnp.array([[cos, -sin], [sin, cos]])
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2], jnp.float32)
    # A sum, not a matrix product, which a TPU rounds to bfloat16: whole pixels of error.
    offset = centre - (linear * (centre + jnp.array([shift_y, shift_x]))).sum(1)
    return jnp.concatenate([linear, offset[:, None]], axis=1)


def vary(key: Array | None, augment: Augment, images: Array, present: Array) -> tuple[Array, Array]:
    """Change the contrast and the coils of coil images (..., coils, height, width) complex64, alike for all of them.

    `present` (..., coils) bool are the coils that are not empty; those of the result are returned beside it.

    The signal s of a pixel, as a share of the image's maximum, becomes s |1 - c s| with one c drawn from `contrast`: at
    1 and above, what was bright becomes dark. Other coils are random mixtures of those that are not empty, and from one
    to all of these are kept. The maximum of each root-sum-of-squares image stays. Nothing changes without a key.
    """
    if key is None or augment.contrast_p == augment.coils_p == 0:
        return images, present
    keys = jax.random.split(key, 4)
    changes = jax.random.uniform(keys[0], (2,)) < jnp.array([augment.contrast_p, augment.coils_p])
    coils = images.shape[-3]
    anywhere = present.any(tuple(range(present.ndim - 1)))
    count = jax.random.randint(keys[1], (), 1, jnp.maximum(anywhere.sum(), 1) + 1)
    kept = anywhere & (jnp.cumsum(anywhere) <= count)
    mixture = jax.random.normal(keys[2], (coils, coils), jnp.complex64) * kept[:, None]
    mixture = jnp.where(changes[1], mixture, jnp.eye(coils))[..., None, None]
    mixed = by_platform(mixture, images, cpu=mix_coil_by_coil, default=mix_by_sum)
    low, high = augment.contrast
    strength = jnp.where(changes[0], jax.random.uniform(keys[3], minval=low, maxval=high), 0)
    signal = root_sum_of_squares(mixed)
    factor = abs(1 - strength * _share(signal, signal.max((-2, -1), keepdims=True)))
    before, after = (x.max((-2, -1), keepdims=True) for x in (root_sum_of_squares(images), signal * factor))
    present = jnp.where(changes[1], kept & present.any(-1, keepdims=True), present)
    return mixed * (factor * _share(before, after))[..., None, :, :], present


def mix_by_sum(mixture: Array, images: Array) -> Array:
    """Mix coil images (..., coils, height, width) by a matrix (coils, coils, 1, 1).

    Not by a matrix product, which would write its result before the contrast is changed.
    """
    return (mixture * images[..., None, :, :, :]).sum(-3)


def mix_coil_by_coil(mixture: Array, images: Array) -> Array:
    """Compute `mix_by_sum` as a CPU does it faster; compiled for a GPU or a TPU it moves more memory."""
    return sum((mixture[:, i] * images[..., i : i + 1, :, :] for i in range(len(mixture))), jnp.zeros_like(images))


def _share(x: Array, whole: Array) -> Array:
    return x / jnp.where(whole > 0, whole, 1)


def warp(images: Array, affine: Array) -> Array:
    """Resample real or complex (..., height, width) bilinearly by a map of `draw_affine`; zero outside the grid.

    Equals `scipy.ndimage.affine_transform(order=1, mode="grid-constant")` image by image. (SciPy's "constant" cuts to
    zero within the last pixel: a rounding error of 1e-6 pixels could blank a whole border.)
    """
    height, width = images.shape[-2:]
    row, column = jnp.arange(height, dtype=jnp.float32)[:, None], jnp.arange(width, dtype=jnp.float32)
    y, x = (a * row + b * column + c for a, b, c in affine)
    channels = images.reshape(-1, height, width)
    return by_platform(channels, y, x, tpu=interpolate_row_pairs, default=interpolate).reshape(images.shape)


def interpolate(images: Array, y: Array, x: Array) -> Array:
    """Interpolate `images` (channels, height, width) bilinearly at rows `y` and columns `x` (height, width) float32."""
    height, width = images.shape[1:]
    above, left = jnp.floor(y), jnp.floor(x)
    rows, columns = (jnp.stack(four) for four in ((above, above, above + 1, above + 1), (left, left + 1) * 2))
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    weights = jnp.where(inside, (1 - abs(y - rows)) * (1 - abs(x - columns)), 0)
    corners = images.at[:, rows.astype(jnp.int32), columns.astype(jnp.int32)].get(mode="clip")
    return (weights * corners).sum(1).astype(images.dtype)


def interpolate_row_pairs(images: Array, y: Array, x: Array) -> Array:
    """Compute `interpolate` by one gather for all channels and corners of a pixel, from two rows of a TPU's memory.

    An eighth of the gathers and 1/30 of the memory traffic, compiled for a v5e.
    """
    parts = jnp.concatenate([images.real, images.imag]) if jnp.iscomplexobj(images) else images
    channels, height, width = parts.shape
    above, left = jnp.clip(jnp.floor(y), 0, height - 2), jnp.clip(jnp.floor(x), 0, width - 2)
    corners = jax.lax.gather(
        jnp.concatenate([parts, jnp.roll(parts, -1, 2)]),
        jnp.stack([above, left], -1).astype(jnp.int32),
        jax.lax.GatherDimensionNumbers(offset_dims=(0, 1, 2), collapsed_slice_dims=(), start_index_map=(1, 2)),
        (2 * channels, 2, 1),
        mode="promise_in_bounds",
    ).reshape(2, channels, 2, height, width)
    # Weights are zero beyond one pixel: outside the grid, the clipped corners are not those of the position.
    row_weights = [jnp.maximum(1 - abs(y - above - row), 0) for row in range(2)]
    column_weights = [jnp.maximum(1 - abs(x - left - column), 0) for column in range(2)]
    terms = (row_weights[i] * column_weights[j] * corners[j, :, i] for i in range(2) for j in range(2))
    result = sum(terms, jnp.float32(0))
    if not jnp.iscomplexobj(images):
        return result.astype(images.dtype)
    return jax.lax.complex(*jnp.split(result, 2))
