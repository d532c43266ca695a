"""Convolutions of feature maps, 3x3 and transposed 2x2, with the form in C++ that XLA's CPU backend lacks.

XLA's own takes a multiple of the time that the arithmetic needs there, its filter gradient most of all. On CPUs with a
C++ compiler ours runs instead (`cpu/convolution.cc`); GPUs and TPUs compile XLA's and nothing else.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mrjax.ops import reference
from mrjax.ops.cpu import native
from mrjax.ops.features import FeatureMap
from mrjax.ops.platform import gradient_barrier, traced_platform

_ffi_call = functools.partial(jax.ffi.ffi_call, vmap_method="sequential")


def convolve(parts: Sequence[FeatureMap], kernel: Array) -> FeatureMap:
    """Convolve, zero-padded, in the precision of the maps: kernel (3, 3, in, out), `in` channels to `out`.

    The maps count as one, their channels concatenated, but need not be joined in memory.
    """
    data, kernel = gradient_barrier(([part.data for part in parts], kernel.astype(parts[0].data.dtype)))
    kernels = jnp.split(kernel, np.cumsum([part.channels for part in parts])[:-1], axis=2)
    terms = [convolve_array(d, _pack_kernel(k, part)) for d, k, part in zip(data, kernels, parts, strict=True)]
    return FeatureMap(sum(terms[1:], terms[0]), parts[0].lane_pack)


def _pack_kernel(kernel: Array, x: FeatureMap) -> Array:
    """Make of a kernel (3, 3, in, out) that for packed pixels, (3, 3, lane_pack * in, lane_pack * out)."""
    if x.spaced:  # the meaningless channels get weights of zero
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, kernel.shape[2]), (0, 0)))
    pack = x.lane_pack
    if pack == 1:
        return kernel
    block, source, target = np.ogrid[-1:2, :pack, :pack]
    shift = block * pack + source - target
    taps = np.stack([shift == column for column in (-1, 0, 1)])
    wide = jnp.einsum("ydco,dkij->ykicjo", kernel, taps.astype(kernel.dtype))
    return wide.reshape(3, 3, pack * kernel.shape[2], pack * kernel.shape[3])


def upsample(x: FeatureMap, kernel: Array, like: FeatureMap) -> FeatureMap:
    """Apply a transposed convolution of stride 2, in the precision of x: kernel (2, 2, in, out), twice the resolution.

    The result is packed as `like`, a map of as many channels. No two windows overlap, so it is a dense layer and a
    depth-to-space: XLA's CPU backend would convolve a zero-filled image, a fifth to a half of the whole step.
    """
    data, kernel = gradient_barrier((x.data, kernel.astype(x.data.dtype)))
    (b, h, w, c), out = data.shape, kernel.shape[-1]
    if like.lane_pack == 1:
        pixels = convolve_array(data, kernel.transpose(2, 0, 1, 3).reshape(1, 1, c, 4 * out))
        blocks = pixels.reshape(b, h, w, 2, 2, out).transpose(0, 1, 3, 2, 4, 5)
        return like.replace(data=blocks.reshape(b, 2 * h, 2 * w, out))
    each = np.eye(x.lane_pack, dtype=kernel.dtype)
    weights = jnp.einsum("rkco,ij->ricjko", kernel, each).reshape(2, 1, c, -1)[::-1]
    # Between the rows the convolution sees zeros, which a TPU skips, and no row is moved to its place.
    return like.replace(data=lax.conv_transpose(data, weights, (2, 1), "VALID", dimension_numbers=reference.DIMENSIONS))


def convolve_array(x: Array, kernel: Array) -> Array:
    """Convolve an array, zero-padded: (b, h, w, in) and (side, side, in, out) to (b, h, w, out), all of one dtype.

    A kernel of side 1 too: XLA's CPU backend would convert bfloat16 factors of a matrix product to float32, in copies.
    """
    return _convolve_in_cpp(x, kernel) if _in_cpp(x, kernel) else reference.convolve(x, kernel)


def _in_cpp(x: Array, kernel: Array) -> bool:
    """Return whether the C++ operations are available and compute this: they check nothing themselves."""
    sides = {"float32": (3,), "bfloat16": (3, 1)}.get(x.dtype.name, ())
    known = kernel.dtype == x.dtype and kernel.shape[:3] in [(side, side, x.shape[-1]) for side in sides]
    # XLA cannot split a foreign call among several devices.
    one_device = jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)
    on_cpu = traced_platform() == "cpu" and one_device
    return bool(known and x.size and kernel.size and on_cpu and native.available())


@jax.custom_vjp
def _convolve_in_cpp(x: Array, kernel: Array) -> Array:
    result = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[3]), x.dtype)
    return _ffi_call("mrjax_convolution", result)(x, kernel, flipped=False)


def _convolve_in_cpp_bwd(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    image_gradient = _ffi_call("mrjax_convolution", x)(gradient, kernel, flipped=True)
    shape = jax.ShapeDtypeStruct(kernel.shape, jnp.float32)
    return image_gradient, _ffi_call("mrjax_filter_gradient", shape)(x, gradient).astype(x.dtype)


_convolve_in_cpp.defvjp(lambda *args: (_convolve_in_cpp(*args), args), _convolve_in_cpp_bwd)
