"""The embedded demo data: M4Raw-like scans of a real brain, deformed, contrasted and measured anew for every subject.

The anatomy is the MNI152 2009a symmetric template (Fonov et al., NeuroImage 2011, doi:10.1016/j.neuroimage.2010.07.033)
that the package nilearn carries inside it. It is skull-stripped, so fluid, skull, orbits and scalp are built round it.
Each subject gets a deformation, tissue parameters, atrophy, lesions and a coil array; each scan its own noise.
The contrast comes from the signal equations with relaxation times at 0.3 T, the field strength of M4Raw.

    python -m mrjax.demo.acquisition --output=data/demo
"""

import concurrent.futures
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from mrjax import cli
from mrjax.data import hdf5, ismrmrd
from mrjax.errors import UserError

SPLITS = ("train", "val", "test")
SUBJECTS = {"train": 12, "val": 2, "test": 2}
# What tasks on repeated scans are shown with: as many repetitions as M4Raw's T1 and T2 have, of half the subjects.
REPEATED: dict[str, Any] = {"repetitions": 3, "subjects": {"train": 6, "val": 1, "test": 1}}
FIELD_OF_VIEW = 250.0  # mm
THICKNESS = 5.0  # mm
COVERAGE = (-35.0, 70.0)  # mm in MNI z: the centres of the lowest and of the highest slice

# Tissue: proton density (water = 1), T1 and T2 in ms at 0.3 T. Brain T1: between the values at 0.2 and 1 T of Rooney et
# al. (Magn Reson Med 2007, doi:10.1002/mrm.21122). Muscle and fat T1, and the T2, which hardly depends on the field:
# Bottomley et al. (Med Phys 1984, doi:10.1118/1.595535). Proton density: Tofts, Quantitative MRI of the Brain (2003).
TISSUES = {
    "white": (0.71, 400.0, 90.0),
    "grey": (0.81, 720.0, 101.0),
    "fluid": (1.00, 4200.0, 1800.0),
    "lesion": (0.90, 800.0, 190.0),
    "fat": (0.85, 200.0, 84.0),
    "muscle": (0.75, 450.0, 47.0),
    "bone": (0.10, 300.0, 15.0),
}
# Contrast: TR and TE in ms, and whether an inversion nulls the fluid; spin echoes as M4Raw's (Lyu et al., Sci Data
# 2023, doi:10.1038/s41597-023-02181-4).
PROTOCOLS = {"T1": (500.0, 18.4, False), "T2": (5500.0, 128.0, False), "FLAIR": (7500.0, 96.0, True)}


class Template(NamedTuple):
    """The head all subjects come from: float32 volumes over MNI space, axes to the right, front and top."""

    grey: np.ndarray  # fraction, 1 mm
    white: np.ndarray  # fraction, 1 mm
    texture: np.ndarray  # T1-weighted intensity over that of its tissue mixture, minus 1; 1 mm
    brain: np.ndarray  # signed distance from the brain in mm, negative inside; 2 mm
    vault: np.ndarray  # signed distance from the convex hull (nearly) of the brain in mm, negative inside; 2 mm
    skin: np.ndarray  # depth below the skin in mm, negative in the air; 2 mm
    origin: np.ndarray  # MNI coordinates (x, y, z) of voxel 0 in mm


class Anatomy(NamedTuple):
    """One subject's slices."""

    fractions: np.ndarray  # float32 (tissues, slices, size, size): volume fractions as in `TISSUES`, the rest air
    texture: np.ndarray  # float32 (slices, size, size): relative deviation of the T1-weighted signal


