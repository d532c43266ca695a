"""Write M4Raw-shaped files for the benchmarks."""

from pathlib import Path

import numpy as np

from mrjax.io import hdf5, ismrmrd_header
from mrjax.mri.fourier import centred_fft2_host, centred_ifft2_host


def make_files(folder: Path, size: int, volumes: int, slices: int = 18, coils: int = 4) -> None:
    """Write volumes of smoothed noise with M4Raw's layout and its unsampled columns."""
    rng = np.random.default_rng(0)
    low = slice(size * 3 // 8, size * 5 // 8)
    columns = slice(size * 30 // 256, size * 226 // 256)
    for number in range(volumes):
        images = rng.random((slices, coils, size, size), np.float32)
        smooth = np.zeros(images.shape, np.complex64)
        smooth[..., low, low] = centred_fft2_host(images)[..., low, low]
        smooth += 0.01 * images
        kspace = np.zeros_like(smooth)
        kspace[..., columns] = smooth[..., columns]
        target = np.sqrt((np.abs(centred_ifft2_host(kspace)) ** 2).sum(1)).astype(np.float32)
        header = ismrmrd_header.header((size, size))
        arrays = {"kspace": kspace, "reconstruction_rss": target, "ismrmrd_header": header}
        hdf5.write(folder / f"{number}_T101.h5", arrays, {"max": target.max(), "norm": np.linalg.norm(target)})
