"""Anatomy of the demo subjects: deformed copies of a real brain with skull, scalp and eyes built around it.

The brain is the MNI152 2009a symmetric template (Fonov et al., NeuroImage 2011, doi:10.1016/j.neuroimage.2010.07.033)
that the package nilearn carries. It is skull-stripped, so fluid, skull, orbits and scalp are modelled here.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from mrjax.demo.fields import draw_random_field, interpolate
from mrjax.errors import UserError

FIELD_OF_VIEW = 250.0  # mm
THICKNESS = 5.0  # mm
COVERAGE = (-35.0, 70.0)  # MNI z in mm of the centres of the lowest and the highest slice
_SCALP = 13.0  # mm from the template's vault to its skin
_FARTHEST_SKIN = 14.0  # mm from the template's skin
_CLOSING = 5.0  # mm from the brain; its distance is not known farther out
# Proton density (water = 1: Tofts, Quantitative MRI of the Brain, 2003), T1 and T2 in ms at 0.3 T. T1 of brain is
# between the values at 0.2 and 1 T of Rooney et al. (Magn Reson Med 2007, doi:10.1002/mrm.21122); T1 of muscle and fat,
# and T2, which hardly depends on the field, are of Bottomley et al. (Med Phys 1984, doi:10.1118/1.595535). Blood of
# an acute bleed has a long T1 and a short T2 (Bradley, Radiology 1993, doi:10.1148/radiology.189.1.8372185).
TISSUES = {
    "white": (0.71, 400.0, 90.0),
    "grey": (0.81, 720.0, 101.0),
    "fluid": (1.00, 4200.0, 1800.0),
    "lesion": (0.90, 800.0, 190.0),
    "blood": (0.85, 650.0, 35.0),
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
    ventricle: np.ndarray  # signed distance from the ventricles in mm, negative inside; 2 mm
    skin: np.ndarray  # depth below the skin in mm, negative in the air; 2 mm
    origin: np.ndarray  # MNI coordinates of voxel 0 in mm, (3, 1)


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
    origin = loaded.affine[:3, 3][:, None]
    volumes = (
        grey,
        white,
        np.clip(texture, -0.3, 0.3),
        *_head_surfaces(mask[::2, ::2, ::2], fluid[::2, ::2, ::2], origin),
        origin,
    )
    return Template(*(volume.astype(np.float32) for volume in volumes))


def _head_surfaces(mask: np.ndarray, fluid: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, ...]:
    """`Template.brain`, `vault`, `ventricle` and `skin` from the brain mask and the fluid on a 2 mm grid."""
    distance = functools.partial(scipy.ndimage.distance_transform_edt, sampling=2)
    smooth = scipy.ndimage.gaussian_filter

    def distance_to_closing(radius: float) -> np.ndarray:
        """Signed distance from the mask after morphological closing with a ball of this radius in mm."""
        return smooth(radius - distance(distance(~mask) < radius), 0.7)

    xyz = origin[..., None, None] + 2 * np.indices(mask.shape, np.float32)
    face = _ellipsoid(xyz, (0, 20, -52), (71, 67, 75)) < 0
    neck = _ellipsoid(xyz, (0, -32, -70), (66, 66, 70)) < 0
    vault = smooth(distance_to_closing(24), 1.5)
    head = smooth(((vault < _SCALP) | face | neck).astype(np.float32), 3) > 0.5
    ventricle = (fluid > 0.5) & (vault < -25) & (_ellipsoid(xyz, (0, -18, 15), (45, 65, 26)) < 0)
    ventricle = smooth(distance(~ventricle) - distance(ventricle), 0.5)
    return distance_to_closing(_CLOSING), vault, ventricle, smooth(distance(head) - distance(~head), 0.7)


class Head(NamedTuple):
    """Voxels in and near a subject's head, all (voxels,) or (3, voxels), and what its tissues depend on."""

    rng: np.random.Generator
    random_field: Callable[..., np.ndarray]  # draws the sum of smooth fields, each given by its spacing and deviation
    xyz: np.ndarray  # MNI coordinates in mm
    brain_index: np.ndarray  # where in the template's brain, in mm from voxel 0
    skin: np.ndarray  # the distances of `Template`
    vault: np.ndarray
    brain: np.ndarray
    dura: np.ndarray  # its distance from the brain in mm
    inside: np.ndarray  # fraction inside the dura
    marbling: np.ndarray  # fine random field of deviation 1


