"""Centred, orthonormal two-dimensional Fourier transforms: zero frequency and image centre at index n // 2."""

import jax
import jax.numpy as jnp
import numpy as np

_AXES = (-2, -1)


def fft2c(image: jax.Array) -> jax.Array:
    """Image (..., height, width) complex64 -> k-space of the same shape; energy is kept."""
    return jnp.fft.fftshift(_turn(jnp.fft.fft2(image, norm="ortho"), 1), _AXES)


def ifft2c(kspace: jax.Array) -> jax.Array:
    """K-space (..., height, width) complex64 -> image of the same shape; energy is kept."""
    return jnp.fft.fftshift(_turn(jnp.fft.ifft2(kspace, norm="ortho"), -1), _AXES)


def _turn(x: jax.Array, sign: int) -> jax.Array:
    """The phases that a shift before the transform would give: they cost no pass over memory of their own."""
    for axis in _AXES:
        size = x.shape[axis]
        turns = np.arange(size) * (size // 2) % size / size
        phase = np.exp(2j * np.pi * sign * turns).astype(np.complex64)
        x = x * np.expand_dims(phase, tuple(range(axis + 1, 0)))
    return x


def centred_fft2_host(image: np.ndarray) -> np.ndarray:
    """`fft2c` in NumPy, for the host."""
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, _AXES), norm="ortho"), _AXES)


def centred_ifft2_host(kspace: np.ndarray) -> np.ndarray:
    """`ifft2c` in NumPy, for the host."""
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, _AXES), norm="ortho"), _AXES)
