"""The U-Net of the field, fastMRI's baseline, written for XLA.

Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015; Zbontar et al., "fastMRI", arXiv:1811.08839. Given the same weights,
`UNet(pool="avg")` computes what `fastmri.models.Unet` computes, for odd sizes too.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mrjax.errors import UserError
from mrjax.models.convolution import convolve, multiply

_EPSILON = 1e-5
_SLOPE = 0.2
# Bounds of 1 / sqrt(fan in), PyTorch's default for convolutions, so that fastMRI's hyper-parameters carry over.
# PyTorch counts the fan-in of a transposed convolution over its output channels.
_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_UP_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2)


def max_pool(x: Array, fold: int = 1) -> Array:
    """2x2 maxima, (b, h, w, c) to (b, h // 2, w // 2, c); of equals the first has the gradient, as in PyTorch.

    Not `reduce_window`, whose gradient takes 5 to 12 times as long on a CPU and moves more memory on a GPU. What is
    kept for it are the places of the maxima, a byte each.

    With `fold` pixels as one, (b, h, w, fold c) to (b, h // 2, w, fold c): the maxima are where the first of each two
    pixels was, and beside them is what means nothing. So no pixel leaves its lanes.
    """
    return _greatest(*_corners(x)).astype(x.dtype) if fold == 1 else _greatest_folded(fold, x)


@jax.custom_vjp
def _greatest(*corners: Array) -> Array:
    return _greatest_and_place(*corners)[0]


def _greatest_and_place(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    above, below = jnp.maximum(a, b), jnp.maximum(c, d)
    place = jnp.where(above >= below, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.maximum(above, below), place.astype(jnp.uint8)


def _to_the_place(place: Array, gradient: Array) -> tuple[Array, ...]:
    return tuple(jnp.where(place == corner, gradient, 0) for corner in range(4))


_greatest.defvjp(_greatest_and_place, _to_the_place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _greatest_folded(fold: int, x: Array) -> Array:
    return _greatest_and_place(*_corners(x, fold))[0]


def _to_the_place_folded(fold: int, place: Array, gradient: Array) -> tuple[Array]:
    b, h, w, lanes = gradient.shape
    second = np.arange(lanes) // (lanes // fold) % 2
    from_first = np.arange(lanes) - lanes // fold * second
    place, gradient = (_lanes(x, from_first)[:, :, None] for x in (place.astype(gradient.dtype), gradient))
    here = place == 2 * np.arange(2)[:, None, None] + second
    return (jnp.where(here, gradient, 0).reshape(b, 2 * h, w, lanes),)


def _lanes(x: Array, order: np.ndarray) -> Array:
    """`x[..., order]` as a product with ones and zeros, exact: a TPU moves lanes much faster by that."""
    matrix = np.arange(x.shape[-1])[:, None] == order
    return jnp.dot(x, matrix.astype(x.dtype), precision="highest")


_greatest_folded.defvjp(lambda fold, x: _greatest_and_place(*_corners(x, fold)), _to_the_place_folded)


def avg_pool(x: Array, fold: int = 1) -> Array:
    """2x2 means, (b, h, w, c) to (b, h // 2, w // 2, c); of pixels as one as `max_pool` has it."""
    a, b, c, d = (corner.astype(jnp.float32) for corner in _corners(x, fold))
    return ((a + b + c + d) / 4).astype(x.dtype)


def _corners(x: Array, fold: int = 1) -> tuple[Array, ...]:
    """The four pixels of each 2x2 block; with `fold` of them as one, at the first of each two and nowhere else.

    Float32 where they are not folded, for bfloat16 too: a CPU rounds at each step of the gradient, which joins the
    four, and takes 10 times as long.
    """
    b, h, w, c = x.shape
    if fold == 1:
        blocks = x.astype(jnp.float32)[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
        return tuple(blocks[:, :, row, :, column] for row in range(2) for column in range(2))
    rows = x.reshape(b, h // 2, 2, w, c)
    next_one = np.roll(np.arange(c), -c // fold)
    return tuple(pixel for row in range(2) for pixel in (rows[:, :, row], _lanes(rows[:, :, row], next_one)))


def _as_it_is(x: Array, fold: int) -> Array:
    return x


def _max_pooled(x: Array, fold: int) -> tuple[Array, Array]:
    return x, max_pool(x, fold)


def _avg_pooled(x: Array, fold: int) -> tuple[Array, Array]:
    return x, avg_pool(x, fold)


_POOLED = {"max": _max_pooled, "avg": _avg_pooled}


class UNet(nn.Module):
    """Image to image, (batch, height, width, any channels) to (batch, height, width, out_channels), of any size.

    Parameters, all float32: `down_<i>/conv_<0|1>/kernel` (3, 3, in, out), `bottleneck/conv_<0|1>/kernel`,
    `up_<i>/transpose/kernel` (2, 2, in, out), `up_<i>/conv_<0|1>/kernel`, `head/kernel` (channels, out_channels) and
    `head/bias`.
    Level i works at 1 / 2^i of the resolution on the way down and up alike; the first channels that `up_<i>/conv_0`
    sees are the upsampled ones.

    Attributes:
        channels: how many at full resolution; each level down has twice as many.
        levels: how often the resolution is halved.
        pool: "max", or "avg" as fastMRI has it.
        out_channels: of the result.
        residual: whether the network computes a correction, which is then added to the first channel of the input.
        zero_head: whether the last layer starts at zero, as it does in a residual network.
        dtype: of the activations, float32 or bfloat16; statistics and result are float32 either way.
        remat: whether the backward pass computes each level's activations again from what enters the level, instead
            of keeping them.
        lanes: 128 on a TPU, whose memory is laid out in rows of 128 channels: pixels side by side are then kept and
            convolved as one, until they have that many, instead of being padded. 1 elsewhere.
    """

    channels: int = 32
    levels: int = 4
    pool: str = "max"
    out_channels: int = 1
    residual: bool = False
    zero_head: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    lanes: int = 1

    needs: ClassVar[tuple[str, ...]] = ("image",)

    @staticmethod
    def smallest_side(levels: int) -> int:
        """The least height or width that leaves 2 pixels after `levels` halvings: one pixel alone normalises to 0."""
        return 2 ** (levels + 1)

    @property
    def multiple(self) -> int:
        """Of this are the heights and widths at which every level has twice the pixels of the one below."""
        return 2**self.levels

    @nn.compact
    def __call__(self, image: Array, canvas: Array | None = None) -> Array:
        """(batch, height, width, any channels) float32 to (batch, height, width, out_channels) float32.

        Args:
            image: zero outside its canvas.
            canvas: (batch, 2) int32, height and width of the upper left part of each image that is there to the
                network, which gives in it what it would give for that part alone; all of it by default. These numbers
                and those of the whole are multiples of `multiple`.
        """
        if self.pool not in _POOLED:
            raise UserError(f"config.model.pool is {self.pool!r}, expected one of: {', '.join(_POOLED)}")
        down, up = (nn.remat(_Down), nn.remat(_Up)) if self.remat else (_Down, _Up)
        b, h, w, c = image.shape
        fits = not (
            h % 2**self.levels or w % 2**self.levels or w * self.channels % self.lanes or self.lanes % self.channels
        )
        folds = [max(self.lanes // (self.channels << level), 1) if fits else 1 for level in range(self.levels + 1)]
        inside = [
            None if canvas is None else _inside(canvas >> level, h >> level, w >> level, fold)
            for level, fold in enumerate(folds)
        ]
        x = image.astype(self.dtype).reshape(b, h, w // folds[0], folds[0] * c)
        skips = []
        for level in range(self.levels):
            place = (folds[level], level > 0 and folds[level - 1] > 1)
            block = down(self.channels << level, self.dtype, _POOLED[self.pool], *place, name=f"down_{level}")
            skip, x = block(x, inside[level])
            skips.append(skip)
        place = (folds[-1], folds[self.levels - 1] > 1)
        x = down(self.channels << self.levels, self.dtype, _as_it_is, *place, name="bottleneck")(x, inside[-1])
        for level in range(self.levels - 1, 0, -1):
            one = up(self.channels << level, self.dtype, fold=folds[level], name=f"up_{level}")
            x = one(x, skips[level], inside[level])
        # A correction starts at nothing: the first steps improve on the input instead of finding it again.
        initial = nn.initializers.zeros if self.residual or self.zero_head else _INIT
        head = _Head(self.channels, self.out_channels, initial, name="head")()
        output = up(self.channels, self.dtype, fold=folds[0], name="up_0")(x, skips[0], inside[0], *head)
        return image[..., :1] + output if self.residual else output


class _Head(nn.Module):
    """The weights (channels, out) of the channels' sums that are the result, and their offsets (out,)."""

    channels: int
    out: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        kernel = self.param("kernel", self.kernel_init, (self.channels, self.out), jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (self.out,), jnp.float32)


class _Down(nn.Module):
    """Two convolutions, and what is made `then` of their result: (b, h, w, in) to `then` of (b, h, w, channels).

    `spaced` says that beside the channels of each pixel are as many that mean nothing, as `max_pool` leaves them.
    """

    channels: int
    dtype: DTypeLike
    then: Callable[..., Any] = _as_it_is
    fold: int = 1
    spaced: bool = False

    @nn.compact
    def __call__(self, x: Array, inside: Array | None = None) -> Any:
        x = _convolve_twice((x,), self.channels, self.dtype, self.fold, inside, self.spaced)
        return _normalise_and_activate(self.then, self.fold, x, inside)


class _Up(nn.Module):
    """Upsamples, joins the skip and convolves: (b, h // 2, w // 2, 2c) and (b, h, w, c) to (b, h, w, c).

    With weights of the channels' sums and their offsets, to these sums, (b, h, w, out) float32.
    """

    channels: int
    dtype: DTypeLike
    fold: int = 1

    @nn.compact
    def __call__(self, x: Array, skip: Array, inside: Array | None = None, *weights: Array) -> Array:
        x = _Transpose(self.channels, self.dtype, self.fold, name="transpose")(x)
        x = normalise_and_activate(x, self.fold, inside)
        if x.shape != skip.shape:
            x = jnp.pad(x, [(0, s - u) for s, u in zip(skip.shape, x.shape, strict=True)], mode="reflect")
        x = _convolve_twice((x, skip), self.channels, self.dtype, self.fold, inside)
        if weights:
            return _normalise_activate_and_weigh(self.fold, x, inside, *weights)
        return normalise_and_activate(x, self.fold, inside)


class _Transpose(nn.Module):
    """The 2x2 transposed convolution of stride 2, (b, h, w, in) to (b, 2h, 2w, channels).

    No two of its windows overlap, so it is a dense layer and a depth-to-space: the same function without the
    convolution over a zero-filled image that XLA's CPU backend would run, a fifth to a half of the whole step.
    """

    channels: int
    dtype: DTypeLike
    fold: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        before = max(self.fold // 2, 1)
        kernel = self.param("kernel", _UP_INIT, (2, 2, c // before, self.channels), jnp.float32).astype(self.dtype)
        x, kernel = _one_backwards((x, kernel))
        if self.fold == 1:
            dense = multiply(x, kernel.transpose(2, 0, 1, 3).reshape(c, 4 * self.channels))
            blocks = dense.reshape(b, h, w, 2, 2, self.channels).transpose(0, 1, 3, 2, 4, 5)
            return blocks.reshape(b, 2 * h, 2 * w, self.channels)
        weights = jnp.einsum("rkco,ij->ricjko", kernel, np.eye(before, dtype=self.dtype)).reshape(2, 1, c, -1)
        # Between the rows a convolution sees zeros, which a TPU skips, and no row is moved to its place.
        return lax.conv_transpose(x, weights[::-1], (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_twice(
    parts: tuple[Array, ...],
    channels: int,
    dtype: DTypeLike,
    fold: int,
    inside: Array | None,
    spaced: bool = False,
) -> Array:
    """Two 3x3 convolutions of the calling module, the first normalised and activated; it sees all channels."""
    first = _Convolution(channels, dtype, fold, spaced, name="conv_0")
    if parts[0].shape[-1] == 1:
        x = _convolve_image(parts[0], first.kernel_of(1), inside)
    else:
        x = normalise_and_activate(first(*parts), fold, inside)
    return _Convolution(channels, dtype, fold, name="conv_1")(x)


class _Convolution(nn.Module):
    """A 3x3 convolution over the channels of all parts, (b, h, w, ...) to (b, h, w, channels)."""

    channels: int
    dtype: DTypeLike
    fold: int = 1
    spaced: bool = False

    @nn.compact
    def kernel_of(self, channels: int) -> Array:
        """The kernel (3, 3, channels, self.channels)."""
        return self.param("kernel", _INIT, (3, 3, channels, self.channels), jnp.float32).astype(self.dtype)

    def __call__(self, *parts: Array) -> Array:
        counts = [part.shape[-1] // self.fold // (1 + self.spaced) for part in parts]
        parts, kernel = _one_backwards((parts, self.kernel_of(sum(counts))))
        kernels = [_folded(part, self.fold, self.spaced) for part in jnp.split(kernel, np.cumsum(counts)[:-1], axis=2)]
        return sum(map(convolve, parts[1:], kernels[1:]), convolve(parts[0], kernels[0]))


def _folded(kernel: Array, fold: int, spaced: bool) -> Array:
    """(3, 3, in, out) to (3, 3, fold in, fold out): the same, of images with `fold` pixels as one.

    Of `spaced` pixels (3, 3, fold 2 in, fold out), whose weights for what means nothing are zero.
    """
    if spaced:
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, kernel.shape[2]), (0, 0)))
    if fold == 1:
        return kernel
    block, source, target = np.ogrid[-1:2, :fold, :fold]
    shift = block * fold + source - target
    where = np.stack([shift == d for d in (-1, 0, 1)])
    wide = jnp.einsum("ydco,dkij->ykicjo", kernel, where.astype(kernel.dtype))
    return wide.reshape(3, 3, fold * kernel.shape[2], fold * kernel.shape[3])


def _inside(canvas: Array, height: int, width: int, fold: int) -> Array:
    """The pixels of each canvas (b, 2), (b, height, width // fold, fold) bool."""
    rows, columns = (jnp.arange(count) < canvas[:, axis, None] for axis, count in enumerate((height, width)))
    return (rows[:, :, None] & columns[:, None]).reshape(-1, height, width // fold, fold)


def _kept(x: Array, inside: Array | None) -> Array:
    """Zero outside."""
    if inside is None:
        return x
    return jnp.where(jnp.repeat(inside, x.shape[-1] // inside.shape[-1], -1), x, 0)


def normalise_and_activate(x: Array, fold: int = 1, inside: Array | None = None) -> Array:
    """Instance norm without affine parameters (eps 1e-5), then LeakyReLU (0.2): (b, h, w, c) to the same dtype.

    Of the pixels `inside` (b, h, w, fold) alone, where given; the others become zero.

    Statistics are float32, in one pass over x: right for convolution outputs, whose mean is of the order of their
    standard deviation; the variance's relative error grows as 1e-7 (mean / deviation)^2.

    The gradient is written out because LeakyReLU can be undone: the backward pass needs only the result, which the
    next convolution keeps anyway, and the convolution's own output is never stored (28 % less memory for the whole
    float32 step, compiled for an H100). Bulo et al., "In-Place Activated BatchNorm", arXiv:1712.02616.
    """
    return _normalise_and_activate(_as_it_is, fold, x, inside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise_and_activate(then: Callable[..., Any], fold: int, x: Array, inside: Array | None) -> Any:
    """`then(normalise_and_activate(x), fold)`.

    It takes `then` in because its gradient is needed twice, for the statistics and with them: computing it twice moves
    less memory than storing it.
    """
    return _forwards(then, fold, x, inside)[0]


def _forwards(then: Callable[..., Any], fold: int, x: Array, inside: Array | None) -> tuple[Any, Any]:
    mean, scale = _statistics(fold, x, inside)
    # Kept apart: what is read later is this array, not its float32 form that XLA would rather store.
    result = _apart(_activated(x, mean, scale, inside).astype(x.dtype))
    output, pullback = jax.vjp(lambda result: then(result, fold), result)
    return output, (result, scale, inside, pullback)


def _backwards(
    then: Callable[..., Any], fold: int, kept: tuple[Array, Array, Array | None, Any], later: Any
) -> tuple[Array, None]:
    result, scale, inside, pullback = kept
    means = _means_for_gradient(fold, result.astype(jnp.float32), pullback(later)[0].astype(jnp.float32), inside)
    # Kept apart: the same once more, and not what XLA would store of the above.
    (result, pullback, later), (mean, product) = _apart(((result, pullback, later), means))
    g = pullback(later)[0].astype(jnp.float32)
    return _through(result.astype(jnp.float32), g, mean, product, scale, inside).astype(result.dtype), None


_normalise_and_activate.defvjp(_forwards, _backwards)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise_activate_and_weigh(fold: int, x: Array, inside: Array | None, kernel: Array, bias: Array) -> Array:
    """Sums of the channels of `normalise_and_activate(x)`, whose weights are `kernel`: to (b, h, w, out) float32.

    Not in bfloat16: its 8 bits would be the precision of the image. Nothing else needs the activations, which are made
    anew from x for the gradient, and those of the weights are sums that the gradient needs anyway.
    """
    return _weigh_forwards(fold, x, inside, kernel, bias)[0]


def _weigh_forwards(
    fold: int, x: Array, inside: Array | None, kernel: Array, bias: Array
) -> tuple[Array, tuple[Array, Array, Array, Array | None, Array]]:
    mean, scale = _statistics(fold, x, inside)
    y, (b, h, w, _), out = _activated(x, mean, scale, inside), x.shape, len(bias)
    if fold == 1:
        # Not a matrix product, whose operand in float32 would be an array of its own.
        sums = jnp.concatenate([(y * kernel[:, o]).sum(-1, keepdims=True) for o in range(out)], -1)
    else:
        weights = jnp.einsum("co,ij->icjo", kernel, np.eye(fold, dtype=np.float32)).reshape(-1, fold * out)
        sums = jnp.dot(y, weights, precision="highest").reshape(b, h, w * fold, out)
    return sums + bias, (x, mean, scale, inside, kernel)


def _weigh_backwards(
    fold: int, kept: tuple[Array, Array, Array, Array | None, Array], later: Array
) -> tuple[Array, None, Array, Array]:
    x, mean, scale, inside, kernel = kept
    of_bias, (channels, out) = later.sum((0, 1, 2)), kernel.shape

    def parts(x: Array, later: Array) -> tuple[Array, Array, list[Array]]:
        """The activations, their gradient, and the gradient of each sum at every channel."""
        sums = later.reshape(*x.shape[:3], fold, out)
        ones = np.repeat(np.eye(fold, dtype=np.float32), channels, 1)
        each = [sums[..., o] if fold == 1 else jnp.dot(sums[..., o], ones, precision="high") for o in range(out)]
        gradient = sum((one * jnp.tile(kernel[:, o], fold) for o, one in enumerate(each)), jnp.float32(0))
        return _activated(x, mean, scale, inside), gradient, each

    y, g, each = parts(x, later)
    of_mean, *products = _means(fold, inside, _leaky(y, _kept(g, inside)), *(y * one for one in each))
    count = x.shape[1] * x.shape[2] * fold if inside is None else inside.sum((1, 2, 3))[:, None, None, None]
    of_kernel = jnp.stack([(product * count).sum((0, 1, 2))[:channels] for product in products], -1)
    product = sum((one * jnp.tile(kernel[:, o], fold) for o, one in enumerate(products)), jnp.float32(0))
    (x, later), of_mean, product = _apart(((x, later), of_mean, product))
    y, g, _ = parts(x, later)
    return _through(y, g, of_mean, product, scale, inside).astype(x.dtype), None, of_kernel, of_bias


_normalise_activate_and_weigh.defvjp(_weigh_forwards, _weigh_backwards)


def _statistics(fold: int, x: Array, inside: Array | None) -> tuple[Array, Array]:
    """Mean and 1 / deviation of each channel of each image, (b, 1, 1, c) float32."""
    wide = _kept(x.astype(jnp.float32), inside)
    mean, square = _means(fold, inside, wide, wide * wide)
    return mean, lax.rsqrt(jnp.maximum(square - mean * mean, 0) + _EPSILON)


def _activated(x: Array, mean: Array, scale: Array, inside: Array | None) -> Array:
    """Normalised and activated, float32."""
    normal = (x.astype(jnp.float32) - mean) * scale
    return _kept(jnp.where(normal >= 0, normal, _SLOPE * normal), inside)


def _leaky(y: Array, g: Array) -> Array:
    """The gradient of what LeakyReLU made y from."""
    return jnp.where(y >= 0, g, _SLOPE * g)


def _means_for_gradient(fold: int, y: Array, g: Array, inside: Array | None) -> tuple[Array, ...]:
    """Of the gradient of the normalised values, and of it times these: the slope cancels from (slope g) (y / slope)."""
    g = _kept(g, inside)
    return _means(fold, inside, _leaky(y, g), g * y)


def _through(y: Array, g: Array, mean: Array, product: Array, scale: Array, inside: Array | None) -> Array:
    """The gradient g of the activations y, back through activation and normalisation, float32."""
    gradient = jnp.where(y >= 0, g - y * product, _SLOPE * g - y / _SLOPE * product) - mean
    return _kept(scale * gradient, inside)


@jax.custom_vjp
def _convolve_image(x: Array, kernel: Array, inside: Array | None) -> Array:
    """`normalise_and_activate(convolve(x, kernel))` of one channel: (b, h, w, 1), (3, 3, 1, c) to (b, h, w, c).

    Nine products of a small image cost less than to store and read their sum: they are made twice, for the statistics
    and for the result, in one pass over arrays of c channels instead of four. CPUs compute the library's convolution.
    """
    return _image_forwards(x, kernel, inside)[0]


def _image_forwards(x: Array, kernel: Array, inside: Array | None) -> tuple[Array, tuple[Any, ...]]:
    def by_convolution(x: Array) -> tuple[Array, Array]:
        sums = convolve(x, kernel)
        mean, scale = _statistics(1, sums, inside)
        return _activated(sums, mean, scale, inside).astype(x.dtype), scale

    def in_one_loop(x: Array) -> tuple[Array, Array]:
        mean, scale = _statistics(1, _sum_of_neighbours(x, kernel), inside)
        x, mean, scale = _apart((x, mean, scale))
        return _activated(_sum_of_neighbours(x, kernel), mean, scale, inside).astype(x.dtype), scale

    x = _apart(x)
    result, scale = lax.platform_dependent(x, cpu=by_convolution, default=in_one_loop)
    return result, (x, kernel, inside, _apart(result), scale)


def _image_backwards(kept: tuple[Any, ...], later: Array) -> tuple[Array, Array, None]:
    x, kernel, inside, result, scale = kept
    of_sums, _ = _backwards(_as_it_is, 1, (result, scale, inside, jax.vjp(lambda y: y, result)[1]), later)
    return *jax.vjp(convolve, x, kernel)[1](of_sums), None


_convolve_image.defvjp(_image_forwards, _image_backwards)


def _sum_of_neighbours(x: Array, kernel: Array) -> Array:
    """The 3x3 convolution of one channel, float32."""
    h, w = x.shape[1:3]
    padded, weights = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0))), kernel.astype(jnp.float32)
    terms = (
        padded[:, row : row + h, column : column + w] * weights[row, column] for row in range(3) for column in range(3)
    )
    return sum(terms, jnp.float32(0))


@jax.custom_vjp
def _one_backwards(values: Any) -> Any:
    """The same values, whose gradients are all computed before one of them is used.

    Or XLA would put off those of the kernels, which nothing waits for, to where they are exchanged between devices, and
    keep what they are made of until then. Not on TPUs, where it would keep what is made of the others, statistics of a
    normalisation, from being made with them.
    """
    return values


_one_backwards.defvjp(
    lambda values: (values, None),
    lambda _, gradients: (lax.platform_dependent(gradients, tpu=lambda x: x, default=_apart),),
)


def _apart(values: Any) -> Any:
    """The same values, which XLA must not make anew where they are used.

    Not on CPUs, where it gains nothing and XLA (JAX 0.10) computes other gradients inside a `lax.scan` for it.
    """
    return lax.platform_dependent(values, cpu=lambda x: x, default=lax.optimization_barrier)


def _means(fold: int, inside: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """Over the height and width inside, (b, h, w, c) float32, zero elsewhere, to (b, 1, 1, c): all arrays in one pass.

    Rows first: into a sum as short as that XLA fuses what makes its terms, for all levels of the network. On a TPU
    it adds up what a convolution makes while it makes it, where the sums are plain.
    """

    def rows_first(*arrays: Array) -> tuple[Array, ...]:
        zeros = (jnp.float32(0),) * len(arrays)
        rows = lax.reduce(arrays, zeros, lambda x, y: tuple(map(jnp.add, x, y)), (2,))
        return tuple(row.mean(1) / arrays[0].shape[2] for row in rows)

    def plain(*arrays: Array) -> tuple[Array, ...]:
        return tuple(x.mean((1, 2)) for x in arrays)

    b, _, _, c = arrays[0].shape
    means = lax.platform_dependent(*arrays, tpu=plain, default=rows_first)
    pixels = (mean.reshape(b, fold, c // fold).mean(1) for mean in means)
    means = tuple(jnp.tile(pixel, fold)[:, None, None] for pixel in pixels)
    return means if inside is None else tuple(mean / inside.mean((1, 2, 3), keepdims=True) for mean in means)
