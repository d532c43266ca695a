"""Real heads that no network was trained on, as undersampled multi-coil k-space.

The images are those of single persons that installed packages carry for their tests and examples; they are fully
sampled magnitudes, to which coils, phase and noise are added here, by other formulas than the demo data's. nilearn's
MNI152 template is none of them: the demo data are made from it. One head was measured as k-space and is used as it is.
"""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy

from mrjax.data import resize
from mrjax.io import hdf5, readers
from mrjax.io.volume import Volume
from mrjax.mri.acquire import Acquisition, draw_protocol
from mrjax.mri.fourier import centred_fft2_host, magnitude_host

CENTRE_FRACTIONS = {4: 0.08, 8: 0.04}  # by acceleration, as fastMRI's
Volumes = dict[int, dict[str, Volume]]  # by acceleration and name of the head
# Deviation of the real and the imaginary part in each coil, over the mean signal of the head. In air, the RSS
# of 16 coils is then 3 % of the signal; at four times this noise, that floor hid what methods differ in.
NOISE = 0.005


class Head(NamedTuple):
    """How k-space is made of the magnitudes of a source."""

    source: str  # a name in `SOURCES`
    field: tuple[int, int]  # height and width that the source is cropped or padded to, in its own pixels
    size: tuple[int, int]  # of the k-space: other than `field`, the image is Fourier-interpolated
    coils: int
    t2_like: bool = False  # whether its contrast is inverted

    @property
    def name(self) -> str:
        """Source, size and coils."""
        contrast = ", T2-like" if self.t2_like else ""
        enlarged = f" (from {self.field[0]}x{self.field[1]})" if self.size > self.field else ""
        coils = "1 coil" if self.coils == 1 else f"{self.coils} coils"
        return f"{self.source}{contrast}, {self.size[0]}x{self.size[1]}{enlarged}, {coils}"


HEADS = (
    Head("axial b0", (128, 128), (128, 128), 1),
    Head("axial b0", (128, 128), (128, 128), 8),
    Head("axial b0", (128, 128), (160, 160), 4),
    Head("axial EPI", (128, 128), (128, 128), 4),
    Head("axial EPI", (128, 128), (160, 160), 16),
    Head("coronal T1", (256, 256), (256, 256), 8),
    Head("coronal T1", (192, 160), (192, 160), 1),
    Head("coronal T1", (256, 256), (256, 256), 4, t2_like=True),
    Head("sagittal T1", (256, 256), (128, 128), 4),
    Head("sagittal T1", (256, 256), (256, 256), 8),
    Head("sagittal T1", (256, 256), (320, 320), 16, t2_like=True),
)


def _load_b0() -> np.ndarray:
    """T2-weighted: three of the slices without diffusion weighting in dipy, of 2 mm; row 0 is the front."""
    import dipy
    import nibabel

    file = Path(dipy.__file__).parent / "data" / "files" / "S0_10slices.nii.gz"
    return np.rot90(np.moveaxis(nibabel.nifti1.load(file).get_fdata()[:, :, (1, 5, 8), 0], 2, 0), axes=(1, 2))


def _load_epi() -> np.ndarray:
    """T2*-weighted: three slices of the functional scan in nibabel's test data, of 2 mm; row 0 is the front."""
    import nibabel

    file = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    return np.rot90(np.moveaxis(nibabel.nifti1.load(file).get_fdata()[:, :, (8, 12, 16), 0], 2, 0), axes=(1, 2))


def _load_coronal() -> np.ndarray:
    """T1-weighted, without the skull: the slice that dipy carries."""
    import dipy

    return np.load(Path(dipy.__file__).parent / "data" / "files" / "t1_coronal_slice.npy")[None]


def _load_sagittal() -> np.ndarray:
    """T1-weighted, with face and neck: the slice in matplotlib's sample data."""
    file = Path(matplotlib.get_data_path()) / "sample_data" / "s1045.ima.gz"
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint16).reshape(1, 256, 256)


SOURCES: dict[str, Callable[[], np.ndarray]] = {  # magnitudes, (slices, height, width)
    "axial b0": _load_b0,
    "axial EPI": _load_epi,
    "coronal T1": _load_coronal,
    "sagittal T1": _load_sagittal,
}


