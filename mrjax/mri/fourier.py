"""Centred, orthonormal two-dimensional Fourier transforms: zero frequency and image centre at index n // 2."""

import jax
import jax.numpy as jnp
import numpy as np

_AXES = (-2, -1)


def fft2c(image: jax.Array) -> jax.Array:
    """Transform an image (..., height, width) complex64 to k-space of the same shape and energy."""
    return jnp.fft.fftshift(_shift_by_phase(jnp.fft.fft2(image, norm="ortho"), 1), _AXES)


def ifft2c(kspace: jax.Array) -> jax.Array:
    """Transform k-space (..., height, width) complex64 to an image of the same shape and energy."""
    return jnp.fft.fftshift(_shift_by_phase(jnp.fft.ifft2(kspace, norm="ortho"), -1), _AXES)


def _shift_by_phase(x: jax.Array, sign: int) -> jax.Array:
    """Multiply by the phases that equal an `ifftshift` before the transform, without its pass over memory."""
    for axis in _AXES:
        size = x.shape[axis]
        turns = np.arange(size) * (size // 2) % size / size
        phase = np.exp(2j * np.pi * sign * turns).astype(np.complex64)
        x = x * np.expand_dims(phase, tuple(range(axis + 1, 0)))
    return x


def centred_fft2_host(image: np.ndarray) -> np.ndarray:
    """Compute `fft2c` on the host, in NumPy."""
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, _AXES), norm="ortho"), _AXES)


def magnitude_host(kspace: np.ndarray) -> np.ndarray:
    """Compute `coils.magnitude`, root-sum-of-squares (..., height, width) float32, on the host, in NumPy."""
    images = np.fft.ifft2(kspace, norm="ortho")
    return np.fft.fftshift(np.sqrt((images.real**2 + images.imag**2).sum(-3)), _AXES).astype(np.float32)


def centred_ifft2_host(kspace: np.ndarray) -> np.ndarray:
    """Compute `ifft2c` on the host, in NumPy."""
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, _AXES), norm="ortho"), _AXES)