def make_anatomy(template: Template, subject: Subject, *, size: int, slices: int) -> Anatomy:
    """Make a subject's anatomy: the same at any number of pixels and slices."""
    rng = subject.generator(0)
    age = rng.uniform() ** 2  # 0 is a young brain; 1 an old one, with wide fluid spaces and many lesions
    xyz = _draw_coordinates(rng, template, size, slices)
    index = xyz - template.origin
    skin = interpolate(template.skin, index, 2)
    # The rest is air, more than half of the voxels.
    near = (skin > -_FARTHEST_SKIN) & np.all((index > 0) & (index < np.reshape(template.grey.shape, (3, 1))), 0)
    xyz, index, skin = xyz[:, near], index[:, near], skin[near]

    def random_field(*scales: tuple[float, float]) -> np.ndarray:
        return interpolate(draw_random_field(rng, template.grey.shape, *scales), index, 4)

    marbling = random_field((5, 1))
    dura = np.clip(1.2 + 2 * age + random_field((30, 0.5)), 0.7, _CLOSING - 1)
    vault = interpolate(template.vault, index, 2)
    # The brain moves within the skull, least at its surface and across the falx.
    shift = np.stack([random_field((32, 3.5), (14, 1.3)) for _ in range(3)])
    shift[0] *= np.clip(np.abs(xyz[0]) / 30, 0.3, 1)
    brain_index = index + np.clip(-vault / 15, 0.2, 1) * shift
    brain = interpolate(template.brain, brain_index, 2)
    inside = _soft_step(dura - brain)
    head = Head(rng, random_field, xyz, brain_index, skin, vault, brain, dura, inside, marbling)
    tissues, texture = _make_brain(head, template, age)
    outside = _make_surroundings(head)
    volumes = np.zeros((len(TISSUES) + 1, near.size), np.float32)
    volumes[:, near] = np.stack([*(tissues.get(name, 0) + outside.get(name, 0) for name in TISSUES), texture])
    volumes = volumes.reshape(-1, slices, 2, size, size).mean(2)
    return Anatomy(volumes[:-1], volumes[-1])


