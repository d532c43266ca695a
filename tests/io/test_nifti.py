"""NIfTI of any orientation, type and size is read upright and written back where it was; nibabel is the reference."""

import gzip
import itertools
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from conftest import coil_images, read_array, rss, write_scan, write_volume

from mrjax import check, reconstruct, train
from mrjax.data import checks, loader
from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.inference import Inference
from mrjax.io import nifti, readers
from mrjax.io.nifti import NiftiReader
from mrjax.measures import evaluator

RNG = np.random.default_rng(0)
AXIAL = np.diag([-0.9, 0.8, 5, 1])  # stored towards left, front and up, with thick slices
FREE_TEXT = {"descrip": b"J Doe 1950", "aux_file": b"doe.txt", "intent_name": b"doe", "db_name": b"doe"}


def save(path: Path, data: np.ndarray, affine: np.ndarray = AXIAL, kind: Any = nibabel.Nifti1Image, **fields) -> str:
    image = kind(data, affine, dtype=data.dtype)
    for name, value in fields.items():
        image.header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return str(path)


def read(path: str, name: str = "reconstruction") -> np.ndarray:
    return readers.read_slices(path, name, readers.describe(path).slices)


def permuted(codes: str, zooms: tuple[float, float, float]) -> np.ndarray:
    """An oblique affine of axes stored towards these directions, of these spacings along right, front and up."""
    turn = nibabel.eulerangles.euler2mat(0.2, -0.1, 0.15)
    affine = np.eye(4)
    for axis, code in enumerate(codes):
        world = next(i for i, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[:3, axis] = turn[:, world] * zooms[world] * (1 if code in "RAS" else -1)
    affine[:3, 3] = 11, -7, 5
    return affine


@pytest.mark.parametrize(("zooms", "shown"), [((1, 1.2, 4), "LPS"), ((1, 4, 1.2), "LIA"), ((4, 1, 1.2), "PIR")])
def test_thick_slices_are_shown_upright_whatever_the_order_of_the_axes(tmp_path: Path, zooms, shown: str) -> None:
    """All 48 orders and directions: columns, rows and slices go to the patient's sides that `shown` says."""
    ends = (("R", "L"), ("A", "P"), ("S", "I"))
    for codes in (codes for order in itertools.permutations(ends) for codes in itertools.product(*order)):
        affine, data = permuted("".join(codes), zooms), RNG.normal(size=(4, 5, 6))
        path = save(tmp_path / "a.nii", data, affine)
        volume = readers.describe(path)
        assert volume.affine is not None
        assert "".join(nibabel.aff2axcodes(volume.affine)) == shown
        images = read(path)
        assert images.shape == volume.shape
        places = np.indices(images.shape).reshape(3, -1)
        world = volume.affine @ np.stack([*places[::-1], np.ones(places.shape[1])])
        index = np.linalg.solve(affine, world)[:3]  # of the voxel at the same position
        assert np.allclose(index, index.round(), atol=1e-4)
        assert np.array_equal(images[tuple(places)], data[tuple(index.round().astype(int))])


def test_without_thick_slices_they_lie_along_the_third_axis_and_single_ones_always(tmp_path: Path) -> None:
    data = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    canonical = np.eye(4)
    assert np.array_equal(read(save(tmp_path / "a.nii", data, canonical)), data[::-1, ::-1].T)
    sagittal = nibabel.as_closest_canonical(nibabel.Nifti1Image(data, permuted("PSR", (1, 1, 1)))).get_fdata()
    found = read(save(tmp_path / "b.nii", data, permuted("PSR", (1, 1, 1))))
    assert np.array_equal(found, sagittal[:, ::-1, ::-1].transpose(0, 2, 1))  # superior first, anterior on the left
    assert read(save(tmp_path / "c.nii", data[:, :1], canonical)).shape == (1, 6, 4)
    assert read(save(tmp_path / "d.nii", data[:, :, 0], canonical)).shape == (1, 5, 4)


STORED = {
    "integers": (RNG.integers(-999, 999, (6, 5, 3)).astype(">i2"), {}),
    "scaled": (RNG.integers(0, 255, (6, 5, 3)).astype(np.uint8), {"scl_slope": 0.5, "scl_inter": -3}),
    "volumes": (RNG.normal(size=(6, 5, 3, 2, 2)), {}),
    "complex": (RNG.normal(size=(6, 5, 3)) + 1j * RNG.normal(size=(6, 5, 3)), {}),
    "micrometres": (RNG.normal(size=(6, 5, 3)).astype(np.float32), {"xyzt_units": 3}),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".hdr"])
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_written_equals_what_was_read(tmp_path: Path, suffix: str, kind: str, version: int) -> None:
    data, fields = STORED[kind]
    name = f"Nifti{version}{'Pair' if suffix == '.hdr' else 'Image'}"
    header = getattr(nibabel, name).header_class(endianness=">" if data.dtype.byteorder == ">" else "<")
    header.set_data_dtype(data.dtype)
    image = getattr(nibabel, name)(data, permuted("PSR", (4, 1, 1)), header)
    for field, value in fields.items():
        image.header[field] = value
    path = tmp_path / f"a{suffix}"
    nibabel.save(image, path)
    volume, expected = readers.describe(str(path)), nibabel.load(path)
    images = read(str(path))
    assert volume.dtype == images.dtype
    if "scl_slope" in fields:
        expected.header.set_slope_inter(1, 0)
    readers.READERS["nifti"].write(tmp_path / "b.nii.gz", {"reconstruction": np.abs(images)}, {}, volume)
    found, values = nibabel.load(tmp_path / "b.nii.gz"), np.asanyarray(expected.dataobj)
    assert np.allclose(found.dataobj, np.abs(values), rtol=1e-6)
    assert np.array_equal(found.affine, expected.affine)
    changed = {"datatype", "bitpix", "scl_slope", "scl_inter", "magic", "vox_offset"}
    for field in set(expected.header.keys()) - changed:
        assert found.header[field].tobytes() == expected.header[field].tobytes(), field
    assert found.header.get_slope_inter() in ((1, 0), (None, None))
    assert found.get_data_dtype().newbyteorder("=") == np.float32
    again = readers.describe(str(tmp_path / "b.nii.gz"))
    assert again.affine is not None
    assert np.array_equal(again.affine, volume.affine)
    assert np.allclose(read(again.path), np.abs(images), rtol=1e-6)


