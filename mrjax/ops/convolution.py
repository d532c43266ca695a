"""The 3x3 convolution of feature maps, with the form in C++ that XLA's CPU backend lacks.

There XLA's own convolution takes a multiple of the time that the arithmetic needs, its filter gradient most of all. On
CPUs with a C++ compiler ours runs instead (`cpu/convolution.cc`); GPUs and TPUs compile XLA's and nothing else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mrjax.ops import reference
from mrjax.ops.cpu import library
from mrjax.ops.features import Concatenation, FeatureMap
from mrjax.ops.platform import by_platform, gradient_barrier


def convolve(x: FeatureMap | Concatenation, kernel: Array) -> FeatureMap:
    """Convolve, zero-padded, in the precision of x: kernel (3, 3, in, out), `in` channels to `out`.

    Parts of a concatenation are convolved one by one and added up, so that they need not be joined in memory.
    """
    parts = x.parts if isinstance(x, Concatenation) else (x,)
    data, kernel = gradient_barrier(([part.data for part in parts], kernel.astype(parts[0].data.dtype)))
    kernels = jnp.split(kernel, np.cumsum([part.channels for part in parts])[:-1], axis=2)
    terms = [convolve_array(d, _pack_kernel(k, part)) for d, k, part in zip(data, kernels, parts, strict=True)]
    return FeatureMap(sum(terms[1:], terms[0]), parts[0].lane_pack)


def _pack_kernel(kernel: Array, x: FeatureMap) -> Array:
    """Make of a kernel (3, 3, in, out) that for packed pixels, (3, 3, lane_pack * in, lane_pack * out).

    The meaningless channels of spaced maps get weights of zero.
    """
    if x.spaced:
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, kernel.shape[2]), (0, 0)))
    pack = x.lane_pack
    if pack == 1:
        return kernel
    block, source, target = np.ogrid[-1:2, :pack, :pack]
    shift = block * pack + source - target
    taps = np.stack([shift == column for column in (-1, 0, 1)])
    wide = jnp.einsum("ydco,dkij->ykicjo", kernel, taps.astype(kernel.dtype))
    return wide.reshape(3, 3, pack * kernel.shape[2], pack * kernel.shape[3])


def convolve_array(x: Array, kernel: Array) -> Array:
    """Convolve an array, zero-padded: (b, h, w, in) and (side, side, in, out) to (b, h, w, out), all of one dtype."""
    return _convolve(x, kernel) if _in_cpp(x, kernel) else reference.convolve(x, kernel)


def conv1x1(x: Array, kernel: Array) -> Array:
    """Apply a 1x1 convolution: (b, h, w, in) and (in, out) to (b, h, w, out), all of one dtype.

    XLA's CPU backend would convert bfloat16 factors of a matrix product to float32, in copies of their own.
    """
    return convolve_array(x, kernel[None, None])


def _in_cpp(x: Array, kernel: Array) -> bool:
    """Return whether the C++ operations are available and compute this: they check nothing themselves."""
    sides = {"float32": (3,), "bfloat16": (3, 1)}.get(x.dtype.name, ())
    known = kernel.dtype == x.dtype and kernel.shape[:3] in [(side, side, x.shape[-1]) for side in sides]
    return bool(known and x.size and kernel.size and _one_cpu_device() and library.available())


def _one_cpu_device() -> bool:
    """Return whether this is traced for one device of a CPU: XLA cannot split a foreign call among several."""
    if jax.default_backend() != "cpu":
        return False
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


def _cpp_convolution(x: Array, kernel: Array, *, flipped: bool) -> Array:
    shape = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[2 if flipped else 3]), x.dtype)
    return jax.ffi.ffi_call("mrjax_convolution", shape, vmap_method="sequential")(x, kernel, flipped=flipped)


def _cpp_filter_gradient(x: Array, gradient: Array, *, side: int) -> Array:
    shape = jax.ShapeDtypeStruct((side, side, x.shape[-1], gradient.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call("mrjax_filter_gradient", shape, vmap_method="sequential")
    return call(x, gradient).astype(x.dtype)


@jax.custom_vjp
def _convolve(x: Array, kernel: Array) -> Array:
    return by_platform(x, kernel, cpu=functools.partial(_cpp_convolution, flipped=False), default=reference.convolve)


def _convolve_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel), (x, kernel)


def _convolve_bwd(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals

    def input_gradient(gradient: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: reference.convolve(x, kernel), x)(gradient)[0]

    def filter_gradient(x: Array, gradient: Array) -> Array:
        return jax.linear_transpose(lambda kernel: reference.convolve(x, kernel), kernel)(gradient)[0]

    cpp_input_gradient = functools.partial(_cpp_convolution, flipped=True)
    cpp_filter_gradient = functools.partial(_cpp_filter_gradient, side=len(kernel))
    return (
        by_platform(gradient, kernel, cpu=cpp_input_gradient, default=input_gradient),
        by_platform(x, gradient, cpu=cpp_filter_gradient, default=filter_gradient),
    )


_convolve.defvjp(_convolve_fwd, _convolve_bwd)
