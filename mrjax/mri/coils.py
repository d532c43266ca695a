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
    """Combine (..., coils, height, width) complex64 to (..., height, width) by sensitivities S.

    That is sum conj(S) x, optimal for white noise and sum |S|^2 = 1 (Roemer et al., Magn Reson Med 16 (1990) 192).
    """
    return (maps.conj() * coil_images).sum(-3)


def adaptive_maps(coil_images: jax.Array, window: int = 5) -> jax.Array:
    """Estimate sensitivities (coils, height, width): dominant eigenvectors of the coils' covariances.

    `combine(coil_images, adaptive_maps(coil_images))` is the adaptive combination of Walsh et al. (Magn Reson Med 43
    (2000) 682) for coils whose noise is white, as `prewhiten` makes it. Covariances are of squares
    of `window` pixels; sum |S|^2 = 1, 0 where the images are.
    """
    products = coil_images[:, None] * coil_images.conj()
    local = jax.lax.reduce_window(products, jnp.complex64(0), jax.lax.add, (1, 1, window, window), (1,) * 4, "SAME")
    return dominant_eigenvector(local, products.sum((-2, -1)))[1]


def dominant_eigenvector(matrices: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find the largest eigenvalue of each pixel's matrix and its unit eigenvector, by power iteration; 0 where it is 0.

    Hermitian, positive semi-definite (coils, coils, height, width) complex64 give values (height, width) float32 and
    vectors (coils, height, width). The phase of an eigenvector is arbitrary: here its product with the dominant
    eigenvector of `reference` (coils, coils), the matrix of the whole image, is real. That is a virtual coil which sees
    all of the object, so that the phase varies smoothly.
    """

    def iterate(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        product = (matrices * state[1]).sum(1)  # not a matrix product, which a TPU rounds to bfloat16
        length = root_sum_of_squares(product)
        return length, product / jnp.where(length > 0, length, 1)

    start = jnp.zeros(matrices.shape[2:], jnp.float32), jnp.ones(matrices.shape[1:], jnp.complex64)
    values, vectors = jax.lax.fori_loop(0, 100, iterate, start)
    virtual_coil = jnp.linalg.eigh(reference)[1][:, -1, None, None]
    return values, vectors * jnp.exp(-1j * jnp.angle(combine(vectors, virtual_coil)))


def prewhiten(kspace: jax.Array, covariance: jax.Array) -> jax.Array:
    """Mix the coils so that their noise is independent and of unit variance (Pruessmann et al., MRM 46 (2001) 638).

    That is L^-1 x for k-space or images (coils, height, width) complex64 and E[n n^H] = L L^H (Cholesky), the noise's
    `covariance` (coils, coils), zero for empty coils. Not finite where this is not positive definite.
    """
    empty = jnp.diagonal(covariance) == 0
    factor = jnp.linalg.cholesky(covariance + jnp.diag(empty).astype(covariance.dtype))
    flat = kspace.reshape(len(kspace), -1)
    return jax.scipy.linalg.solve_triangular(factor, flat, lower=True).reshape(kspace.shape)


def compress(kspace: jax.Array, coils: int) -> jax.Array:
    """Compress (physical coils, ...) complex64 to virtual `coils` of the greatest energy: the principal components.

    Energy falls with the number of the coil; phases are arbitrary constants. Raises a `UserError` if there are fewer
    physical coils. Buehrer et al., MRM 57 (2007) 1131; Huang et al., Magn Reson Imaging 26 (2008) 133.
    """
    if not 1 <= coils <= len(kspace):
        raise UserError(f"Coils to compress to: found {coils}, expected 1 to {len(kspace)}, the number of coils.")
    flat = kspace.reshape(len(kspace), -1)
    # The left singular vectors are those of R^T. A covariance would square the condition number.
    vectors = jnp.linalg.svd(jnp.linalg.qr(flat.T, mode="r").T, full_matrices=False)[0][:, :coils]
    return jnp.matmul(vectors.conj().T, flat, precision="highest").reshape(coils, *kspace.shape[1:])
