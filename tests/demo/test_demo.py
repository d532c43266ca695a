"""The demo data: reproducible, different for each subject, physically consistent, and in M4Raw's layout."""

import sys

import h5py
import numpy as np
import pytest
import scipy

from mrjax import demo
from mrjax.demo import acquisition, anatomy
from mrjax.demo.anatomy import TISSUES, Subject
from mrjax.errors import UserError
from mrjax.io import hdf5

pytestmark = pytest.mark.slow  # NumPy alone, which is the same whatever the version of JAX

SMALL = {"size": 48, "slices": 3, "coils": 2, "repetitions": 2, "train": 2, "val": 1, "test": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "first"
    demo.make(folder, demo.Settings(**SMALL))
    return folder


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def load(path):
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file} | dict(file.attrs)


def test_files_are_in_m4raws_layout(made):
    names = files(made)
    assert len(names) == 4 * 3 * 2
    assert "train/2026010001_FLAIR02.t5" in names
    scan = load(made / "train/2026010001_FLAIR02.t5")
    assert scan["kspace"].shape == (3, 2, 48, 48)
    assert scan["kspace"].dtype == np.complex64
    assert scan["reconstruction_rss"].dtype == np.float32
    assert (scan["acquisition"], scan["patient_id"]) == ("FLAIR", "2026010001")
    assert scan["max"] == pytest.approx(scan["reconstruction_rss"].max())
    assert scan["norm"] == pytest.approx(np.linalg.norm(scan["reconstruction_rss"]), rel=1e-5)
    assert b"ismrmrdHeader" in scan["ismrmrd_header"]
    assert len(list((made / "train").glob("*.t5"))) == 12