def test_files_count_by_their_magic_bytes_and_results_by_their_name(tmp_path: Path) -> None:
    data = RNG.normal(size=(6, 5, 3)).astype(np.float32)
    for name in ("sub-1_T1w.nii", "b.nii.gz", "c.hdr"):
        save(tmp_path / "in" / name, data, kind=nibabel.Nifti1Pair if name == "c.hdr" else nibabel.Nifti1Image)
    names = [readers.describe(path).name for path in readers.find(str(tmp_path / "in"))]
    assert names == ["b", "c", "sub-1_T1w"]
    assert readers.describe(str(tmp_path / "in" / "sub-1_T1w.nii")).contrast == "T1"
    for name in ("sub-1_T1w.nii", "b.nii.gz"):
        shutil.copy(tmp_path / "in" / name, tmp_path / "IM1")
        assert np.array_equal(read(str(tmp_path / "IM1")), data[:, ::-1].T)


def test_identity_is_left_out_unless_it_is_to_be_kept(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((6, 5, 3), np.float32), AXIAL)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"J Doe"))
    for name, value in FREE_TEXT.items():
        image.header[name] = value
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = readers.describe(str(tmp_path / "a.nii.gz"))
    for keep in (False, True):
        path = tmp_path / f"{keep}.nii.gz"
        readers.READERS["nifti"].write(path, {"reconstruction": np.ones((3, 5, 6))}, {}, volume, keep_identity=keep)
        assert (b"oe" in gzip.decompress(path.read_bytes())) == keep
        found = nibabel.load(path)
        assert {name: found.header[name].item() for name in FREE_TEXT} == {
            name: value if keep else b"" for name, value in FREE_TEXT.items()
        }
        assert [one.get_content() for one in found.header.extensions] == [b"J Doe"] * keep
        assert found.get_fdata().min() == 1


def test_other_formats_are_written_with_their_affine(tmp_path: Path, caplog) -> None:
    images, caplog_level = RNG.normal(size=(3, 5, 6)).astype(np.float32), "INFO"
    affine = permuted("LPS", (1, 1.2, 4))
    for name, attributes in (("known", {"affine": affine}), ("unknown", {})):
        volume = readers.describe(str(write_volume(tmp_path / f"{name}.t5", {"reconstruction": images}, attributes)))
        with caplog.at_level(caplog_level):
            readers.READERS["nifti"].write(tmp_path / f"{name}.nii.gz", {"reconstruction": images}, {}, volume)
    assert "unknown.t5: its position and the size of its pixels are unknown, 1 mm is written" in caplog.text
    assert "known.nii.gz" not in caplog.text.replace("unknown", "")
    for name, expected in (("known", affine), ("unknown", np.diag([-1, -1, 1, 1]))):
        found = nibabel.load(tmp_path / f"{name}.nii.gz")
        assert np.allclose(found.get_sform(), expected, atol=1e-5)
        assert np.allclose(found.get_qform(), expected, atol=1e-4)
        assert np.array_equal(found.get_fdata(), images.T)
        assert np.array_equal(read(str(tmp_path / f"{name}.nii.gz")), images)
    with pytest.raises(UserError, match="cannot be written as NIfTI"):
        readers.READERS["nifti"].write(tmp_path / "c.nii", {"reconstruction": np.ones((40000, 1, 2))}, {}, volume)