def invert_contrast(image: np.ndarray) -> np.ndarray:
    """Turn a T1-weighted image, with its bright tissue at 1, into a T2-like one.

    The signal is exp(-2 t), so that fluid is brightest and fat darkest, times a step that leaves air and bone (t below
    about 0.08) dark, within the smoothed outline of the head, where the step would light up half-filled pixels.
    """
    outline = np.clip(scipy.ndimage.gaussian_filter(image, (0, 3, 3)) / 0.2, 0, 1)
    return outline * (1 - np.exp(-((image / 0.08) ** 2))) * np.exp(-2 * image)


def make_sensitivities(rng: np.random.Generator, coils: int, size: tuple[int, int]) -> np.ndarray:
    """Draw coils around the head, complex (coils, height, width), of RSS 1 on average; one coil is uniform."""
    if coils == 1:
        return np.ones((1, *size))
    y, x = np.ogrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    maps = np.empty((coils, *size), complex)
    for coil, start in enumerate(rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(coils) / coils):
        angle, distance, width = start + rng.normal(0, 0.1), rng.uniform(0.9, 1.3), rng.uniform(0.5, 1.0)
        squared = (y - distance * np.sin(angle)) ** 2 + (x - distance * np.cos(angle)) ** 2
        slope_y, slope_x = rng.normal(0, 0.8, 2)
        phase = rng.uniform(-np.pi, np.pi) + slope_y * y + slope_x * x
        maps[coil] = np.exp(1j * phase) / (1 + squared / width**2)
    return maps / np.sqrt((np.abs(maps) ** 2).sum(0)).mean()


def acquire(image: np.ndarray, coils: int, rng: np.random.Generator) -> np.ndarray:
    """Acquire fully sampled k-space, complex64 (slices, coils, height, width), of (slices, height, width)."""
    size = image.shape[-2:]
    phase = scipy.ndimage.zoom(rng.standard_normal((4, 4)), np.divide(size, 4), order=3)
    coil_images = (image * np.exp(1j * phase))[:, None] * make_sensitivities(rng, coils, size)
    signal = (image**2).sum() / image.sum()  # weighted by itself, so that the air counts little
    noise = rng.standard_normal((2, *coil_images.shape))
    return centred_fft2_host(coil_images + NOISE * signal * (noise[0] + 1j * noise[1])).astype(np.complex64)


def make_kspace(measured: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Make every head's k-space, and read the one that was measured, if its file is there: each with its name.

    It is a MATLAB file with `data`, complex (height, width), of one coil.
    """
    for number, head in enumerate(HEADS):
        image = resize.crop_or_pad(SOURCES[head.source]().astype(float), head.field)
        image /= np.percentile(image, 99.8)
        image = invert_contrast(image) if head.t2_like else image
        if head.size != head.field:
            kspace = resize.resize_kspace(centred_fft2_host(image), head.size, "kspace")
            image = magnitude_host(kspace[:, None])
        yield head.name, acquire(image, head.coils, np.random.default_rng(number))
    if measured.exists():
        kspace = scipy.io.loadmat(measured)["data"]
        kspace = (kspace / np.linalg.norm(kspace)).astype(np.complex64)[None, None]
        yield f"{measured.stem}, as measured, {kspace.shape[2]}x{kspace.shape[3]}, 1 coil", kspace


def write(folder: Path, measured: Path) -> Volumes:
    """Write every head at each acceleration, undersampled by random columns, with its mask and its target."""
    volumes: Volumes = {acceleration: {} for acceleration in CENTRE_FRACTIONS}
    for number, (name, kspace) in enumerate(make_kspace(measured)):
        target, columns = magnitude_host(kspace), jnp.ones(kspace.shape[-1], bool)
        for acceleration, centre_fraction in CENTRE_FRACTIONS.items():
            acquisition = Acquisition((float(acceleration),), (centre_fraction,), noise=(0.0, 0.0))
            protocol = draw_protocol(
                jax.random.key(number), jnp.asarray(kspace[0]), columns, jnp.asarray(target[0]), acquisition
            )
            mask = np.array(protocol.mask[0])
            path = folder / f"{number:02d}_{acceleration}x.t5"
            arrays = {"kspace": np.where(mask, kspace, 0), "mask": mask, "reconstruction_rss": target}
            hdf5.write(path, arrays, {"max": float(target.max()), "acquisition": name})
            volumes[acceleration][name] = readers.describe(str(path))
    return volumes