def test_rss_is_that_of_the_kspace(made):
    for name in files(made)[::5]:
        scan = load(made / name)
        axes = (-2, -1)
        coils = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(scan["kspace"], axes=axes), norm="ortho"), axes=axes)
        np.testing.assert_allclose(scan["reconstruction_rss"], np.linalg.norm(coils, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_same_seed_same_bytes(made, tmp_path):
    fewer = SMALL | {"train": 1, "test": 0}
    demo.make(tmp_path / "again", demo.Settings(**fewer))
    demo.make(tmp_path / "other", demo.Settings(**fewer, seed=1))
    assert len(files(tmp_path / "again")) == 12
    for name in files(tmp_path / "again"):
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (made / name).read_bytes()


def test_subjects_differ_and_stay_in_one_split(made):
    studies = {split: {n.split("_")[0] for n in files(made / split)} for split in demo.SPLITS}
    assert [len(studies[split]) for split in demo.SPLITS] == [2, 1, 1]
    assert len(set.union(*studies.values())) == 4
    template = anatomy.load_template()
    heads = [
        anatomy.make_anatomy(template, Subject(0, split, number), size=64, slices=3)
        for split, number in ((0, 0), (0, 1), (1, 0), (2, 0))
    ]
    for i, one in enumerate(heads):
        for other in heads[:i]:
            a, b = one.fractions[:3].ravel(), other.fractions[:3].ravel()
            assert 0.25 < np.corrcoef(a, b)[0, 1] < 0.9  # alike, as brains are, and not the same


def test_repetitions_differ_by_noise_alone(made):
    for contrast in acquisition.PROTOCOLS:
        first, second = (load(made / f"val/2026020001_{contrast}{n:02d}.t5")["kspace"] for n in (1, 2))
        noise = (first - second) / np.sqrt(2)
        assert 0.4 / 35 < noise.real.std() < 0.4 / 23
        assert noise.imag.std() == pytest.approx(noise.real.std(), rel=0.05)
        # White: as strong where the anatomy is (the centre of k-space) as at its edge, and the coils independent.
        assert noise[..., 20:28, 20:28].std() == pytest.approx(noise.std(), rel=0.2)
        assert abs(np.corrcoef(abs(noise[:, 0].ravel()), abs(noise[:, 1].ravel()))[0, 1]) < 0.1


def test_signal_is_the_steady_state_of_its_sequence():
    """Against the recovery of the magnetisation followed pulse by pulse, and the order of tissues it is there for."""
    for contrast, (tr, te, inversion, _) in acquisition.PROTOCOLS.items():
        sequence = {"tr": tr, "te": te, "inversion": inversion}
        nominal = {name: acquisition.spin_echo_signal(*tissue, **sequence) for name, tissue in TISSUES.items()}
        if inversion:
            assert abs(nominal["fluid"]) < 1e-6
            assert acquisition.spin_echo_signal(*TISSUES["lesion"], **sequence) > 1.4 * nominal["grey"]
        else:
            for name, (density, t1, t2) in TISSUES.items():
                m = 1.0
                for _ in range(50):
                    echo = density * m * np.exp(-te / t2)
                    m = 1 - np.exp(-tr / t1)  # from zero, after the excitation
                assert nominal[name] == pytest.approx(echo)
        ratio = nominal["white"] / nominal["grey"]
        assert 1.15 < ratio < 1.4 if contrast == "T1" else 0.7 < ratio < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_contrasts_order_the_tissues_as_in_scans(number):
    subject = Subject(0, 0, number)
    head = anatomy.make_anatomy(anatomy.load_template(), subject, size=96, slices=9)
    pure = {name: head.fractions[i] > 0.9 for i, name in enumerate(TISSUES)}
    levels = {}
    for contrast in acquisition.PROTOCOLS:
        picture = np.abs(acquisition.make_image(head, subject, contrast))
        levels[contrast] = {t: picture[pure[t]].mean() for t in ("white", "grey", "fluid")}
    white, grey, fluid = levels["T1"].values()
    assert white > 1.05 * grey > 1.05 * 2 * fluid
    white, grey, fluid = levels["T2"].values()
    assert fluid > 2 * grey > 2 * 1.1 * white
    white, grey, fluid = levels["FLAIR"].values()
    assert grey > 1.04 * white > 1.04 * 4 * fluid


def test_anatomy_is_a_head_upright():
    made = anatomy.make_anatomy(anatomy.load_template(), Subject(0, 0, 1), size=64, slices=7)
    assert made.fractions.min() >= 0
    assert made.fractions.sum(0).max() <= 1 + 1e-5
    head = made.fractions.sum(0)[3] > 0.5
    tall, wide = (np.ptp(np.flatnonzero(head.any(axis))) / 64 for axis in (1, 0))
    assert 0.65 < tall < 0.9
    assert 0.5 < wide < tall  # a head is longer from nose to nape than across
    assert not head[[0, -1]].any()
    # The front is up: in the lowest slice the orbits' fat lies above, the cerebellum below.
    lowest = dict(zip(TISSUES, made.fractions[:, 0], strict=True))
    assert lowest["fat"][:32].sum() > 2 * lowest["fat"][32:].sum()
    assert lowest["grey"][32:].sum() > lowest["grey"][:32].sum()
    # The patient's right (MNI x > 0) is on the left, front (y > 0) above, and slices go upwards.
    xyz = anatomy._draw_coordinates(np.random.default_rng(0), anatomy.load_template(), 32, 3)
    x, y, z = xyz.reshape(3, 3, 2, 32, 32)
    assert x[..., 0].min() > 0 > x[..., -1].max()
    assert y[:, :, 0].min() > 0 > y[:, :, -1].max()
    assert z[0].max() < z[1].mean() < z[2].min()


@pytest.fixture(scope="module")
def heads():
    """Eight subjects, each as fractions by tissue (slices, 128, 128), and the texture."""
    template = anatomy.load_template()
    made = [anatomy.make_anatomy(template, Subject(0, 0, number), size=128, slices=5) for number in range(8)]
    return [dict(zip(TISSUES, head.fractions, strict=True)) | {"texture": head.texture} for head in made]


def outline(head):
    return sum(head[name] for name in TISSUES)[2] > 0.5


def brain(head):
    return sum(head[name] for name in ("white", "grey", "lesion", "blood"))


def cephalic_index(head):
    length, breadth = (np.ptp(np.flatnonzero(outline(head).any(axis))) for axis in (1, 0))
    return breadth / length


def skull_thickness(head):
    """Return mm from the first to the last bone in the left half of the middle slice, mean of its middle rows."""
    return np.mean([np.ptp(np.flatnonzero(row[:64] > 0.3)) for row in head["bone"][2, 44:84]]) * 250 / 128


def scalp_fat(head):
    return head["fat"][2].sum() / np.sqrt(outline(head).sum())


def ventricles(head):
    """Fluid near the brain's middle, over the brain."""
    tissue = brain(head)[1:4]
    row, column = (int(np.average(np.arange(128), weights=tissue.sum((0, axis)))) for axis in (2, 1))
    return head["fluid"][1:4, row - 16 : row + 17, column - 12 : column + 13].sum() / tissue.sum()


def atrophy(head):
    return head["fluid"].sum() / brain(head).sum()


def texture(head):
    return head["texture"][brain(head) > 0.95].std()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantity", "least"),
    [
        (cephalic_index, 0.04),
        (skull_thickness, 0.12),
        (scalp_fat, 0.2),
        (ventricles, 0.32),
        (atrophy, 0.25),
        (texture, 0.1),
    ],
)
def test_subjects_vary(heads, quantity, least):
    values = [quantity(head) for head in heads]
    assert np.std(values) > least * np.mean(values)


def test_left_and_right_differ(heads):
    def asymmetry(image):
        middle = np.average(np.arange(128), weights=image.sum(0))
        mirrored = scipy.ndimage.shift(image[:, ::-1], (0, 2 * middle - 127), order=1)
        return np.abs(image - mirrored).sum() / image.sum()

    for head in heads:
        turned = (scipy.ndimage.rotate(brain(head)[2], a, reshape=False, order=1) for a in range(-10, 11, 2))
        assert min(asymmetry(image) for image in turned) > 0.08


def test_a_share_of_the_subjects_has_a_large_lesion_or_a_bleed():
    template = anatomy.load_template()
    drawn = [anatomy._draw_lesions(np.random.default_rng(n), template, age=n / 60) for n in range(60)]
    for tissue in ("oedema", "blood", "fluid"):
        assert 6 < sum(any(kind == tissue for *_, kind in lesions) for lesions in drawn) < 30
    counts = [len(lesions) for lesions in drawn]
    assert np.mean(counts[:10]) < 4 < 12 < np.mean(counts[50:])


def test_fractions_are_those_of_a_whole(heads):
    for head in heads:
        fractions = np.stack([head[name] for name in TISSUES])
        assert fractions.min() >= 0
        assert fractions.sum(0).max() <= 1 + 1e-5
        assert (fractions.sum(0)[2, [0, -1]] == 0).all()  # air at the edge


def test_same_subject_at_any_size():
    template = anatomy.load_template()
    small, large = (
        anatomy.make_anatomy(template, Subject(0, 0, 0), size=size, slices=2).fractions for size in (33, 99)
    )
    assert np.corrcoef(small.ravel(), large[..., 1::3, 1::3].ravel())[0, 1] > 0.99


def test_sensitivities_are_smooth_and_cover_the_head():
    maps = acquisition.make_sensitivities(Subject(0, 0, 0), size=64, coils=4, slices=3)
    total = np.linalg.norm(maps, axis=1)[:, 8:56, 16:48]
    assert total.mean() == pytest.approx(1, abs=0.15)
    assert total.min() > 0.5
    assert np.abs(np.diff(maps, axis=-1)).max() < 0.3
    strongest = [np.unravel_index(np.abs(m[8:56, 8:56]).argmax(), (48, 48)) for m in maps[1]]
    assert len({(row > 24, column > 24) for row, column in strongest}) == 4  # a coil to a corner
    assert np.all(acquisition.make_sensitivities(Subject(0, 0, 0), size=64, coils=1, slices=1) == 1)


def test_existing_output_is_refused(made, tmp_path):
    before = files(made)
    with pytest.raises(UserError, match="exists already"):
        demo.make(made)
    assert files(made) == before
    (tmp_path / "empty").mkdir()
    settings = demo.Settings(**(SMALL | {"repetitions": 1, "train": 0, "test": 0}))
    demo.make(tmp_path / "empty", settings)
    assert len(files(tmp_path / "empty")) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.make(tmp_path / "out", demo.Settings(**SMALL))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 31},
        {"coils": 0},
        {"slices": 0},
        {"seed": -1},
        {"repetitions": 100},
        {"train": 10000},
        {"train": 0, "val": 0, "test": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        demo.Settings(**(SMALL | wrong))


def test_without_nilearn(tmp_path, monkeypatch):
    anatomy.load_template.cache_clear()
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(UserError, match=r"the demo data need nilearn: pip install -e '\.\[demo\]'"):
        demo.make(tmp_path / "out", demo.Settings(**SMALL))
    assert not list(tmp_path.iterdir())
