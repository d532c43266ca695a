"""Simulate the k-space of a multi-coil scan from magnitude images, of which neither the phase nor the coils are known.

The forward model is y_c = F(S_c |x| exp(i phi)) + n_c, with F of `fourier`:

- `S_c`, sensitivities of COILS circular loops on a ring around the field of view, by Biot-Savart's law (as in
  Guerquin-Kern et al., IEEE Trans Med Imaging 31 (2012) 626), scaled to sum |S_c|^2 = 1 at every pixel: the
  root-sum-of-squares image (Roemer et al., Magn Reson Med 16 (1990) 192) of k-space without noise is |x|
- `phi`, a smooth phase: a polynomial of low degree over the whole volume
- `n_c`, white Gaussian noise, of standard deviation NOISE times the slice's maximum in real and imaginary part; in the
  image it is Rician, or non-central chi (Gudbjartsson and Patz, Magn Reson Med 34 (1995) 910)

What is random is a function of the volume's name and the slice's number. Images were processed before they were
stored, so networks do better on such k-space than on measured k-space (Shimron et al., PNAS 119 (2022) e2117203119):
every table says "simulated".
"""

import functools
import zlib

import numpy as np
import scipy
from numpy.polynomial import chebyshev

COILS = 8
NOISE = 0.001  # of the slice's maximum
FIELD_OF_VIEW = 250.0  # mm along the longer side of an image: that of a head
_DEPTH = 100.0  # mm from the first to the last slice
_NODES = 16  # along either side, from which sensitivities are interpolated
_PHASE = 0.5  # radians, deviation of the first coefficients


def simulate_kspace(image: np.ndarray, name: str, index: int, slices: int) -> np.ndarray:
    """Simulate k-space (COILS, height, width) complex64 of an image (height, width), real or complex.

    It is slice `index` of the `slices` of the volume `name`.
    """
    seed, depth = zlib.crc32(name.encode(errors="surrogateescape")), (2 * index + 1) / slices - 1
    coil_images = make_sensitivities(np.random.default_rng((seed, 0)), image.shape, depth)
    phase = make_phase(np.random.default_rng((seed, 1)), image.shape, depth)
    coil_images *= (signal := magnitude(image)) * np.exp(1j * phase)
    return acquire_kspace(coil_images, NOISE * float(signal.max()), np.random.default_rng((seed, 2, index)))


def magnitude(image: np.ndarray) -> np.ndarray:
    """Return the magnitude, float32, of an image of any numbers."""
    return np.abs(image.astype(np.result_type(image.dtype, np.float32), copy=False)).astype(np.float32)


def make_sensitivities(rng: np.random.Generator, shape: tuple[int, ...], depth: float) -> np.ndarray:
    """Make sensitivities (COILS, height, width) complex64 with sum |S|^2 = 1, at a depth in the volume from -1 to 1."""
    nodes = chebyshev.chebpts1(_NODES) * FIELD_OF_VIEW / 2
    y, x = np.meshgrid(nodes, nodes, indexing="ij")
    points = np.stack([x, y, np.full_like(x, depth * _DEPTH / 2)], -1)
    rows, columns = (_interpolation(size, max(shape)) for size in shape)
    maps = rows @ ring_sensitivities(rng, points, COILS).astype(np.complex64) @ columns.T
    maps /= np.sqrt(sum(np.abs(one) ** 2 for one in maps))
    return maps


def make_phase(rng: np.random.Generator, shape: tuple[int, ...], depth: float) -> np.ndarray:
    """Make a smooth phase (height, width) float32 in radians, at a depth in the volume from -1 to 1."""
    degrees = np.indices((3, 4, 4)).sum(0)
    coefficients = _PHASE * rng.standard_normal(degrees.shape) / np.maximum(degrees, 1)
    coefficients[0, 0, 0] = rng.uniform(-np.pi, np.pi)
    y, x = (_positions(size, max(shape)) for size in shape)
    return chebyshev.chebgrid3d(np.array([depth]), y, x, coefficients)[0].astype(np.float32)


def _positions(size: int, longest: int) -> np.ndarray:
    """Place the pixels of a side: the longest one of the image is from -1 to 1."""
    return (2 * np.arange(size) + 1 - size) / longest


@functools.lru_cache(maxsize=64)
def _interpolation(size: int, longest: int) -> np.ndarray:
    """Make the matrix (size, _NODES) float32 that interpolates by a polynomial from Chebyshev's nodes to pixels."""
    at_nodes = chebyshev.chebvander(chebyshev.chebpts1(_NODES), _NODES - 1)
    return (chebyshev.chebvander(_positions(size, longest), _NODES - 1) @ np.linalg.inv(at_nodes)).astype(np.float32)


def ring_sensitivities(rng: np.random.Generator, points: np.ndarray, coils: int) -> np.ndarray:
    """Compute sensitivities (coils, ...) complex128 of loops around a head, at points (..., 3) in mm, not scaled."""
    angles = 2 * np.pi * (np.arange(coils) + 0.5) / coils + rng.normal(0, 0.06, coils)
    radius = np.clip(480 / coils, 50, 110)  # mm
    return np.stack([_loop_sensitivity(rng, points, angle, radius) for angle in angles])


def _loop_sensitivity(rng: np.random.Generator, points: np.ndarray, angle: float, radius: float) -> np.ndarray:
    """Sensitivity Bx - i By (the main field is along z) of a circular loop at points (..., 3) in mm, by Biot-Savart."""
    outward = np.array([np.cos(angle), np.sin(angle), 0])
    tangent = np.array([-np.sin(angle), np.cos(angle), 0])
    centre = outward * rng.normal([150, 170, 0], 4) + [0, 0, rng.normal(0, 8)]
    turn = np.linspace(0, 2 * np.pi, 25)
    wire = centre + radius * (np.cos(turn)[:, None] * tangent + np.sin(turn)[:, None] * [0, 0, 1])
    element, middle = np.diff(wire, axis=0), (wire[1:] + wire[:-1]) / 2
    offset = points[..., None, :] - middle
    field = (np.cross(element, offset) / (np.linalg.norm(offset, axis=-1, keepdims=True) ** 3 + 2e4)).sum(-2)
    return (field[..., 0] - 1j * field[..., 1]) * np.exp(1j * rng.uniform(-np.pi, np.pi))


def acquire_kspace(coil_images: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Acquire noisy k-space of coil images, both complex64 (..., coils, height, width).

    `sigma` is the standard deviation of the noise's real and imaginary part.
    """
    shifted = np.fft.ifftshift(coil_images, axes=(-2, -1))
    kspace = np.fft.fftshift(scipy.fft.fft2(shifted, norm="ortho", overwrite_x=True), axes=(-2, -1))
    del shifted  # a large slice takes hundreds of megabytes
    noise = rng.standard_normal((*kspace.shape, 2), np.float32)
    noise *= np.float32(sigma)
    kspace += noise.view(np.complex64)[..., 0]
    return kspace
