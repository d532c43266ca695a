"""The images of several receive coils: combined, made independent of one another's noise, compressed to fewer.

Files differ in their number of coils, and batches are padded with empty ones, all zero: those change nothing here.
"""

import jax
import jax.numpy as jnp

from mrjax.errors import UserError


def root_sum_of_squares(coil_images: jax.Array) -> jax.Array:
    """(..., coils, height, width) complex -> (..., height, width) float32 magnitude (Roemer et al., 1990)."""
    return jnp.sqrt(jnp.sum(coil_images.real**2 + coil_images.imag**2, axis=-3))


def magnitude(kspace: jax.Array) -> jax.Array:
    """(..., coils, height, width) k-space -> root-sum-of-squares of its coils' images, (..., height, width) float32.

    Where k-space has its centre changes nothing but the images' phase, so only their magnitude is shifted into place.
    """
    return jnp.fft.fftshift(root_sum_of_squares(jnp.fft.ifft2(kspace, norm="ortho")), (-2, -1))


def combine(coil_images: jax.Array, maps: jax.Array) -> jax.Array:
    """One image of all coils by their sensitivities, sum conj(S) x: the best where noise is white and sum |S|^2 is 1.

    Args:
      coil_images: (..., coils, height, width) complex64.
      maps: (..., coils, height, width) complex64 sensitivities.

    Returns:
      (..., height, width) complex64 (Roemer et al., Magn Reson Med 16 (1990) 192).
    """
    return (maps.conj() * coil_images).sum(-3)


def adaptive_maps(coil_images: jax.Array, window: int = 5) -> jax.Array:
    """Sensitivities from the coil images alone: what varies together across the coils round each pixel.

    `combine(coil_images, adaptive_maps(coil_images))` is the adaptive combination of Walsh et al. (Magn Reson Med 43
    (2000) 682) for coils whose noise is white, as `prewhiten` makes it.

    Args:
      coil_images: (coils, height, width) complex64.
      window: side of the square, in pixels, over which the coils' covariance is taken.

    Returns:
      (coils, height, width) complex64 with sum |S|^2 = 1, zero where the images are; phase as of `dominant`.
    """
    products = coil_images[:, None] * coil_images.conj()
    size = (1, 1, window, window)
    local = jax.lax.reduce_window(products, jnp.complex64(0), jax.lax.add, size, (1,) * 4, "SAME")
    return dominant(local, products.sum((-2, -1)))[1]


def dominant(matrices: jax.Array, overall: jax.Array, iterations: int = 100) -> tuple[jax.Array, jax.Array]:
    """The largest eigenvalue of each pixel's matrix and its eigenvector, by power iteration.

    An eigenvector has no phase of its own. Here it is real along the dominant eigenvector of `overall`, a virtual coil
    that sees all of the object: the phase then varies smoothly, which that of a single coil may not.

    Args:
      matrices: (coils, coils, height, width) complex64, Hermitian and positive semi-definite.
      overall: (coils, coils) complex64, the same for the whole image.
      iterations: of the power method.

    Returns:
      Eigenvalues (height, width) float32, and eigenvectors (coils, height, width) complex64 of unit length; both zero
      where the matrix is.
    """

    def multiply(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Sums, not a product of tiny matrices: on a TPU that rounds to bfloat16.
        product = (matrices * state[1]).sum(1)
        length = root_sum_of_squares(product)
        return length, product / _or_one(length)

    start = jnp.zeros(matrices.shape[2:], jnp.float32), jnp.ones(matrices.shape[1:], jnp.complex64)
    values, vectors = jax.lax.fori_loop(0, iterations, multiply, start)
    reference = jnp.linalg.eigh(overall)[1][:, -1]
    along = (reference.conj()[:, None, None] * vectors).sum(0)
    return values, vectors * jnp.exp(-1j * jnp.angle(along))


def prewhiten(kspace: jax.Array, covariance: jax.Array) -> jax.Array:
    """Mixes the coils so that their noise is independent and of unit variance (Pruessmann et al., MRM 46 (2001) 638).

    Args:
      kspace: (coils, height, width) complex64, k-space or images.
      covariance: (coils, coils) complex64, the noise's E[n n^H]; all zero for an empty coil, which stays empty.

    Returns:
      L^-1 kspace with covariance = L L^H (Cholesky), the shape of `kspace`. Not finite where the covariance is not
      positive definite.
    """
    empty = jnp.diagonal(covariance) == 0
    factor = jnp.linalg.cholesky(covariance + jnp.diag(empty).astype(covariance.dtype))
    flat = kspace.reshape(len(kspace), -1)
    return jax.scipy.linalg.solve_triangular(factor, flat, lower=True).reshape(kspace.shape)


def compress(kspace: jax.Array, coils: int) -> jax.Array:
    """Fewer, virtual coils that keep as much of the energy as so many can: the principal components.

    Buehrer et al., Magn Reson Med 57 (2007) 1131; Huang et al., Magn Reson Imaging 26 (2008) 133.

    Args:
      kspace: (physical coils, ...) complex64: one slice, or several that must share their virtual coils.
      coils: how many to keep.

    Returns:
      (coils, ...) complex64, by falling energy; each coil's phase as a whole is arbitrary.

    Raises:
      UserError: there are fewer physical coils than that.
    """
    if not 1 <= coils <= len(kspace):
        raise UserError(f"Coils to compress to: found {coils}, expected 1 to {len(kspace)}, the number there is.")
    flat = kspace.reshape(len(kspace), -1)
    # The left singular vectors are those of R^T: no covariance, which would square the ratio of the weak to the strong.
    triangle = jnp.linalg.qr(flat.T, mode="r")
    vectors = jnp.linalg.svd(triangle.T, full_matrices=False)[0][:, :coils]
    virtual = jnp.matmul(vectors.conj().T, flat, precision="highest")
    return virtual.reshape(coils, *kspace.shape[1:])


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)