def lie(path: Path, *shape: int, size: int = 0) -> str:
    """A packed file whose header claims a shape, over so many bytes of zeros."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.uint8)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4 + size)))
    return str(path)


def test_headers_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    data = np.ones((6, 5, 3), np.float32)
    path = save(tmp_path / "a.nii", data)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-1])
    for broken, sentence in {
        path: "a.nii: claims 712 bytes of samples in a file of 711, expected a whole file",
        lie(tmp_path / "b.nii.gz", 30000, 30000, 2): "b.nii.gz: claims 900,000,000 pixels a slice in",
        lie(tmp_path / "c.nii.gz", 512, 512, 30000): "c.nii.gz: takes 7,864,320,352 bytes to be read from a file of",
        lie(tmp_path / "d.nii.gz", 2, 2, 32000): "d.nii.gz: takes 2,097,152,352 bytes to be read from a file of",
        lie(
            tmp_path / "e.nii.gz", 1, 1, 32000
        ): "e.nii.gz: holds images of 32000 x 1, expected 2 pixels or more a side",
    }.items():
        with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
            readers.describe(broken)
    short = readers.describe(lie(tmp_path / "f.nii.gz", 64, 64, 9, size=64 * 64 * 8))
    assert (
        "f.nii.gz: slice 8 cannot be read (the unpacked file ends before the slice does)" in checks.check(short)[1][0]
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"datatype": 128, "bitpix": 24}, "holds samples of .*, as of colours, expected numbers"),
        ({"datatype": 77}, "is damaged .*, expected a header of NIfTI"),
        ({"dim": [3, 6, 5, -3, 1, 1, 1, 1]}, "has shape .*, expected"),
        ({"vox_offset": np.nan}, "is damaged"),
        ({"vox_offset": 8}, "is damaged|begin at byte 8"),
        ({"srow_x": 0}, "its affine is singular"),
        ({"srow_x": np.nan}, "is damaged"),
        ({"magic": b"n+3"}, "has no whole header of NIfTI"),
    ],
)
def test_headers_that_say_nonsense_are_one_sentence(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    path = Path(save(tmp_path / "a.nii", np.ones((6, 5, 3), np.float32)))
    header = nibabel.Nifti1Header(path.read_bytes()[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    with pytest.raises(UserError, match=sentence):
        readers.describe(str(path))


def test_packed_files_are_opened_once_and_changed_ones_are_not_taken_for_the_same(tmp_path: Path) -> None:
    data = RNG.normal(size=(6, 5, 9)).astype(np.float32)
    path = save(tmp_path / "a.nii.gz", data)
    reader = NiftiReader()
    reader.describe(path)
    nifti._open_gzip.cache_clear()
    for index in (8, 0, 3):
        assert np.array_equal(reader.read_slice(path, "reconstruction", index), data[:, ::-1, index].T)
    assert nifti._open_gzip.cache_info().misses == 1
    save(tmp_path / "a.nii.gz", data + 1)
    with pytest.raises(UserError, match="the file was replaced or changed since it was described"):
        reader.read_slice(path, "reconstruction", 0)
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    with pytest.raises(UserError, match="slice 8 cannot be read"):
        NiftiReader().read_slice(path, "reconstruction", 8)


def test_kspace_is_simulated_from_images_and_said_to_be(tmp_path: Path) -> None:
    images = rss(coil_images(3, 1, 32, 24)) * 500
    path = save(tmp_path / "a.nii.gz", images.T.astype(np.int16), np.diag([-1, -1, 5, 1]))
    volume, faults = checks.check(readers.describe(path, "kspace"))
    assert faults == []
    assert (volume.simulated, volume.undersampled, volume.shape) == (True, False, (3, 8, 32, 24))
    assert volume.maximum == images.astype(np.int16).max()
    kspace = readers.read_slices(path, "kspace", 3)
    axes = (-2, -1)
    found = rss(np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes), norm="ortho"), axes))
    assert np.allclose(found, images, atol=0.02 * images.max())
    assert np.array_equal(readers.read_slices(path, "reconstruction_rss", 3), images.astype(np.int16))
    assert not readers.describe(path).simulated


@pytest.mark.parametrize("suffix", [".nii.gz", ".t5"])
def test_files_of_one_folder_are_pairs_by_their_names(tmp_path: Path, suffix: str) -> None:
    images = {name: RNG.uniform(size=(3, 12, 12)).astype(np.float32) for name in ("input", "target")}
    for name, image in images.items():
        path = tmp_path / f"1_{name}{suffix}"
        if suffix == ".t5":
            write_volume(path, {name: image})
        else:
            save(path, image.T, np.diag([-1, -1, 5, 1]))
    (path,) = readers.find(str(tmp_path))
    volume = readers.describe(path, "paired")
    assert (volume.name, volume.layout, volume.target) == ("1_input", "paired", "target")
    for name, image in images.items():
        assert np.array_equal(readers.read_slices(path, name, 3), image)


@pytest.mark.slow
def test_images_in_nifti_train_and_reconstruct(tiny, tmp_path: Path, caplog) -> None:
    """All tables and lines say that k-space was simulated, and the result lies where its source does."""
    for place in ("train/0_T1w", "val/1_T1w"):
        images = rss(coil_images(3, 1, 32, 32))
        save(tmp_path / "data" / f"{place}.nii.gz", images.T, permuted("LPS", (1, 1, 5)))
    config = tiny(tmp_path / "data", steps=2, model__levels=1)
    with caplog.at_level("INFO"):
        train.train(config, str(tmp_path / "run"))
    assert "training on 1 files, 3 slices" in caplog.text
    assert "k-space of 1 files simulated from images; validating on" in caplog.text
    (path,) = readers.find(str(tmp_path / "data" / "val"))
    line = reconstruct.reconstruct_file(Inference.restore(str(tmp_path / "run")), path, tmp_path / "out")
    assert "1_T1w.t5, .nii.gz and .png, simulated k-space  NMSE" in line
    found, source = nibabel.load(tmp_path / "out" / "1_T1w.nii.gz"), nibabel.load(path)
    assert np.array_equal(found.affine, source.affine)
    assert np.corrcoef(found.get_fdata().ravel(), source.get_fdata().ravel())[0, 1] > 0.5
    assert np.array_equal(read_array(tmp_path / "out" / "1_T1w.t5", "reconstruction"), read(found.get_filename()))
    reconstruct.require_free_names([path], tmp_path / "out")
    (tmp_path / "out" / "1_T1w.t5").unlink()
    with pytest.raises(UserError, match="no result of mrjax"):
        reconstruct.require_free_names([path], tmp_path / "out")
    with pytest.raises(UserError, match="where a result would replace"):
        reconstruct.require_free_names([path], Path(path).parent)


def test_tables_say_which_volumes_are_simulated(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.ones((12, 12, 3), np.float32))
    volumes, faults, _ = check.check([path, str(write_scan(tmp_path / "b.t5"))])
    assert faults == []
    assert "kspace, simulated" in check.format_table(volumes).splitlines()[1]
    scores = {method: {"nmse": 0.1, "psnr": 30.0, "ssim": 0.9} for method in ("corrupted", "reconstruction")}
    rows = [evaluator.describe(volume) | scores for volume in volumes]
    assert [row["simulated"] for row in rows] == [True, False]
    counts = [
        line.partition("input")[0].split() for line in evaluator.table(rows, ("input", "U-Net")).splitlines()[1::2]
    ]
    assert counts == [["all", "2,", "1", "simulated"], ["T1", "1"], ["unknown", "1", "simulated"]]


@pytest.mark.slow
def test_worker_processes_read_what_threads_read(tmp_path: Path) -> None:
    for number in range(2):
        images = rss(coil_images(3, 1, 32, 32, seed=number))
        save(tmp_path / f"{number}.nii.gz", images.T, np.diag([-1, -1, 5, 1]))
    volumes = [readers.describe(path, "kspace") for path in readers.find(str(tmp_path))]
    streams = []
    for workers in (0, 1):
        options = loader.LoaderOptions(2, workers)
        with loader.training_batches([SliceDataset(volumes, (32, 32))], options, seed=0, start=0) as batches:
            streams.append([next(batches) for _ in range(4)])
    for one, other in zip(*streams, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
