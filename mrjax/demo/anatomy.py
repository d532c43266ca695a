"""Anatomy of the demo subjects: deformed copies of a real brain with skull, scalp and eyes built around it.

The brain is the MNI152 2009a symmetric template (Fonov et al., NeuroImage 2011, doi:10.1016/j.neuroimage.2010.07.033)
that the package nilearn carries. It is skull-stripped, so fluid, skull, orbits and scalp are modelled here.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from mrjax.errors import UserError

FIELD_OF_VIEW = 250.0  # mm
THICKNESS = 5.0  # mm
COVERAGE = (-35.0, 70.0)  # MNI z in mm of the centres of the lowest and the highest slice
# Proton density (water = 1: Tofts, Quantitative MRI of the Brain, 2003), T1 and T2 in ms at 0.3 T. T1 of brain is
# between the values at 0.2 and 1 T of Rooney et al. (Magn Reson Med 2007, doi:10.1002/mrm.21122); T1 of muscle and fat,
# and T2, which hardly depends on the field, are of Bottomley et al. (Med Phys 1984, doi:10.1118/1.595535).
TISSUES = {
    "white": (0.71, 400.0, 90.0),
    "grey": (0.81, 720.0, 101.0),
    "fluid": (1.00, 4200.0, 1800.0),
    "lesion": (0.90, 800.0, 190.0),
    "fat": (0.85, 200.0, 84.0),
    "muscle": (0.75, 450.0, 47.0),
    "bone": (0.10, 300.0, 15.0),
}


class Subject(NamedTuple):
    """Which subject: the seed of all its random numbers."""

    seed: int
    split: int
    number: int

    def generator(self, *stream: int) -> np.random.Generator:
        """Make the random generator of one purpose (0 anatomy, 1 tissue, 2 contrast, 3 noise, 4 coils)."""
        return np.random.default_rng((*self, *stream))


class Template(NamedTuple):
    """Head that all subjects are deformed from: float32 volumes in MNI space, axes to the right, front and top."""

    grey: np.ndarray  # fraction, 1 mm
    white: np.ndarray  # fraction, 1 mm
    texture: np.ndarray  # T1-weighted intensity over that of its tissue mixture, minus 1; 1 mm
    brain: np.ndarray  # signed distance from the brain in mm, negative inside; 2 mm
    vault: np.ndarray  # signed distance from the convex hull (nearly) of the brain in mm, negative inside; 2 mm
    skin: np.ndarray  # depth below the skin in mm, negative in the air; 2 mm
    origin: np.ndarray  # MNI coordinates of voxel 0 in mm, (3, 1, 1, 1, 1)


class Anatomy(NamedTuple):
    """Slices of one subject; row 0 is the front, column 0 the patient's right."""

    fractions: np.ndarray  # float32 (tissues, slices, size, size): volume fractions in order of `TISSUES`, else air
    texture: np.ndarray  # float32 (slices, size, size): relative deviation of the T1-weighted signal


@functools.cache
def load_template() -> Template:
    """Load the template head from nilearn's files, which takes seconds; a `UserError` if it is not installed."""
    try:
        from nilearn import datasets
    except ImportError:
        raise UserError("the demo data need nilearn: pip install -e '.[demo]'") from None
    loaded = datasets.load_mni152_template(resolution=1)
    t1 = loaded.get_fdata(dtype=np.float32)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    # Bayes' rule: the tissue maps (the prior) are averages of many brains, the image (the likelihood) is sharper.
    prior = np.stack([grey, white, np.clip(1 - grey - white, 0, 1) + 0.02])
    means, deviations = np.array([[0.65, 0.88, 0.26], [0.1, 0.1, 0.14]], np.float32)[..., None, None, None]
    joint = prior * np.exp(-0.5 * ((t1 - means) / deviations) ** 2)
    grey, white, fluid = tissues = joint / (joint.sum(0) + 1e-6)
    mask, mixture = t1 > 0.1, (means * tissues).sum(0)
    texture = np.where(mask & (fluid < 0.3), t1 / np.maximum(mixture, 0.2) - 1, 0)
    origin = loaded.affine[:3, 3].reshape(3, 1, 1, 1, 1)
    volumes = (grey, white, np.clip(texture, -0.3, 0.3), *_head_surfaces(mask[::2, ::2, ::2], origin), origin)
    return Template(*(volume.astype(np.float32) for volume in volumes))


