"""Acquisition of the demo scans: spin-echo contrast at 0.3 T (M4Raw's field), coil sensitivities, noise, k-space."""

import math
from typing import Any

import numpy as np

from mrjax.demo.anatomy import FIELD_OF_VIEW, TISSUES, Anatomy, Subject, slice_heights
from mrjax.demo.fields import spline
from mrjax.mri import simulate

# TR and TE in ms, whether an inversion nulls the fluid, and the weight of the texture. Spin echoes as M4Raw's (Lyu et
# al., Sci Data 2023, doi:10.1038/s41597-023-02181-4). The template's intensity beyond its tissue mixture says where T1
# is short: bright in T1, darker in the other contrasts.
PROTOCOLS = {
    "T1": (500.0, 18.4, False, 1.4),
    "T2": (5500.0, 128.0, False, -0.8),
    "FLAIR": (7500.0, 96.0, True, -0.6),
}


def spin_echo_signal(density: Any, t1: Any, t2: Any, *, tr: float, te: float, inversion: bool) -> Any:
    """Compute the signal of a spin echo, after an inversion where asked for; times in ms.

    Bernstein, King, Zhou: Handbook of MRI Pulse Sequences, 2004, chapter 14. The inversion time nulls the nominal
    fluid, as an operator sets it; the signal of an inversion recovery is negative before its null.
    """
    recovery = 1 - np.exp(-tr / t1)
    if inversion:
        fluid = TISSUES["fluid"][1]
        ti = fluid * (math.log(2) - math.log1p(math.exp(-tr / fluid)))
        recovery = 1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)
    return density * recovery * np.exp(-te / t2)


def make_image(anatomy: Anatomy, subject: Subject, contrast: str) -> np.ndarray:
    """Make the noise-free image, complex64 (slices, size, size); the brain's mean magnitude is 0.4."""
    nominal = np.array(list(TISSUES.values())).T
    density, t1, t2 = nominal * subject.generator(1).normal(1, [[0.02], [0.04], [0.05]], nominal.shape)
    rng = subject.generator(2, list(PROTOCOLS).index(contrast))
    tr, te, inversion, texture = PROTOCOLS[contrast]
    tr, te = np.multiply((tr, te), rng.normal(1, 0.04, 2))
    signals = spin_echo_signal(density, t1, t2, tr=tr, te=te, inversion=inversion)
    clean = np.tensordot(signals, anatomy.fractions, 1) * (1 + texture * anatomy.texture)
    clean *= 0.4 / signals[:2].mean()
    slices, size = clean.shape[:2]
    plane = np.linspace(0, 4, size)
    bias, phase = (spline(rng.standard_normal((3, 5, 5)), (np.linspace(0, 2, slices), plane, plane)) for _ in range(2))
    return (np.abs(clean) * np.exp(0.05 * bias + 1j * (0.6 * phase + rng.uniform(-3, 3)))).astype(np.complex64)


def make_sensitivities(subject: Subject, *, size: int, coils: int, slices: int) -> np.ndarray:
    """Make receive sensitivities, complex64 (slices, coils, size, size), whose RSS is 1 on average over the head."""
    if coils == 1:
        return np.ones((slices, 1, size, size), np.complex64)
    rng = subject.generator(4)
    plane = np.linspace(-0.5, 0.5, 25) * FIELD_OF_VIEW
    grid_heights = slice_heights(5)
    points = np.stack(np.meshgrid(grid_heights, plane, plane, indexing="ij"), -1)[..., ::-1]  # (5, 25, 25, 3)
    coarse = simulate.ring_sensitivities(rng, points, coils)
    head = np.hypot(points[..., 0] / 75, points[..., 1] / 95) < 1
    coarse /= np.sqrt((np.abs(coarse) ** 2).sum(0))[head].mean()
    heights = np.interp(slice_heights(slices), grid_heights, np.arange(5))
    pixels = (np.arange(size) - size // 2) * (24 / size) + 12
    return np.stack([spline(coil, (heights, pixels, pixels)) for coil in coarse], 1).astype(np.complex64)


def acquire_kspace(image: np.ndarray, coils: np.ndarray, snr: float, rng: np.random.Generator) -> np.ndarray:
    """Acquire noisy k-space of an image (slices, size, size) by coils: complex64 (slices, coils, size, size).

    `snr` is the brain's mean signal over the standard deviation of the noise's real and imaginary part.
    """
    return simulate.acquire_kspace(coils * image[:, None], 0.4 / snr, rng)