def make(
    output: str | os.PathLike[str],
    *,
    size: int = 128,
    coils: int = 4,
    slices: int = 18,
    subjects: dict[str, int] | None = None,
    repetitions: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Writes `output/{train,val,test}/<study>_<T1|T2|FLAIR><NN>.t5`, all of it or nothing; no subject is in two splits.

    A file holds `kspace` complex64 (slices, coils, size, size), centred and orthonormal, `reconstruction_rss` float32
    (slices, size, size), `ismrmrd_header`, and fastMRI's attributes. The brain has a signal of about 0.4. The same
    arguments give the same bytes, and a subject's anatomy depends on `seed`, split and number alone.

    Args:
      output: a folder that does not exist yet, or is empty.
      size: pixels along either side of the 250 mm field of view, at least 32.
      coils: receive coils round the head; one is a volume coil.
      slices: axial slices of 5 mm, evenly spaced over the brain: 6.2 mm apart where there are 18.
      subjects: number of subjects by split; `SUBJECTS` where None.
      repetitions: scans of every contrast, which differ by their noise.
      seed: a whole number, not negative.
      progress: whether to draw a progress bar.
    """
    subjects = SUBJECTS if subjects is None else subjects
    limits = {"size": (size, 32), "coils": (coils, 1), "slices": (slices, 1), "repetitions": (repetitions, 1)}
    for name, (value, least) in (limits | {"seed": (seed, 0)}).items():
        if value < least:
            raise UserError(f"{name} is {value}, expected a whole number of at least {least}")
    if unknown := set(subjects) - set(SPLITS):
        raise UserError(f"subjects names the split {min(unknown)!r}, expected {', '.join(SPLITS)}")
    if repetitions > 99 or not all(0 <= n <= 9999 for n in subjects.values()) or not sum(subjects.values()):
        raise UserError(
            f"subjects is {subjects} and repetitions {repetitions}, expected 1 subject or more in all, "
            "at most 9999 a split and at most 99 repetitions"
        )
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists already and is not an empty folder, expected a new folder for the demo data")
    template = load_template()
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        part.chmod(0o755)
        for split in SPLITS:
            (part / split).mkdir()
        keys = [(seed, i, number) for i, split in enumerate(SPLITS) for number in range(subjects.get(split, 0))]
        # Threads suffice: interpolation, random numbers and FFTs all run without the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            done = pool.map(lambda key: _write_subject(part, template, key, size, coils, slices, repetitions), keys)
            for _ in tqdm(done, total=len(keys), desc="demo data", unit="subject", disable=not progress):
                pass
        part.replace(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_subject(
    folder: Path, template: Template, key: tuple[int, int, int], size: int, coils: int, slices: int, repetitions: int
) -> None:
    split, number = SPLITS[key[1]], key[2] + 1
    study = f"2026{key[1] + 1:02d}{number:04d}"
    anatomy = subject(template, key, size=size, slices=slices)
    maps = sensitivities(key, size=size, coils=coils, slices=slices)
    pixel = FIELD_OF_VIEW / size
    header = ismrmrd.header((size, size), (size, size), pixel_mm=(pixel, pixel), thickness_mm=THICKNESS)
    for i, contrast in enumerate(PROTOCOLS):
        clean = image(anatomy, key, contrast)
        for repetition in range(1, repetitions + 1):
            rng = np.random.default_rng((*key, 3, i, repetition))
            kspace = measure(clean, maps, rng, noise=0.4 / rng.uniform(24, 34))
            rss = root_sum_of_squares(kspace)
            hdf5.write(
                folder / split / f"{study}_{contrast}{repetition:02d}.t5",
                {"kspace": kspace, "reconstruction_rss": rss, "ismrmrd_header": header},
                {
                    "max": float(rss.max()),
                    "norm": float(np.linalg.norm(rss)),
                    "acquisition": contrast,
                    "patient_id": study,
                },
            )


# Anatomy


@functools.cache
def load_template() -> Template:
    """The template head, from nilearn's own files: a few seconds, once a process."""
    try:
        from nilearn import datasets
        from scipy import ndimage
    except ImportError:
        raise UserError("the demo data need nilearn: pip install -e '.[demo]'") from None
    loaded = datasets.load_mni152_template(resolution=1)
    t1 = loaded.get_fdata(dtype=np.float32)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    # The tissue maps are averages of many brains, the template is crisper: one step of Bayes joins the two.
    fluid = np.clip(1 - grey - white, 0, 1) + 0.02
    means = np.array([0.65, 0.88, 0.26], np.float32)
    prior = np.stack([grey, white, fluid])
    joint = prior * np.exp(-0.5 * np.stack([(t1 - m) / sd for m, sd in zip(means, (0.1, 0.1, 0.14), strict=True)]) ** 2)
    grey, white, fluid = joint / (joint.sum(0) + 1e-6)
    mask = t1 > 0.1
    mixture = means[0] * grey + means[1] * white + means[2] * fluid
    texture = np.where(mask & (fluid < 0.3), t1 / np.maximum(mixture, 0.2) - 1, 0)

    def closed(radius: float) -> np.ndarray:
        """Distance from the brain once gaps narrower than twice the radius are filled; right up to it outside."""
        grown = ndimage.distance_transform_edt(~coarse, sampling=2) < radius
        return ndimage.gaussian_filter(radius - ndimage.distance_transform_edt(grown, sampling=2), 0.7)

    coarse = mask[::2, ::2, ::2]
    origin = np.asarray(loaded.affine)[:3, 3]
    x, y, z = (origin[i] + 2.0 * g for i, g in enumerate(np.indices(coarse.shape, np.float32)))
    face = _ellipsoid((x, y, z), (0, 20, -52), (71, 67, 75)) < 0
    neck = _ellipsoid((x, y, z), (0, -32, -70), (66, 66, 70)) < 0
    vault = ndimage.gaussian_filter(closed(24), 1.5)
    skin = ndimage.gaussian_filter(((vault < 13) | face | neck).astype(np.float32), 3) > 0.5
    depth = ndimage.distance_transform_edt(skin, sampling=2) - ndimage.distance_transform_edt(~skin, sampling=2)
    volumes = (grey, white, np.clip(texture, -0.3, 0.3), closed(5), vault, ndimage.gaussian_filter(depth, 0.7))
    return Template(*[v.astype(np.float32) for v in volumes], origin)  # type: ignore[call-arg]


def subject(template: Template, key: tuple[int, int, int], *, size: int, slices: int) -> Anatomy:
    """Anatomy of the subject with this (seed, split, number); row 0 is the front, column 0 the patient's right."""
    rng = np.random.default_rng((*key, 0))
    age = rng.uniform() ** 2  # 0 is a young brain; an old one has wide fluid spaces and many lesions
    spots = _spots(rng, template, count=int(rng.poisson(1 + 9 * age)))
    skull, fat = rng.uniform(5.5, 8), rng.uniform(2.5, 5.5)  # mm
    xyz = _coordinates(rng, template, size, slices)
    index = xyz - template.origin.astype(np.float32)[:, None, None, None, None]
    sides = (np.abs(xyz[0]), *xyz[1:])
    near, far, depth = (_sample(v, index, 2) for v in (template.brain, template.vault, template.skin))
    grey, white, texture = (_sample(v, index, 1) for v in (template.grey, template.white, template.texture))

    def varied(spacing: float, sd: float) -> np.ndarray:
        return _sample(_noise(rng, template.grey.shape, spacing, sd), index, 4)

    # The brain, its tissue borders moved a little one way or the other, in the fluid that fills the skull.
    marble = varied(5, 1)
    fluid = np.clip(1 - grey - white, 0, 1) * np.exp(varied(7, 0.6) + 1.4 * age - 0.2)
    grey = grey * np.exp(varied(9, 0.7))
    dura = 1.2 + age + varied(30, 0.5)
    inside = _ramp(dura - near)
    grey, white, fluid = inside / (grey + white + fluid) * (grey, white, fluid)
    lesion = np.zeros_like(white)
    for place, radius in spots:
        away = _ellipsoid(xyz, place, (1, 1, 1)) + 1
        lesion = np.maximum(lesion, white * _ramp(radius * (1 + 0.25 * marble) - away))
    # The skull: two tables of bone with marrow between them, and air cells towards the base.
    height = far - dura - skull - varied(30, 0.8)
    bone = _ramp(-height) * (1 - inside)
    diploe = _ramp(near - dura - 1.8) * _ramp(-height - 1.8) * np.clip(0.7 + 0.25 * marble, 0, 1)
    marrow = bone * diploe * (1 - _ramp(-far - 2) * _ramp(4 * (marble - 0.3)))
    # The scalp: skin, fat, and muscle marbled with fat.
    outside = np.clip(_ramp(depth) - inside, 0, 1)
    scalp = np.clip(outside - bone, 0, 1)
    layer = np.maximum(_ramp(1.8 + fat + varied(36, 0.8) - depth), 0.2 * _ramp(2 * marble))
    grease = scalp * (1 - _ramp(1.8 - depth)) * layer
    # The face: eyes in orbits full of fat, and the cavity of the nose.
    orbit = _ramp(-_ellipsoid(sides, (31, 48, -37), (20, 27, 18)))
    globe = orbit * _ramp(-_ellipsoid(sides, (32, 60, -37), (12.5, 12.5, 12.5)))
    keep = (1 - orbit) * (1 - _ramp(-_ellipsoid(xyz, (0, 55, -52), (13, 32, 30))) * _ramp(3 * marble + 1.5))
    parts = {
        "white": white - lesion,
        "grey": grey,
        "fluid": fluid + outside * globe,
        "lesion": lesion,
        "fat": (0.75 * marrow + grease) * keep + outside * (orbit - globe),
        "muscle": (scalp - grease) * keep,
        "bone": bone * (1 - diploe) * keep,
    }
    return Anatomy(np.stack([parts[t].mean(1) for t in TISSUES]), (texture * inside).mean(1))


def _coordinates(rng: np.random.Generator, template: Template, size: int, slices: int) -> np.ndarray:
    """MNI coordinates in mm, float32 (3, slices, 2, size, size), of a subject's voxels: two thin sections a slice."""
    angles, shear = rng.normal(0, (0.05, 0.04, 0.05)), rng.normal(0, 0.02, 3)
    scale = rng.normal((1, 1.03, 1), 0.03)
    centre = rng.normal([0.0, -17.0, float(np.mean(COVERAGE))], 3)[:, None, None, None, None]
    heights = (np.linspace(*COVERAGE, slices) if slices > 1 else np.full(1, np.mean(COVERAGE))) - np.mean(COVERAGE)
    step = (np.arange(size) - size // 2) * (FIELD_OF_VIEW / size)
    sections = heights[:, None, None, None] + THICKNESS * np.array([-0.25, 0.25])[:, None, None]
    grid = np.stack(np.broadcast_arrays(-step, -step[:, None], sections))
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    turn = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]
    turn = turn @ [[1, 0, 0], [0, cx, -sx], [0, sx, cx]]
    matrix = np.diag(1 / scale) @ turn + np.diag(shear[:2], 1) + np.diag(shear[2:], 2)
    xyz = (np.tensordot(matrix, grid, 1) + centre).astype(np.float32)
    index = xyz - template.origin.astype(np.float32)[:, None, None, None, None]
    for axis in xyz:
        bend = _noise(rng, template.grey.shape, 60, 3) + _noise(rng, template.grey.shape, 16, 0.8)
        axis += _sample(bend, index, 4)
    return xyz


def _spots(rng: np.random.Generator, template: Template, count: int) -> list[tuple[list[float], float]]:
    """Centres (MNI, mm) and radii (mm) of lesions, well inside the white matter."""
    spots: list[tuple[list[float], float]] = []
    while len(spots) < count:
        at = rng.integers(0, template.white.shape)
        if template.white[tuple(at)] > 0.97 and at[2] > 75:
            spots.append(((at + template.origin).tolist(), rng.uniform(1.2, 4.5)))
    return spots


def _noise(rng: np.random.Generator, extent: tuple[float, ...], spacing: float, sd: float) -> np.ndarray:
    """Random field of about this deviation, float32 on a 4 mm grid over `extent` mm, from knots `spacing` mm apart."""
    knots = rng.normal(0, 1.25 * sd, [int(e // spacing) + 4 for e in extent])
    return _refine(knots, [np.arange(0, e + 4, 4) / spacing + 1 for e in extent]).astype(np.float32)


def _refine(values: np.ndarray, places: Sequence[np.ndarray]) -> np.ndarray:
    """Cubic splines through `values` (a, b, c), at `places` along every axis, counted in steps of that axis."""
    from scipy.interpolate import CubicSpline

    weights = [CubicSpline(np.arange(n), np.eye(n))(p) for n, p in zip(values.shape, places, strict=True)]
    return np.einsum("ai,bj,ck,ijk->abc", *weights, values, optimize=True)


def _sample(volume: np.ndarray, index: np.ndarray, step: float) -> np.ndarray:
    """`volume`, whose voxels are `step` apart, at `index` (3, ...), linearly."""
    from scipy import ndimage

    return ndimage.map_coordinates(volume, index / np.float32(step), order=1, mode="nearest", output=np.float32)


def _ramp(distance: np.ndarray, width: float = 1.5) -> np.ndarray:
    """Step from 0 to 1 at distance 0, smeared over `width` mm."""
    return np.clip(distance / width + 0.5, 0, 1)


def _ellipsoid(at: Iterable[np.ndarray], centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Distance to an ellipsoid in mm, negative inside; exact for a sphere, near enough otherwise."""
    norm = np.sqrt(sum(((a - c) / r) ** 2 for a, c, r in zip(at, centre, radii, strict=True)))
    return (norm - 1) * min(radii)


# Physics


def signal(contrast: str, density: Any, t1: Any, t2: Any, tr: float, te: float) -> Any:
    """Spin-echo signal, after an inversion where the protocol has one; times in ms, all arguments broadcast.

        PD (1 - exp(-TR/T1)) exp(-TE/T2)                        spin echo
        PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2)        inversion recovery, negative before its null

    (Bernstein, King, Zhou: Handbook of MRI Pulse Sequences, 2004, chapter 14). TI nulls the nominal fluid, as an
    operator sets it: TI = T1 (ln 2 - ln(1 + exp(-TR/T1))).
    """
    recovery = 1 - np.exp(-tr / t1)
    if PROTOCOLS[contrast][2]:
        fluid = TISSUES["fluid"][1]
        ti = fluid * (math.log(2) - math.log1p(math.exp(-tr / fluid)))
        recovery = 1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)
    return density * recovery * np.exp(-te / t2)


def image(anatomy: Anatomy, key: tuple[int, int, int], contrast: str) -> np.ndarray:
    """Noise-free image, complex64 (slices, size, size), of a subject's anatomy; the brain's mean magnitude is 0.4."""
    rng = np.random.default_rng((*key, 1))
    density, t1, t2 = np.array(list(TISSUES.values())).T * rng.normal(1, [[0.015], [0.03], [0.03]], (3, len(TISSUES)))
    rng = np.random.default_rng((*key, 2, list(PROTOCOLS).index(contrast)))
    tr, te = np.multiply(PROTOCOLS[contrast][:2], rng.normal(1, 0.02, 2))
    levels = signal(contrast, density, t1, t2, tr, te)
    # The template's own intensities, beyond its tissue mixture, say where T1 is short: bright in T1, darker elsewhere.
    strength = {"T1": 1.4, "T2": -0.8, "FLAIR": -0.6}[contrast]
    clean = np.tensordot(levels, anatomy.fractions, 1) * (1 + strength * anatomy.texture)
    clean *= 0.4 / max(levels[:2].mean(), 1e-6)
    slices, size = clean.shape[:2]
    plane = np.linspace(0, 4, size)
    bias, phase = (_refine(rng.standard_normal((3, 5, 5)), (np.linspace(0, 2, slices), plane, plane)) for _ in range(2))
    return (np.abs(clean) * np.exp(0.05 * bias + 1j * (0.6 * phase + rng.uniform(-3, 3)))).astype(np.complex64)


def sensitivities(key: tuple[int, int, int], *, size: int, coils: int, slices: int) -> np.ndarray:
    """Receive sensitivities, complex64 (slices, coils, size, size): circular loops round the head by Biot-Savart.

    The main field points along z, so a loop receives Bx - i By. Root-sum-of-squares is 1 on average over the head.
    A single coil is taken for a volume coil: uniform.
    """
    if coils == 1:
        return np.ones((slices, 1, size, size), np.complex64)
    rng = np.random.default_rng((*key, 4))
    plane = np.linspace(-0.5, 0.5, 25) * FIELD_OF_VIEW
    heights = np.linspace(*COVERAGE, 5) - np.mean(COVERAGE)
    at = np.stack(np.meshgrid(heights, plane, plane, indexing="ij"), -1)[..., ::-1]  # (5, 25, 25, 3): x, y, z
    angles = 2 * np.pi * (np.arange(coils) + 0.5) / coils + rng.normal(0, 0.06, coils)
    radius = float(np.clip(480 / coils, 50, 110))
    turn = np.linspace(0, 2 * np.pi, 25)
    maps = []
    for angle in angles:
        outward = np.array([np.cos(angle), np.sin(angle), 0])
        across = np.array([-np.sin(angle), np.cos(angle), 0])
        middle = outward * rng.normal([150, 170, 0], 4) + [0, 0, rng.normal(0, 8)]
        wire = middle + radius * (np.cos(turn)[:, None] * across + np.sin(turn)[:, None] * [0, 0, 1])
        element, place = np.diff(wire, axis=0), (wire[1:] + wire[:-1]) / 2
        reach = at[..., None, :] - place
        field = (np.cross(element, reach) / (np.linalg.norm(reach, axis=-1, keepdims=True) ** 3 + 2e4)).sum(-2)
        maps.append((field[..., 0] - 1j * field[..., 1]) * np.exp(1j * rng.uniform(-np.pi, np.pi)))
    coarse = np.stack(maps)
    head = np.hypot(at[..., 0] / 75, at[..., 1] / 95) < 1
    coarse /= np.sqrt((np.abs(coarse) ** 2).sum(0))[head].mean()
    inner = np.linspace(0, 4, slices) if slices > 1 else np.full(1, 2.0)
    across = (np.arange(size) - size // 2) * (24 / size) + 12
    return np.stack([_refine(c, (inner, across, across)) for c in coarse], 1).astype(np.complex64)


def measure(clean: np.ndarray, maps: np.ndarray, rng: np.random.Generator, *, noise: float) -> np.ndarray:
    """K-space, complex64 (slices, coils, size, size), of a noise-free image (slices, size, size) seen through coils.

    `noise` is the standard deviation of the real and of the imaginary part, the same in k-space and in the image since
    the transform is orthonormal.
    """
    from scipy import fft

    coils = np.fft.ifftshift(maps * clean[:, None], axes=(-2, -1))
    kspace = np.fft.fftshift(fft.fft2(coils, norm="ortho"), axes=(-2, -1))
    draws = rng.standard_normal((*kspace.shape, 2), np.float32)
    return kspace + np.float32(noise) * draws.view(np.complex64)[..., 0]


def root_sum_of_squares(kspace: np.ndarray) -> np.ndarray:
    """Image, float32 (slices, height, width), of k-space complex64 (slices, coils, height, width)."""
    from scipy import fft

    coils = np.fft.fftshift(fft.ifft2(np.fft.ifftshift(kspace, axes=(-2, -1)), norm="ortho"), axes=(-2, -1))
    return np.sqrt((np.abs(coils) ** 2).sum(1)).astype(np.float32)


def main(argv: list[str]) -> None:
    """Makes the demo data as the flags say."""
    cli.expect_no_arguments(argv)
    given = flags.FLAGS.flag_values_dict()
    options = {name: given[name] for name in ("size", "coils", "slices", "repetitions", "seed")}
    make(given["output"], subjects={split: given[split] for split in SPLITS}, **options)
    print(f"demo data written to {given['output']}")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder to make; it must not exist yet, or be empty.", required=True)
    flags.DEFINE_integer("size", 128, "Pixels along either side (M4Raw: 256).")
    flags.DEFINE_integer("coils", 4, "Receive coils.")
    flags.DEFINE_integer("slices", 18, "Axial slices of a scan.")
    flags.DEFINE_integer("repetitions", 1, "Scans of every contrast, independent in their noise.")
    flags.DEFINE_integer("seed", 0, "The same seed gives the same files.")
    for _split, _count in SUBJECTS.items():
        flags.DEFINE_integer(_split, _count, f"Subjects in {_split}/.")
    cli.run(main)
