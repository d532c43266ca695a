"""Masks: fastMRI's, column by column and image by image; every other kind by what makes it that kind."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, read_example, rss, to_kspace

from mrjax.config import defaults
from mrjax.data import splits
from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.io import hdf5
from mrjax.io.volume import Volume
from mrjax.mri import fourier, masks, tasks
from mrjax.mri.acquire import Acquisition, draw_protocol, find_echo
from mrjax.mri.augment import Augment
from mrjax.mri.coils import magnitude

M4RAW = (np.arange(256) >= 30) & (np.arange(256) <= 225)
FASTMRIS = {
    "equispaced": "EquiSpacedMaskFunc",
    "equispaced_fraction": "EquispacedMaskFractionFunc",
    "magic": "MagicMaskFunc",
}
SAMPLES = ("gaussian2d", "poisson", "poisson_uniform", "radial", "spiral")
STANDARD = ((4, 0.08), (8, 0.04), (2, 30 / 256), (3, 30 / 256), (6, 0.06))


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def draw_many(kind: str, count: int, sampled, height: int, acceleration, centre, echo=None):
    """(count, 1 or height, width) bool, of different keys."""
    scan = masks.Scan(sampled, height, acceleration, centre, echo or (height // 2, len(sampled) // 2))
    return jax.vmap(lambda key: masks.MASKS[kind](key, scan))(jax.random.split(jax.random.key(0), count))


@pytest.mark.peer
@pytest.mark.parametrize("kind", FASTMRIS)
@pytest.mark.parametrize("width", [65, 256, 322, 368])
def test_drawn_masks_are_those_that_fastmri_draws(kind, width) -> None:
    from fastmri.data import subsample

    # At 322 columns the lines of acceleration 3 lie half-way between two, which NumPy rounds up or down.
    for acceleration, centre in STANDARD[:2] if width == 322 else STANDARD:
        func = getattr(subsample, FASTMRIS[kind])([centre], [acceleration])
        theirs = {tuple(func((1, width, 2), seed=seed)[0].numpy().ravel() > 0) for seed in range(200)}
        ours = draw_many(kind, 200, jnp.ones(width, bool), 1, acceleration, centre)
        assert {tuple(mask.ravel()) for mask in np.asarray(ours)} == theirs
        assert len(theirs) >= acceleration / 2


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["random", *FASTMRIS])
def test_zero_filled_images_equal_fastmris_given_its_mask(kind) -> None:
    import fastmri
    import torch
    from fastmri.data import subsample, transforms

    kspace = to_kspace(coil_images(1, 4, 60, 74)[0])
    func = subsample.create_mask_for_mask_type(kind, [0.08], [4])
    theirs, mask, _ = transforms.apply_mask(transforms.to_tensor(kspace), func, seed=3)
    image = fastmri.rss(fastmri.complex_abs(fastmri.ifft2c(theirs.to(torch.float64)))).numpy()
    ours = magnitude(jnp.where(jnp.asarray(mask.numpy().ravel() > 0), jnp.asarray(kspace), 0))
    np.testing.assert_allclose(ours, image, atol=1e-6 * image.max())


@pytest.mark.parametrize("kind", [*FASTMRIS, "gaussian1d"])
def test_lines_are_counted_over_the_sampled_columns_alone(kind) -> None:
    drawn = np.asarray(draw_many(kind, 64, jnp.asarray(M4RAW), 256, 4, 0.08))
    assert drawn.shape == (64, 1, 256)
    assert not drawn[:, 0, ~M4RAW].any()
    centre = round(196 * 0.08)
    start = (256 - centre + 1) // 2
    assert drawn[:, 0, start : start + centre].all()
    kept = drawn.sum((1, 2))
    if kind in ("equispaced", "magic"):  # the centre comes on top, but for the lines that cross it
        assert np.all(abs(kept - (centre + (196 - centre) / 4)) <= 2)
    else:
        assert np.all(abs(kept - 196 / 4) <= 1)
    assert len({tuple(mask.ravel()) for mask in drawn}) >= (64 if kind == "gaussian1d" else 2)


def test_acceleration_one_keeps_everything_and_a_sufficient_centre_stays_alone() -> None:
    for kind in ("equispaced", "gaussian1d", "poisson", "spiral"):
        assert np.asarray(draw_many(kind, 1, jnp.ones(32, bool), 16, 1, 0.1)).all()
    drawn = np.asarray(draw_many("equispaced_fraction", 1, jnp.ones(60, bool), 1, 8, 0.125))
    assert drawn.sum() == round(60 * 0.125)


@pytest.mark.parametrize("kind", SAMPLES)
def test_sample_masks_reach_the_acceleration_and_hold_a_rectangular_centre(kind) -> None:
    acceleration, centre = 7.5, 0.05
    sampled = np.arange(80) >= 8
    drawn = np.asarray(draw_many(kind, 3, jnp.asarray(sampled), 64, acceleration, centre))
    assert drawn.shape == (3, 64, 80)
    assert not drawn[:, :, ~sampled].any()
    assert np.allclose(drawn.sum((1, 2)), 64 * 72 / acceleration, rtol=0.02)
    rows, columns = round(64 * centre**0.5), round(72 * centre**0.5)
    top, left = (64 - rows + 1) // 2, (80 - columns + 1) // 2
    assert drawn[:, top : top + rows, left : left + columns].all()
    assert len({mask.tobytes() for mask in drawn}) == 3


@pytest.mark.slow
def test_gaussian_masks_follow_their_density() -> None:
    lines = np.asarray(draw_many("gaussian1d", 4000, jnp.ones(64, bool), 1, 8, 0.0))[:, 0].mean(0)
    rng = np.random.default_rng(0)
    density = np.exp(-4 * np.log(2) * ((np.arange(64) - 32) / 64 / 0.7) ** 2)
    theirs = np.zeros(64)
    for _ in range(4000):
        theirs[rng.choice(64, 8, replace=False, p=density / density.sum())] += 1 / 4000
    np.testing.assert_allclose(lines, theirs, atol=0.03)
    samples = np.asarray(draw_many("gaussian2d", 500, jnp.ones(32, bool), 32, 8, 0.0)).mean(0)
    assert samples[16, 16] > 2 * samples[0, 16] > 3 * samples[0, 0] > 0


@pytest.mark.parametrize(("kind", "acceleration"), [("poisson", 6), ("poisson", 12), ("poisson_uniform", 8)])
def test_poisson_discs_keep_their_distance(kind, acceleration) -> None:
    size = 64
    mask = np.asarray(draw_many(kind, 1, jnp.ones(size, bool), size, acceleration, 0.0))[0]
    growth = 0 if kind == "poisson_uniform" else 4
    spacing = 1 + growth * np.hypot(*(np.mgrid[:size, :size] - size // 2)) / size

    def closest(points: np.ndarray) -> float:
        """The least distance of two points in units of the mean of their spacings."""
        y, x = np.nonzero(points)
        mean = (spacing[y, x][:, None] + spacing[y, x]) / 2
        return (np.hypot(y[:, None] - y, x[:, None] - x) / mean)[~np.eye(len(y), dtype=bool)].min()

    # Random sequential packing ends at 0.547 of the area (Feder, 1980): distance**2 = 0.547 * 4 / pi * room / points.
    packed = np.sqrt(0.547 * 4 / np.pi * (1 / spacing**2).sum() / mask.sum())
    assert closest(mask) > 0.8 * packed
    shuffled = np.random.default_rng(0).permutation(mask.ravel()).reshape(size, size)
    assert closest(shuffled) < 0.5 * packed
    if kind == "poisson":
        assert mask[24:40, 24:40].mean() > 2 * mask[:8].mean() > 0


def test_radial_masks_are_straight_spokes_through_the_centre_equally_spaced() -> None:
    size, middle = 129, 64
    mask = np.asarray(draw_many("radial", 2, jnp.ones(size, bool), size, 8, 0.0))[1]
    assert (mask != mask[::-1, ::-1]).mean() < 0.005
    angles = np.deg2rad(np.arange(0, 180, 0.05))
    radii = np.arange(30, 60, 0.5)
    rows = np.rint(middle + radii[:, None] * np.sin(angles)).astype(int)
    columns = np.rint(middle + radii[:, None] * np.cos(angles)).astype(int)
    along = mask[rows, columns].mean(0) > 0.8  # rays that stay on kept samples all the way
    spokes = (along & ~np.roll(along, 1)).sum()
    assert 8 <= spokes <= 16  # 129 / 8 spokes of one sample's width where they do not meet
    outer = np.hypot(*(np.mgrid[:size, :size] - middle)) > 30
    hits = np.flatnonzero(along)
    centres = np.array([group.mean() for group in np.split(hits, np.flatnonzero(np.diff(hits) > 5) + 1)])
    assert np.ptp(np.diff(centres)) < 0.25 * np.diff(centres).mean()
    assert mask[outer].mean() < 1 / 8 < mask[~outer].mean()


def test_a_spiral_s_turns_are_equally_far_apart_along_every_ray() -> None:
    size, middle = 257, 128
    mask = np.asarray(draw_many("spiral", 1, jnp.ones(size, bool), size, 8, 0.0))[0]
    assert not np.array_equal(mask, mask[::-1, ::-1])
    first = []
    for ray in (mask[middle, middle:], mask[middle:, middle], mask[middle, middle::-1], mask[middle::-1, middle]):
        starts = np.flatnonzero(ray[1:] & ~ray[:-1]) + 1
        assert abs(np.diff(starts) - 8).max() <= 1
        assert len(starts) >= 14
        first.append(starts[4])
    steps = np.diff(first)
    assert np.all((abs(steps - 2) <= 1) | (abs(steps + 6) <= 1))  # a quarter of a turn outwards, a quarter turn on


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, -1), (3, 0), (0, -2), (-4, 5), (8, -3)])
def test_an_echo_off_the_centre_is_found(row, column) -> None:
    size = (96, 120)
    rng = np.random.default_rng(0)
    kspace = np.roll(to_kspace(coil_images(1, 3, *size)[0]), (row, column), (1, 2))
    kspace = (kspace + 0.05 * (rng.normal(size=kspace.shape) + 1j * rng.normal(size=kspace.shape))).astype(np.complex64)
    echo = tuple(int(n) for n in jax.jit(find_echo)(jnp.asarray(kspace)))
    expected = (48, 60) if max(abs(row), abs(column)) < 2 else (48 + row, 60 + column)
    assert echo == expected


def test_the_centre_lies_about_the_echo() -> None:
    kspace = np.roll(to_kspace(coil_images(1, 3, 64, 64)[0]), (-5, 7), (1, 2))
    how = Acquisition((8.0,), (0.0625,), (0.0, 0.0))
    protocol = jax.jit(draw_protocol, static_argnums=4)(
        jax.random.key(0), kspace, jnp.ones(64, bool), jnp.ones((64, 64)), how
    )
    assert np.asarray(protocol.mask)[0, 30 + 7 : 34 + 7].all()
    echo = (jnp.asarray(32 - 5), jnp.asarray(32 + 7))
    for kind in ("gaussian1d", "gaussian2d"):
        drawn = np.asarray(draw_many(kind, 1, jnp.ones(64, bool), 64, 8.0, 0.0625, echo))[0]
        rows = slice(24 - 5, 40 - 5) if len(drawn) > 1 else slice(1)
        half = 8 if len(drawn) > 1 else 2
        assert drawn[rows, 39 - half : 39 + half].all()


def test_slices_of_noise_have_no_echo_off_the_centre() -> None:
    rng = np.random.default_rng(0)
    for size in ((64, 64), (37, 50), (5, 9)):
        noise = rng.normal(size=(2, 4, *size)).astype(np.float32)
        assert tuple(map(int, jax.jit(find_echo)(noise[0] + 1j * noise[1]))) == (size[0] // 2, size[1] // 2)


def test_a_stored_mask_is_read_and_applied_to_fully_sampled_kspace(tmp_path: Path) -> None:
    kspace = to_kspace(coil_images(2, 2, 16, 16))
    mask = np.arange(16) % 3 == 0
    hdf5.write(tmp_path / "a.t5", {"kspace": kspace, "mask": mask.astype(np.float32)})

    def read() -> list[Volume]:
        config = defaults()
        config.acquisition.mask = "stored"
        return splits.describe_split(config, [str(tmp_path / "a.t5")])

    found = read()
    example = read_example(SliceDataset(found, (16, 16), "kspace"), 1)
    assert np.array_equal(example["kspace"], kspace[1])
    assert np.array_equal(example["mask"], mask[None])
    task = tasks.kspace(Acquisition((4.0,), (0.08,), (0.0, 0.0), mask="stored"), Augment())
    keys = tasks.evaluation_keys(example["name"][None], example["slice"][None])
    measured = jax.jit(task)({name: jnp.asarray(example[name])[None] for name in ("kspace", "mask")}, keys)
    assert np.array_equal(measured.mask[0, 0], mask)
    assert np.array_equal(measured.kspace[0], kspace[1] * mask)
    assert np.allclose(measured.target[0], rss(np.asarray(fourier.ifft2c(kspace[1]))), atol=1e-5)
    with pytest.raises(UserError, match=r"`mask` has shape \(1, 16\), expected"):
        SliceDataset(found, (16, 20), "image")
    hdf5.write(tmp_path / "a.t5", {"kspace": kspace * mask, "mask": mask})
    with pytest.raises(UserError, match="undersampled already"):
        read()
    hdf5.write(tmp_path / "a.t5", {"kspace": kspace})
    with pytest.raises(UserError, match="has no data set `mask`"):
        read()