def _make_brain(head: Head, template: Template, age: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Make the tissues inside the dura, which fill it, and the texture."""
    rng, index, random_field = head.rng, head.brain_index, head.random_field
    grey, white, texture = (interpolate(v, index, 1) for v in (template.grey, template.white, template.texture))
    # Tissue borders are moved at random, sulci and ventricles widen with age, and fluid fills what is left.
    fluid = np.clip(1 - grey - white, 0, 1) * np.exp(random_field((7, 0.6)) + 2 * age + rng.normal(-0.4, 0.4))
    grey *= np.exp(random_field((9, 0.7)) + rng.normal(0, 0.25))
    ventricle = interpolate(template.ventricle, index, 2)
    ventricle -= rng.normal(-0.6, 0.7) + 5 * age * rng.uniform() + random_field((25, 0.7))
    fluid = np.maximum(fluid, 8 * _soft_step(-ventricle))
    grey, white, fluid = head.inside / (grey + white + fluid) * (grey, white, fluid)
    rim = white * _soft_step(rng.uniform(-2, 6) * age + head.marbling - ventricle)
    tissues = {"white": white - rim, "grey": grey, "fluid": fluid, "lesion": rim, "blood": np.zeros_like(white)}
    for centre, radius, tissue in _draw_lesions(rng, template, age):
        distance = np.sqrt(((index - centre[:, None]) ** 2).sum(0))
        near = distance < 2 * radius
        share = _soft_step(radius * (1 + 0.25 * head.marbling[near]) - distance[near])
        changing = ("white",) if tissue == "oedema" else tuple(tissues)
        share *= 0.6 if tissue == "oedema" else 1
        changed = sum(share * tissues[name][near] for name in changing)
        for name in changing:
            tissues[name][near] *= 1 - share
        tissues["lesion" if tissue == "oedema" else tissue][near] += changed
    # A part of the texture is the subject's own, or a network learns that of the template by heart.
    noise = rng.standard_normal(template.brain.shape, np.float32)
    grain = scipy.ndimage.gaussian_filter(noise, rng.uniform(0.5, 1.5, 3))
    grain *= rng.uniform(0.005, 0.03) / grain.std()
    return tissues, (rng.uniform(0.3, 1.2) * texture + interpolate(grain, index, 2)) * head.inside


def _make_surroundings(head: Head) -> dict[str, np.ndarray]:
    """Make skull, scalp and face, which are outside the dura."""
    rng, random_field, (x, y, z) = head.rng, head.random_field, head.xyz
    # At the temple, bone is thin and under a muscle: 8.8 mm (Koruyucu, Asantogrol: Determination of masseter and
    # temporal muscle thickness by ultrasound).
    temple = np.clip((np.abs(x) - 35) / 30, 0, 1) * np.exp(-(((y - 5) / 35) ** 2) - ((z + 5) / 28) ** 2)
    # Frontal bone has 8.0 +- 2.0 mm, occipital 8.0 +- 2.5, parietal 7.0 +- 1.4, temporal 4.7 +- 1.3 on CT
    # (Morphometric measurement of cranial vault thickness: a tertiary hospital based study).
    thickness = np.clip(rng.normal(7.5, 1.3), 4.5, 11) * np.exp(random_field((35, 0.15))) * (1 - 0.4 * temple)
    # The frontal sinus is 8 to 9 mm deep, 25 mm high and 52 mm wide on average, and some have none (CT measurement of
    # the frontal sinus: gender differences and implications for frontal cranioplasty).
    sinus_size = rng.uniform(0.4, 1.3) * (rng.uniform() > 0.1)
    across, up = (x - rng.normal(0, 4)) / 26, (z + 22) / 14
    sinus_depth = 8 * (y > 40) * np.maximum(sinus_size - (across**2 + up**2) / (sinus_size + 1e-6), 0)
    thickness += sinus_depth
    fat_thickness = np.clip(np.exp(rng.normal(1.25, 0.45) + random_field((36, 0.3))), 0.7, 12)
    derma, muscle = rng.uniform(1.4, 2.4), 0.8 + rng.uniform(5, 11) * temple  # mm
    depth = head.dura + thickness + derma + fat_thickness + muscle - _SCALP
    skin = head.skin + np.clip(depth, -8, _FARTHEST_SKIN - 1)
    # The skull: two tables of bone with diploe (marrow) or air between them, and air cells towards the base.
    outside = np.clip(_soft_step(skin) - head.inside, 0, 1)
    height = head.vault - head.dura - thickness
    bone = np.minimum(_soft_step(-height) * (1 - head.inside), outside)
    table = rng.uniform(1.2, 2.2)  # mm
    between = _soft_step(head.brain - head.dura - table) * _soft_step(-height - table)
    diploe = between * np.clip(rng.uniform(0.4, 0.9) + 0.25 * head.marbling, 0, 1)
    marrow = bone * diploe * (1 - _soft_step(-head.vault - 2) * _soft_step(4 * (head.marbling - 0.3)))
    # The scalp: skin, a layer of fat, and muscle marbled with fat.
    scalp = outside - bone
    layer = np.maximum(_soft_step(derma + fat_thickness - skin), 0.2 * _soft_step(2 * head.marbling))
    scalp_fat = scalp * (1 - _soft_step(derma - skin)) * layer
    # The face: eyes in orbits full of fat, and the nasal cavity.
    symmetric = (np.abs(x), y, z)
    orbit = _soft_step(-_ellipsoid(symmetric, (31, 48, -37), (20, 27, 18)))
    eye = orbit * _soft_step(-_ellipsoid(symmetric, (32, 60, -37), (12.5, 12.5, 12.5)))
    nose = _soft_step(-_ellipsoid(head.xyz, (0, 55, -52), (13, 32, 30))) * _soft_step(3 * head.marbling + 1.5)
    rest = (1 - orbit) * (1 - nose) * (1 - between * _soft_step(sinus_depth - 2))
    return {
        "fluid": outside * eye,
        "fat": (0.75 * marrow + scalp_fat) * rest + outside * (orbit - eye),
        "muscle": (scalp - scalp_fat) * rest,
        "bone": bone * (1 - diploe) * rest,
    }


def slice_heights(count: int) -> np.ndarray:
    """Heights of evenly spaced slices in mm about the middle of the covered range, float64 (count,)."""
    return (np.arange(count) - (count - 1) / 2) * np.ptp(COVERAGE) / max(count - 1, 1)


def _draw_coordinates(rng: np.random.Generator, template: Template, size: int, slices: int) -> np.ndarray:
    """MNI coordinates in mm, float32 (3, slices * 2 * size * size), of a subject's voxels: two sections a slice."""
    angles, shear = rng.normal(0, (0.06, 0.05, 0.06)), rng.normal(0, 0.02, 3)
    # The template's 2.0 l inside the dura are more than the 1.3 (women) and 1.5 +- 0.1 l (men) of persons (Matsumae et
    # al., J Neurosurg 1996).
    aspect = rng.normal(0, 0.03)  # brachycephalic to dolichocephalic
    scale = rng.normal(0.92, 0.03) * np.exp([aspect, 0.04 - aspect, rng.normal(0, 0.03)])
    centre = rng.normal([0.0, -17.0, float(np.mean(COVERAGE))], 4)[:, None]
    step = (np.arange(size) - size // 2) * (FIELD_OF_VIEW / size)
    sections = slice_heights(slices)[:, None, None, None] + THICKNESS * np.array([-0.25, 0.25])[:, None, None]
    grid = np.stack(np.broadcast_arrays(-step, -step[:, None], sections)).reshape(3, -1)
    rotation = scipy.spatial.transform.Rotation.from_euler("xyz", angles).as_matrix()
    matrix = np.diag(1 / scale) @ rotation + np.diag(shear[:2], 1) + np.diag(shear[2:], 2)
    xyz = (matrix @ grid + centre).astype(np.float32)
    index = xyz - template.origin
    for axis in xyz:
        axis += interpolate(draw_random_field(rng, template.grey.shape, (80, 3.5), (30, 0.5)), index, 4)
    return xyz


def _draw_lesions(rng: np.random.Generator, template: Template, age: float) -> list[tuple[np.ndarray, float, str]]:
    """Draw lesions in the white matter, mostly near the ventricles: centre (voxel), radius in mm and tissue.

    A quarter of the subjects has a large one with oedema and a core of fluid, a fifth has a bleed.
    """
    # At 60 to 64 years, 20 +- 7 small ones of 4.9 ml in all (Wen, Sachdev, NeuroImage 2004,
    # doi:10.1016/j.neuroimage.2003.12.027).
    voxels = rng.integers(0, template.white.shape, (20000, 3))
    voxels = voxels[(template.white[tuple(voxels.T)] > 0.97) & (voxels[:, 2] > 60)]
    nearness = np.exp(-template.ventricle[tuple(voxels.T // 2)] / 8) + 0.05
    count = rng.poisson(20 * age)
    centres = rng.choice(voxels, count + 2, p=nearness / nearness.sum())
    radii = np.minimum(np.exp(rng.normal(0.7, 0.45, count)), 7)
    lesions = [(centre, float(radius), "lesion") for centre, radius in zip(centres[2:], radii, strict=True)]
    radius, core, bleed = rng.uniform(6, 16), rng.uniform(0.3, 0.85), rng.uniform(3, 12)
    if rng.uniform() < 0.25:
        layers = ((1.7 * radius, "oedema"), (radius, "lesion"), (core * radius, "fluid"))
        lesions += [(centres[0], *layer) for layer in layers]
    if rng.uniform() < 0.2:
        lesions += [(centres[1], bleed + 5, "oedema"), (centres[1], bleed, "blood")]
    return lesions


def _soft_step(distance: np.ndarray) -> np.ndarray:
    """Linear ramp from 0 to 1 over 1.5 mm about distance 0."""
    return np.clip(distance / 1.5 + 0.5, 0, 1)


def _ellipsoid(xyz: Iterable[np.ndarray], centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Signed distance from an ellipsoid in mm, negative inside; exact for a sphere, approximate otherwise."""
    norm = np.sqrt(sum(((x - c) / r) ** 2 for x, c, r in zip(xyz, centre, radii, strict=True)))
    return (norm - 1) * min(radii)
