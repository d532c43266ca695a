"""Images of several receive coils: combine them, and estimate their sensitivities.

Files differ in their number of coils, and batches are padded with empty ones, all zero: those change nothing here.
"""

import jax
import jax.numpy as jnp

# Of the power iteration, by the 8th power of each matrix: as good as 104 by the matrix itself, in less time.
_SQUARINGS, _ITERATIONS = 3, 13


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


def adaptive_maps(coil_images: jax.Array) -> jax.Array:
    """Estimate sensitivities (coils, height, width): dominant eigenvectors of the coils' covariances.

    `combine(coil_images, adaptive_maps(coil_images))` is the adaptive combination of Walsh et al. (Magn Reson Med 43
    (2000) 682) for coils of white noise. Covariances are of 5 x 5 pixels; sum |S|^2 = 1, 0 where the images are.
    """
    products = coil_images[:, None] * coil_images.conj()
    local = jax.lax.reduce_window(products, jnp.complex64(0), jax.lax.add, (1, 1, 5, 5), (1,) * 4, "SAME")
    return dominant_eigenvector(local, products.sum((-2, -1)))[1]


def dominant_eigenvector(matrices: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find the largest eigenvalue of each pixel's matrix and its unit eigenvector, by power iteration; 0 where it is 0.

    Hermitian, positive semi-definite (coils, coils, height, width) complex64 give values (height, width) float32 and
    vectors (coils, height, width). So that their phase, which is arbitrary, varies smoothly, their product with a
    virtual coil is real, the dominant eigenvector of `reference` (coils, coils), the matrix of the whole image.
    """

    def multiply(matrix: jax.Array, vector: jax.Array) -> jax.Array:
        return (matrix * vector).sum(1)  # not a matrix product, which a TPU rounds to bfloat16

    def normalise(vector: jax.Array) -> jax.Array:
        length = root_sum_of_squares(vector)
        return vector / jnp.where(length > 0, length, 1)

    trace = jnp.trace(matrices).real
    power = matrices / jnp.where(trace > 0, trace, 1)
    for _ in range(_SQUARINGS):
        power = jnp.stack([multiply(power, column) for column in jnp.moveaxis(power, 1, 0)], 1)
    # Orthogonal to no eigenvector of a few coils, as equal weights would be to that of coils of opposite sign.
    weights = jnp.exp(1j * jnp.arange(len(matrices)) ** 2).astype(jnp.complex64)
    start = jnp.broadcast_to(weights[:, None, None], matrices.shape[1:])
    vectors = jax.lax.fori_loop(0, _ITERATIONS, lambda _, vector: normalise(multiply(power, vector)), start)
    product = multiply(matrices, vectors)
    virtual_coil = jnp.linalg.eigh(reference)[1][:, -1, None, None]
    phase = jnp.exp(-1j * jnp.angle(combine(vectors, virtual_coil)))
    return root_sum_of_squares(product), normalise(product) * phase
