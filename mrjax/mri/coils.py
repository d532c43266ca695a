"""Images of several receive coils: combine, prewhiten and compress them.

Files differ in their number of coils, and batches are padded with empty ones, all zero: those change nothing here.
"""

import jax
import jax.numpy as jnp

from mrjax.errors import UserError


def root_sum_of_squares(coil_images: jax.Array) -> jax.Array:
    """Combine (..., coils, height, width) complex64 to (..., height, width) float32 (Roemer et al., 1990)."""
    return jnp.sqrt(jnp.sum(coil_images.real**2 + coil_images.imag**2, axis=-3))


def magnitude(kspace: jax.Array) -> jax.Array:
    """Reconstruct the root-sum-of-squares image (..., height, width) float32 of k-space (..., coils, height, width).

    Centring k-space changes only the phase of the images, so only their magnitude is shifted.
    """
    return jnp.fft.fftshift(root_sum_of_squares(jnp.fft.ifft2(kspace, norm="ortho")), (-2, -1))


def combine(coil_images: jax.Array, maps: jax.Array) -> jax.Array:
    """Combine coil images by their sensitivities, sum conj(S) x: optimal for white noise and sum |S|^2 = 1.

    Args:
      coil_images: (..., coils, height, width) complex64.
      maps: (..., coils, height, width) complex64 sensitivities.

    Returns:
      (..., height, width) complex64 (Roemer et al., Magn Reson Med 16 (1990) 192).
    """
    return (maps.conj() * coil_images).sum(-3)


def adaptive_maps(coil_images: jax.Array, window: int = 5) -> jax.Array:
    """Estimate sensitivities as the dominant eigenvectors of the local covariance between coils.

    `combine(coil_images, adaptive_maps(coil_images))` is the adaptive combination of Walsh et al. (Magn Reson Med 43
    (2000) 682) for coils whose noise is white, as `prewhiten` makes it.

    Args:
      coil_images: (coils, height, width) complex64.
      window: side of the square, in pixels, over which the coils' covariance is taken.

    Returns:
      (coils, height, width) complex64 with sum |S|^2 = 1, 0 where the images are; phase of `dominant_eigenvector`.
    """
    products = coil_images[:, None] * coil_images.conj()
    size = (1, 1, window, window)
    local = jax.lax.reduce_window(products, jnp.complex64(0), jax.lax.add, size, (1,) * 4, "SAME")
    return dominant_eigenvector(local, products.sum((-2, -1)))[1]


def dominant_eigenvector(
    matrices: jax.Array, reference: jax.Array, iterations: int = 100
) -> tuple[jax.Array, jax.Array]:
    """Find the largest eigenvalue of each pixel's matrix and its eigenvector, by power iteration.

    The phase of an eigenvector is arbitrary. Here it is set so that its product with the dominant eigenvector of
    `reference` is real: that is a virtual coil which sees all of the object, so that the phase varies smoothly.

    Args:
      matrices: (coils, coils, height, width) complex64, Hermitian and positive semi-definite.
      reference: (coils, coils) complex64, such a matrix of the whole image.
      iterations: of the power method.

    Returns:
      Eigenvalues (height, width) float32, and eigenvectors (coils, height, width) complex64 of unit length; both zero
      where the matrix is.
    """

    def iterate(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        product = (matrices * state[1]).sum(1)  # not a matrix product, which a TPU rounds to bfloat16
        length = root_sum_of_squares(product)
        return length, product / jnp.where(length > 0, length, 1)

    start = jnp.zeros(matrices.shape[2:], jnp.float32), jnp.ones(matrices.shape[1:], jnp.complex64)
    values, vectors = jax.lax.fori_loop(0, iterations, iterate, start)
    virtual_coil = jnp.linalg.eigh(reference)[1][:, -1, None, None]
    return values, vectors * jnp.exp(-1j * jnp.angle(combine(vectors, virtual_coil)))


def prewhiten(kspace: jax.Array, covariance: jax.Array) -> jax.Array:
    """Mix the coils so that their noise is independent and of unit variance (Pruessmann et al., MRM 46 (2001) 638).

    Args:
      kspace: (coils, height, width) complex64, k-space or images.
      covariance: (coils, coils) complex64, of the noise, E[n n^H]; zero for an empty coil, which stays empty.

    Returns:
      L^-1 kspace with covariance = L L^H (Cholesky), the shape of `kspace`. Not finite where the covariance is not
      positive definite.
    """
    empty = jnp.diagonal(covariance) == 0
    factor = jnp.linalg.cholesky(covariance + jnp.diag(empty).astype(covariance.dtype))
    flat = kspace.reshape(len(kspace), -1)
    return jax.scipy.linalg.solve_triangular(factor, flat, lower=True).reshape(kspace.shape)


def compress(kspace: jax.Array, coils: int) -> jax.Array:
    """Compress to fewer, virtual coils of the greatest energy: the principal components.

    Buehrer et al., Magn Reson Med 57 (2007) 1131; Huang et al., Magn Reson Imaging 26 (2008) 133.

    Args:
      kspace: (physical coils, ...) complex64: one slice, or several that share their virtual coils.
      coils: how many to keep.

    Returns:
      (coils, ...) complex64, by falling energy; each coil has an arbitrary constant phase.

    Raises:
      UserError: `coils` is not between 1 and the number of physical coils.
    """
    if not 1 <= coils <= len(kspace):
        raise UserError(f"Coils to compress to: found {coils}, expected 1 to {len(kspace)}, the number of coils.")
    flat = kspace.reshape(len(kspace), -1)
    # The left singular vectors are those of R^T. A covariance would square the condition number.
    triangle = jnp.linalg.qr(flat.T, mode="r")
    vectors = jnp.linalg.svd(triangle.T, full_matrices=False)[0][:, :coils]
    virtual = jnp.matmul(vectors.conj().T, flat, precision="highest")
    return virtual.reshape(coils, *kspace.shape[1:])