def _head_surfaces(mask: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Template.brain`, `vault` and `skin` from the brain mask on a 2 mm grid."""
    distance = functools.partial(scipy.ndimage.distance_transform_edt, sampling=2)
    smooth = scipy.ndimage.gaussian_filter

    def distance_to_closing(radius: float) -> np.ndarray:
        """Signed distance from the mask after morphological closing with a ball of this radius in mm."""
        return smooth(radius - distance(distance(~mask) < radius), 0.7)

    xyz = origin[..., 0] + 2 * np.indices(mask.shape, np.float32)
    face = _ellipsoid(xyz, (0, 20, -52), (71, 67, 75)) < 0
    neck = _ellipsoid(xyz, (0, -32, -70), (66, 66, 70)) < 0
    vault = smooth(distance_to_closing(24), 1.5)
    head = smooth(((vault < 13) | face | neck).astype(np.float32), 3) > 0.5
    return distance_to_closing(5), vault, smooth(distance(head) - distance(~head), 0.7)


def make_anatomy(template: Template, subject: Subject, *, size: int, slices: int) -> Anatomy:
    """Make a subject's anatomy: the same at any number of pixels and slices."""
    rng = subject.generator(0)
    age = rng.uniform() ** 2  # 0 is a young brain; 1 an old one, with wide fluid spaces and many lesions
    lesions = _draw_lesions(rng, template, count=int(rng.poisson(1 + 9 * age)))
    skull_thickness, fat_thickness = rng.uniform(5.5, 8), rng.uniform(2.5, 5.5)  # mm
    xyz = _draw_coordinates(rng, template, size, slices)
    index = xyz - template.origin
    brain, vault, skin = (_interpolate(v, index, 2) for v in (template.brain, template.vault, template.skin))
    grey, white, texture = (_interpolate(v, index, 1) for v in (template.grey, template.white, template.texture))

    def random_field(spacing: float, sd: float) -> np.ndarray:
        return _interpolate(_random_field(rng, template.grey.shape, spacing, sd), index, 4)

    # The brain: tissue borders are moved at random, and fluid fills what is left inside the dura.
    marbling = random_field(5, 1)
    fluid = np.clip(1 - grey - white, 0, 1) * np.exp(random_field(7, 0.6) + 1.4 * age - 0.2)
    grey = grey * np.exp(random_field(9, 0.7))
    dura = 1.2 + age + random_field(30, 0.5)  # mm from the brain
    inside = _soft_step(dura - brain)
    grey, white, fluid = inside / (grey + white + fluid) * (grey, white, fluid)
    lesion = np.zeros_like(white)
    for centre, radius in lesions:
        distance = _ellipsoid(xyz, centre, (1, 1, 1)) + 1
        lesion = np.maximum(lesion, white * _soft_step(radius * (1 + 0.25 * marbling) - distance))
    # The skull: two tables of bone with diploe (marrow) between them, and air cells towards the base.
    height = vault - dura - skull_thickness - random_field(30, 0.8)
    bone = _soft_step(-height) * (1 - inside)
    diploe = _soft_step(brain - dura - 1.8) * _soft_step(-height - 1.8) * np.clip(0.7 + 0.25 * marbling, 0, 1)
    marrow = bone * diploe * (1 - _soft_step(-vault - 2) * _soft_step(4 * (marbling - 0.3)))
    # The scalp: 1.8 mm of skin, a layer of fat, and muscle marbled with fat.
    outside = np.clip(_soft_step(skin) - inside, 0, 1)
    scalp = np.clip(outside - bone, 0, 1)
    layer = np.maximum(_soft_step(1.8 + fat_thickness + random_field(36, 0.8) - skin), 0.2 * _soft_step(2 * marbling))
    scalp_fat = scalp * (1 - _soft_step(1.8 - skin)) * layer
    # The face: eyes in orbits full of fat, and the nasal cavity.
    symmetric = (np.abs(xyz[0]), *xyz[1:])
    orbit = _soft_step(-_ellipsoid(symmetric, (31, 48, -37), (20, 27, 18)))
    eye = orbit * _soft_step(-_ellipsoid(symmetric, (32, 60, -37), (12.5, 12.5, 12.5)))
    nose = _soft_step(-_ellipsoid(xyz, (0, 55, -52), (13, 32, 30))) * _soft_step(3 * marbling + 1.5)
    rest = (1 - orbit) * (1 - nose)
    fractions = {
        "white": white - lesion,
        "grey": grey,
        "fluid": fluid + outside * eye,
        "lesion": lesion,
        "fat": (0.75 * marrow + scalp_fat) * rest + outside * (orbit - eye),
        "muscle": (scalp - scalp_fat) * rest,
        "bone": bone * (1 - diploe) * rest,
    }
    return Anatomy(np.stack([fractions[name].mean(1) for name in TISSUES]), (texture * inside).mean(1))


def slice_heights(count: int) -> np.ndarray:
    """Heights of evenly spaced slices in mm about the middle of the covered range, float64 (count,)."""
    return (np.arange(count) - (count - 1) / 2) * np.ptp(COVERAGE) / max(count - 1, 1)


def _draw_coordinates(rng: np.random.Generator, template: Template, size: int, slices: int) -> np.ndarray:
    """MNI coordinates in mm, float32 (3, slices, 2, size, size), of a subject's voxels: two thin sections a slice."""
    angles, shear = rng.normal(0, (0.05, 0.04, 0.05)), rng.normal(0, 0.02, 3)
    scale = rng.normal((1, 1.03, 1), 0.03)
    centre = rng.normal([0.0, -17.0, float(np.mean(COVERAGE))], 3)[:, None, None, None, None]
    step = (np.arange(size) - size // 2) * (FIELD_OF_VIEW / size)
    sections = slice_heights(slices)[:, None, None, None] + THICKNESS * np.array([-0.25, 0.25])[:, None, None]
    grid = np.stack(np.broadcast_arrays(-step, -step[:, None], sections))
    rotation = scipy.spatial.transform.Rotation.from_euler("xyz", angles).as_matrix()
    matrix = np.diag(1 / scale) @ rotation + np.diag(shear[:2], 1) + np.diag(shear[2:], 2)
    xyz = (np.tensordot(matrix, grid, 1) + centre).astype(np.float32)
    index = xyz - template.origin
    for axis in xyz:
        bend = _random_field(rng, template.grey.shape, 60, 3) + _random_field(rng, template.grey.shape, 16, 0.8)
        axis += _interpolate(bend, index, 4)
    return xyz


def _draw_lesions(rng: np.random.Generator, template: Template, count: int) -> list[tuple[list[float], float]]:
    """Centres (MNI, mm) and radii (mm) of lesions well inside the white matter."""
    lesions: list[tuple[list[float], float]] = []
    while len(lesions) < count:
        voxel = rng.integers(0, template.white.shape)
        if template.white[tuple(voxel)] > 0.97 and voxel[2] > 75:
            lesions.append(((voxel + template.origin.ravel()).tolist(), rng.uniform(1.2, 4.5)))
    return lesions


def _random_field(rng: np.random.Generator, extent: Sequence[int], spacing: float, sd: float) -> np.ndarray:
    """Smooth random field of about this deviation, float32 on a 4 mm grid over `extent` mm, `spacing` mm smooth."""
    knots = rng.normal(0, 1.25 * sd, [int(e // spacing) + 4 for e in extent])
    return spline(knots, [np.arange(0, e + 4, 4) / spacing + 1 for e in extent]).astype(np.float32)


def spline(values: np.ndarray, positions: Sequence[np.ndarray]) -> np.ndarray:
    """Interpolate `values` (a, b, c) by cubic splines at `positions` along each axis, counted in samples of it."""
    for axis, samples in enumerate(values.shape):
        values = scipy.interpolate.CubicSpline(np.arange(samples), values, axis)(positions[axis])
    return values


def _interpolate(volume: np.ndarray, index: np.ndarray, voxel: float) -> np.ndarray:
    """`volume`, of voxels of this size in mm, at `index` (3, ...) in mm, linearly."""
    return scipy.ndimage.map_coordinates(volume, index / np.float32(voxel), order=1, mode="nearest", output=np.float32)


def _soft_step(distance: np.ndarray) -> np.ndarray:
    """Linear ramp from 0 to 1 over 1.5 mm about distance 0."""
    return np.clip(distance / 1.5 + 0.5, 0, 1)


def _ellipsoid(xyz: Iterable[np.ndarray], centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Signed distance from an ellipsoid in mm, negative inside; exact for a sphere, approximate otherwise."""
    norm = np.sqrt(sum(((x - c) / r) ** 2 for x, c, r in zip(xyz, centre, radii, strict=True)))
    return (norm - 1) * min(radii)
