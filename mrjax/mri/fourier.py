"""Centred, orthonormal two-dimensional Fourier transforms: zero frequency and image centre at index n // 2."""

import jax
import jax.numpy as jnp
import numpy as np

_AXES = (-2, -1)


def fft2c(image: jax.Array) -> jax.Array:
    """Image (..., height, width) complex64 -> k-space of the same shape; energy is kept."""
    return jnp.fft.fftshift(jnp.fft.fft2(jnp.fft.ifftshift(image, _AXES), norm="ortho"), _AXES)


def ifft2c(kspace: jax.Array) -> jax.Array:
    """K-space (..., height, width) complex64 -> image of the same shape; energy is kept."""
    return jnp.fft.fftshift(jnp.fft.ifft2(jnp.fft.ifftshift(kspace, _AXES), norm="ortho"), _AXES)


def centred_fft2_host(image: np.ndarray) -> np.ndarray:
    """`fft2c` in NumPy, for the host."""
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, _AXES), norm="ortho"), _AXES)


def centred_ifft2_host(kspace: np.ndarray) -> np.ndarray:
    """`ifft2c` in NumPy, for the host."""
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, _AXES), norm="ortho"), _AXES)
