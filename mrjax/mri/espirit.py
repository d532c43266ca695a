"""ESPIRiT: coil sensitivities from the centre of k-space."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mrjax.errors import UserError
from mrjax.mri.coils import dominant_eigenvector
from mrjax.mri.fourier import ifft2c


def espirit(
    kspace: jax.Array,
    mask: jax.Array,
    *,
    calibration: int = 24,
    kernel: int = 6,
    crop: float = 0.95,
    sigma: ArrayLike = 0.0,
) -> jax.Array:
    """Estimate coil sensitivities by ESPIRiT (Uecker et al., Magn Reson Med 71 (2014) 990), the first set of maps.

    The blocks of side `kernel` in a square of side `calibration` about the centre (or all the image) span a small
    subspace; at every pixel the sensitivities are the eigenvector, with eigenvalue 1, of the projection onto it. Where
    it is not above `crop` there is no object. Only fully measured blocks count, so that the square may be wider than
    what is fully sampled; fewer than `kernel` columns give zero. `kspace` and maps are (coils, height, width) complex64
    with sum |S|^2 = 1 or 0, `mask` (1 or height, width) bool. What noise of `sigma` (see `mri.noise`) alone would give
    is no part of the subspace. Raises a `UserError` if a block does not fit.
    """
    coils, height, width = kspace.shape
    if calibration < kernel or min(height, width) < 2 * kernel - 1:
        raise UserError(
            f"ESPIRiT with a kernel of {kernel} needs a calibration region of at least {kernel} samples and images of "
            f"at least {2 * kernel - 1} pixels, found {calibration} and {height}x{width}."
        )
    top, left = (max(size // 2 - calibration // 2, 0) for size in (height, width))
    square = np.s_[:, top : top + calibration, left : left + calibration]
    region = jnp.where(mask, kspace, 0)[square]
    complete = _blocks(jnp.broadcast_to(mask, (1, height, width))[square], kernel).all((0, 1))
    rows = jnp.where(complete, _blocks(region, kernel).reshape(coils * kernel**2, -1), 0)
    # Squared singular values in float32 resolve singular values down to 1e-3 of the largest, well below the 2 % kept.
    squares, vectors = jnp.linalg.eigh(jnp.matmul(rows, rows.conj().T, precision="highest"))
    # The largest singular value of as many blocks of noise (Marchenko and Pastur, 1967).
    noise = 2 * jnp.square(sigma * (math.sqrt(len(rows)) + jnp.sqrt(complete.sum())))
    kept = squares > jnp.maximum(0.02**2 * squares[-1], noise)
    vectors = jnp.where(kept, vectors, 0).T.reshape(-1, coils, kernel, kernel)

    # The projection at each pixel is a trigonometric polynomial of few coefficients: outer products of the kernels.
    side = 2 * kernel - 1
    spectra = jnp.fft.fft2(vectors, (side, side))
    products = jnp.einsum("nihw,njhw->ijhw", spectra, spectra.conj(), precision="highest")
    coefficients = jnp.fft.fftshift(jnp.fft.ifft2(products), (-2, -1))
    padding = [(size // 2 - kernel + 1, size - size // 2 - kernel) for size in (height, width)]
    scale = np.float32(np.sqrt(height * width) / kernel**2)
    projections = ifft2c(jnp.pad(coefficients, [(0, 0), (0, 0), *padding])) * scale

    flat = region.reshape(coils, -1)
    values, maps = dominant_eigenvector(projections, jnp.matmul(flat, flat.conj().T, precision="highest"))
    return jnp.where(values > crop, maps, 0)


def _blocks(x: jax.Array, side: int) -> jax.Array:
    """Collect the samples of every block of side x side: (channels, height, width) to (channels, side^2, blocks)."""
    height, width = (n - side + 1 for n in x.shape[1:])
    shifted = [x[:, i : i + height, j : j + width] for i in range(side) for j in range(side)]
    return jnp.stack(shifted, 1).reshape(len(x), side**2, -1)
