"""The 3x3 convolution, with the form that XLA's CPU backend lacks.

There its library convolution takes a multiple of the time that the arithmetic needs, its filter gradient most of all.
On CPUs with a C++ compiler these are our own (`cpu/convolution.cc`); GPUs and TPUs compile the library's convolution
and nothing else.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from mrjax.ops.cpu import library
from mrjax.ops.platform import by_platform


def convolve(x: Array, kernel: Array) -> Array:
    """Zero-padded convolution, (b, h, w, cin) and (3, 3, cin, cout) to (b, h, w, cout), all of one dtype."""
    return _convolve(x, kernel) if _ours(x, kernel) else _library(x, kernel)


def multiply(x: Array, kernel: Array) -> Array:
    """The 1x1 convolution, (b, h, w, cin) and (cin, cout) to (b, h, w, cout), all of one dtype.

    A matrix product, whose bfloat16 factors XLA's CPU backend would convert to float32 in copies of their own.
    """
    return convolve(x, kernel[None, None])


def _ours(x: Array, kernel: Array) -> bool:
    """Whether the operations in C++ are there and compute this: they check nothing themselves."""
    sides = {"float32": (3,), "bfloat16": (3, 1)}.get(x.dtype.name, ())
    known = kernel.dtype == x.dtype and kernel.shape[:3] in [(side, side, x.shape[-1]) for side in sides]
    return bool(known and x.size and kernel.size and _alone() and library.available())


def _alone() -> bool:
    """Whether this is traced for one device of a CPU: XLA cannot divide a call of ours among several."""
    if jax.default_backend() != "cpu":
        return False
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


def _library(x: Array, kernel: Array) -> Array:
    if kernel.shape[:2] == (1, 1):
        return x @ kernel[0, 0]
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _native(x: Array, kernel: Array, *, flipped: bool) -> Array:
    shape = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[2 if flipped else 3]), x.dtype)
    return jax.ffi.ffi_call("mrjax_convolution", shape, vmap_method="sequential")(x, kernel, flipped=flipped)


def _native_filter_gradient(x: Array, gradient: Array, *, side: int) -> Array:
    shape = jax.ShapeDtypeStruct((side, side, x.shape[-1], gradient.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call("mrjax_filter_gradient", shape, vmap_method="sequential")
    return call(x, gradient).astype(x.dtype)


@jax.custom_vjp
def _convolve(x: Array, kernel: Array) -> Array:
    return by_platform(x, kernel, cpu=functools.partial(_native, flipped=False), default=_library)


def _forwards(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel), (x, kernel)


def _backwards(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept

    def by_input(gradient: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: _library(x, kernel), x)(gradient)[0]

    def by_kernel(x: Array, gradient: Array) -> Array:
        return jax.linear_transpose(lambda kernel: _library(x, kernel), kernel)(gradient)[0]

    of_x = by_platform(gradient, kernel, cpu=functools.partial(_native, flipped=True), default=by_input)
    on_cpu = functools.partial(_native_filter_gradient, side=len(kernel))
    of_kernel = by_platform(x, gradient, cpu=on_cpu, default=by_kernel)
    return of_x, of_kernel


_convolve.defvjp(_forwards, _backwards)
