"""DICOM series are read by position and by no name, written as derived ones, and say nothing of the patient."""

import concurrent.futures
import dataclasses
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel.affines
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
    generate_uid,
)

from mrjax import check, reconstruct
from mrjax.config import defaults
from mrjax.errors import UserError
from mrjax.io import hdf5, readers
from mrjax.io.volume import Volume

TO_LPS = np.diag([-1.0, -1, 1, 1])
READER = readers.READERS["dicom"]


def sagittal_oblique() -> np.ndarray:
    """An affine (column, row, slice) to RAS: 1.5 mm pixels, slices 4 mm apart from left to right, tilted and turned."""
    rotation = nibabel.eulerangles.euler2mat(0.1, -0.2, 0.15)
    # Columns run to the back, rows down: the slices of a right-handed grid run to the right.
    plane = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0.0]])
    return nibabel.affines.from_matvec(rotation @ plane * [1.5, 1.5, 4], [40, 60, 80])


def header(index: float, affine: np.ndarray, **values: Any) -> Dataset:
    """What the header of an MR image says, its pixels aside."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, generate_uid()
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.4", "1.2.5"
    dataset.Modality, dataset.ImageType = "MR", ["ORIGINAL", "PRIMARY", "M"]
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Mustermann^Erika", "PID4711", "19640812"
    dataset.ProtocolName, dataset.StudyDate, dataset.EchoTime = "t1_mprage", "20240229", "3.5"
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.RepetitionTime = "GR", "SP", "2000"
    place = TO_LPS @ affine
    axes = place[:3, :2] / np.linalg.norm(place[:3, :2], axis=0)
    dataset.ImageOrientationPatient = [f"{x:.12g}"[:16] for x in axes.T.ravel()]
    dataset.ImagePositionPatient = [f"{x:.10g}"[:16] for x in place @ [0, 0, index, 1]][:3]
    dataset.PixelSpacing = [float(np.linalg.norm(place[:3, i])) for i in (1, 0)]
    dataset.SliceThickness = 4
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def save(path: Path, dataset: Dataset, pixels: np.ndarray | bytes, syntax: str = ExplicitVRLittleEndian) -> Path:
    if isinstance(pixels, np.ndarray):
        dataset.Rows, dataset.Columns = pixels.shape[-2:]
        pixels = pixels.tobytes()
    dataset.PixelData = pixels
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def stack(slices: int = 6, dtype: str = "u2") -> np.ndarray:
    """Images (slices, height, width) whose numbers are all different."""
    return np.arange(slices * 10 * 14).reshape(slices, 10, 14).astype(dtype)


def write_series(folder: Path, images: np.ndarray, affine: np.ndarray, prefix: str = "IM", **values: Any) -> Path:
    """Write a series whose names are in no order."""
    for index, image in enumerate(images):
        save(folder / f"{prefix}{index * 5 % 7}", header(index, affine, **values), image)
    return folder


def read(path: Path | str) -> tuple[Volume, np.ndarray]:
    volume = readers.describe(str(path))
    return volume, readers.read_slices(volume.path, volume.data, volume.slices)


def test_a_series_is_in_the_order_of_its_positions_and_lies_where_it_says(tmp_path: Path) -> None:
    affine, images = sagittal_oblique(), stack()
    folder = write_series(tmp_path / "scan", images, affine)
    assert readers.find(str(tmp_path)) == [str(folder)]
    volume, found = read(folder)
    assert volume.layout == "image"
    assert (volume.name, volume.contrast, volume.dtype) == ("scan", "t1_mprage", "float32")
    assert np.array_equal(found, images)
    assert volume.affine is not None
    np.testing.assert_allclose(volume.affine, affine, atol=1e-8)
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(volume.affine), [1.5, 1.5, 4])
    assert nibabel.aff2axcodes(volume.affine) == ("P", "I", "R")
    # The same from any of its files, from a worker process, and from threads.
    assert np.array_equal(read(folder / "IM5")[1], images)
    reader = pickle.loads(pickle.dumps(READER))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        slices = pool.map(lambda i: reader.read_slice(str(folder), "reconstruction", i), range(6))
    assert np.array_equal(list(slices), images)


def test_slices_scanned_from_the_other_end_make_a_right_handed_grid(tmp_path: Path) -> None:
    affine = sagittal_oblique() @ np.diag([1, 1, -1, 1])
    volume, found = read(write_series(tmp_path, stack(), affine))
    assert np.array_equal(found, stack()[::-1])
    turned = affine @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 5], [0, 0, 0, 1]]
    np.testing.assert_allclose(volume.affine, turned, atol=1e-8)


@pytest.mark.parametrize(
    "values",
    [
        {"SeriesInstanceUID": "1.2.9"},
        {"EchoTime": "7", "EchoNumbers": 2},
        {"ImageType": ["ORIGINAL", "PRIMARY", "P"]},
        {"TemporalPositionIdentifier": 2},
        {"AcquisitionNumber": 2},
        {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
    ],
)
def test_what_splits_a_folder_into_stacks(tmp_path: Path, values: dict[str, Any]) -> None:
    for name, slices, of_stack in (("A", stack(), {}), ("B", stack() + 5000, values)):
        write_series(tmp_path, slices, sagittal_oblique(), prefix=name, **of_stack)
    (tmp_path / "notes.txt").write_text("nothing")
    if "ImageOrientationPatient" in values:  # a localizer: three planes in one series, here one of a single slice
        for index in range(1, 6):
            (tmp_path / f"B{index * 5 % 7}").unlink()
    found = readers.find(str(tmp_path))
    assert found == [str(tmp_path / "A0"), str(tmp_path / "B0")]
    assert np.array_equal(read(found[0])[1], stack())
    assert np.array_equal(read(found[1])[1], stack()[: 1 if "ImageOrientationPatient" in values else 6] + 5000)
    with pytest.raises(UserError, match="holds 2 stacks of slices"):
        readers.describe(str(tmp_path))


def test_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    write_series(tmp_path / "scan", stack(), sagittal_oblique())
    shutil.copy(get_testdata_file("test-SR.dcm"), tmp_path / "scan" / "report")
    shutil.copy(get_testdata_file("DICOMDIR"), tmp_path)
    assert readers.find(str(tmp_path)) == [str(tmp_path / "scan")]
    assert np.array_equal(read(tmp_path / "scan")[1], stack())


def test_pairs_of_series_in_parallel_folders(tmp_path: Path) -> None:
    for kind, add in (("input", 7), ("target", 0)):
        for name in ("scan1", "scan2"):
            write_series(tmp_path / kind / name, stack() + add, sagittal_oblique(), prefix=kind)
    assert readers.find(str(tmp_path)) == [str(tmp_path / "input" / name) for name in ("scan1", "scan2")]
    volume, found = read(tmp_path / "input" / "scan1")
    assert (volume.layout, volume.target) == ("paired", "target")
    assert np.array_equal(found - 7, readers.read_slices(volume.path, "target", 6))


def enhanced(images: np.ndarray, affine: np.ndarray, order: list[int], **values: Any) -> Dataset:
    """An enhanced multi-frame image: geometry in functional groups, frames in an order of their own."""
    dataset = header(0, affine, SOPClassUID=EnhancedMRImageStorage, NumberOfFrames=len(order), **values)
    shared, frames = Dataset(), []
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [Dataset()], [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = dataset.ImageOrientationPatient
    shared.PixelMeasuresSequence[0].PixelSpacing = dataset.PixelSpacing
    for index in order:
        frame, rescale = Dataset(), Dataset()
        frame.PlanePositionSequence = [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = header(index, affine).ImagePositionPatient
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = index + 1, -3, "US"
        frame.PixelValueTransformationSequence = [rescale]
        frames.append(frame)
    for name in ("ImageOrientationPatient", "PixelSpacing", "ImagePositionPatient", "SliceThickness"):
        delattr(dataset, name)
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], frames
    dataset.Rows, dataset.Columns = images.shape[1:]
    dataset.PixelData = images[order].tobytes()
    return dataset


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("undefined_length", [False, True])
def test_an_enhanced_file_is_a_volume(tmp_path: Path, syntax: str, undefined_length: bool) -> None:
    images, affine = stack(), sagittal_oblique()
    dataset = enhanced(images, affine, [3, 0, 5, 1, 4, 2])
    for element in dataset:
        element.is_undefined_length = undefined_length and element.VR == "SQ"
    save(tmp_path / "one.dcm", dataset, dataset.PixelData, syntax)
    volume, found = read(tmp_path / "one.dcm")
    assert np.array_equal(found, images * np.arange(1, 7)[:, None, None] - 3)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-8)
    del dataset.PerFrameFunctionalGroupsSequence[-1]
    save(tmp_path / "one.dcm", dataset, dataset.PixelData, syntax)
    with pytest.raises(UserError, match="describes 5 of its 6 frames"):
        readers.describe(str(tmp_path / "one.dcm"))


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("i2", {"PixelRepresentation": 1, "RescaleSlope": "0.5", "RescaleIntercept": "-10"}, lambda x: x / 2 - 10),
        ("u1", {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, lambda x: x),
        ("u2", {"BitsStored": 12, "HighBit": 11}, lambda x: x % 4096),  # an overlay in the highest bits
        (
            "u2",
            {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11},
            lambda x: 4095 - x % 4096,
        ),
        ("i2", {"PhotometricInterpretation": "MONOCHROME1", "PixelRepresentation": 1}, lambda x: -1 - x),
        ("u4", {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, lambda x: x),
    ],
)
def test_values_of_all_kinds(tmp_path: Path, dtype: str, values: dict[str, Any], expected: Any) -> None:
    images = (stack(3) * 13 - 1000).astype(dtype)
    _, found = read(write_series(tmp_path, images, sagittal_oblique(), **values))
    assert np.array_equal(found, expected(images.astype(np.float64)).astype(np.float32))


def test_a_file_without_preamble_is_read(tmp_path: Path) -> None:
    for name, syntax in (("implicit", ImplicitVRLittleEndian), ("explicit", ExplicitVRLittleEndian)):
        path = save(tmp_path / name / "IM1", header(0, np.eye(4)), stack(1)[0], syntax)
        start = path.read_bytes()
        group2 = 12 + int.from_bytes(start[140:144], "little")
        for skip in (132, 132 + group2):  # without preamble, and without meta information
            path.write_bytes(start[skip:])
            assert readers.find(str(path.parent)) == [str(path.parent)]
            assert np.array_equal(read(path)[1], stack(1))


def test_slices_a_little_off_their_places_are_a_volume(tmp_path: Path) -> None:
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, 6)
    for index, off in enumerate(jitter):
        save(tmp_path / f"IM{index}", header(index + off, sagittal_oblique()), stack()[index])
    volume, found = read(tmp_path)
    assert np.array_equal(found, stack())
    np.testing.assert_allclose(volume.affine, sagittal_oblique(), atol=0.3)


def break_series(folder: Path, fault: str) -> None:
    paths = sorted(folder.iterdir())
    middle = pydicom.dcmread(paths[2])
    if fault == "missing":
        paths[2].unlink()
    elif fault == "twice":
        shutil.copy(paths[2], folder / "copy")
    elif fault == "size":
        save(paths[2], middle, np.zeros((8, 14), "u2"))
    elif fault == "header":
        paths[2].write_bytes(paths[2].read_bytes()[:500])
    elif fault == "empty":
        (folder / "IM9.dcm").touch()
    elif fault == "truncated":
        paths[2].write_bytes(paths[2].read_bytes()[:-100])
    else:
        delattr(middle, fault)
        middle.save_as(paths[2])


def test_an_enhanced_file_of_two_stacks_is_refused(tmp_path: Path) -> None:
    dataset = enhanced(stack(), sagittal_oblique(), [0, 1, 2, 0, 1, 2])
    for frame in dataset.PerFrameFunctionalGroupsSequence[3:]:
        frame.MREchoSequence = [Dataset()]
        frame.MREchoSequence[0].EffectiveEchoTime = 80
    save(tmp_path / "two.dcm", dataset, dataset.PixelData)
    with pytest.raises(UserError, match="holds 2 stacks of slices"):
        readers.describe(readers.find(str(tmp_path))[0])


def test_a_small_stream_that_says_it_holds_a_large_image_is_not_decoded(tmp_path: Path, recwarn) -> None:
    path = Path(shutil.copy(get_testdata_file("MR_small_jp2klossless.dcm"), tmp_path))
    data = path.read_bytes()
    place = data.index(b"\xff\x4f\xff\x51") + 8
    path.write_bytes(data[:place] + np.array([12000, 12000, 0, 0] * 2, ">u4").tobytes() + data[place + 32 :])
    with pytest.raises(UserError, match=r"frame 0 \(JPEG 2000 .*cannot be decoded \(ValueError\)"):
        read(path)
    assert not recwarn, "Pillow, which warns of large images, has not seen it"


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("missing", r"5 slices lie 4 to 8 mm apart, expected one distance; a slice may be missing"),
        ("twice", "holds 2 slices at one position, expected one"),
        ("size", r"holds slices of several sizes in one series \(8 x 14, 10 x 14\)"),
        ("truncated", r"IM3: has 180 bytes of pixel data, 1 frames of 10 x 14 take 280"),
        ("header", "IM3: is damaged, expected a whole DICOM file"),
        ("empty", "IM9.dcm: is damaged, expected a whole DICOM file"),
        ("ImagePositionPatient", "holds 6 slices without ImagePositionPatient"),
        ("PixelData", "IM3: has no pixel data"),
    ],
)
def test_a_series_that_is_no_volume_is_refused_with_a_sentence(tmp_path: Path, fault: str, sentence: str) -> None:
    write_series(tmp_path, stack(), sagittal_oblique())
    break_series(tmp_path, fault)
    with pytest.raises(UserError, match=sentence) as error:
        readers.describe(str(tmp_path))
    assert "mustermann" not in str(error.value).lower()
    faults = check.check(readers.find(str(tmp_path)))[1]
    assert faults, "the table of the check says so as well"


@pytest.mark.parametrize(
    ("values", "syntax", "sentence"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, ExplicitVRLittleEndian, "is a Siemens mosaic"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, ExplicitVRLittleEndian, "is RGB, expected grey"),
        ({"BitsAllocated": 1}, ExplicitVRLittleEndian, "has 1 bits a pixel"),
        ({"Rows": 60000, "Columns": 60000}, ExplicitVRLittleEndian, "has slices of 60000 x 60000"),
        ({}, DeflatedExplicitVRLittleEndian, "its header is deflated, expected a plain one"),
        ({}, JPEGLSLossless, "is compressed as JPEG-LS Lossless.*expected a package for it: .*pyjpegls"),
        ({}, "1.2.840.10008.1.2.4.100", "has the transfer syntax MPEG2"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, ExplicitVRLittleEndian, "two unit vectors at a right angle"),
        ({"ImagePositionPatient": [1, 0]}, ExplicitVRLittleEndian, "ImagePositionPatient holds 2 values, expected 3"),
    ],
)
def test_images_that_cannot_be_read_are_refused_with_a_sentence(
    tmp_path: Path, values: dict[str, Any], syntax: str, sentence: str
) -> None:
    pixels = np.zeros((10, 14 * values.get("SamplesPerPixel", 1)), "u2").tobytes()
    if syntax not in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
        pixels = encapsulate([pixels])
    dataset = header(0, np.eye(4), **({"Rows": 10, "Columns": 14} | values))
    path = save(tmp_path / "IM1", dataset, pixels, syntax)
    with pytest.raises(UserError, match=sentence):
        readers.describe(str(path))


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_jp2klossless", "emri_small_RLE", "emri_small_big_endian"])
def test_compressed_files_of_pydicom_are_those_that_are_not(tmp_path: Path, name: str) -> None:
    plain = get_testdata_file(f"{'emri' if 'emri' in name else 'MR'}_small.dcm")
    _, found = read(shutil.copy(get_testdata_file(f"{name}.dcm"), tmp_path / "IM1"))
    with pydicom.dcmread(plain) as dataset:
        assert np.array_equal(found, dataset.pixel_array.reshape(found.shape))


def test_a_frame_that_no_plugin_decodes_is_a_sentence_that_names_packages(tmp_path: Path) -> None:
    path = shutil.copy(get_testdata_file("JPEG-lossy.dcm"), tmp_path)  # 12 bits, of which Pillow decodes 8
    with pytest.raises(UserError, match=r"frame 0 \(JPEG Extended .*cannot be decoded .*expected a whole.*pylibjpeg"):
        read(path)


def test_check_of_files_of_pydicom_ends_with_volumes_and_sentences(tmp_path: Path) -> None:
    for name in ("MR_small", "MR_truncated", "emri_small", "CT_small", "SC_rgb", "test-SR", "MR2_J2KI"):
        (tmp_path / name).mkdir()
        shutil.copy(get_testdata_file(f"{name}.dcm"), tmp_path / name)
    volumes, faults, _ = check.check(readers.find(str(tmp_path)))
    shapes = [(volume.slices, *volume.data_shape) for volume in volumes]
    assert sorted(shapes) == [(1, 64, 64), (1, 128, 128), (1, 1024, 1024), (10, 64, 64)]
    assert [Path(fault.partition(":")[0]).stem for fault in faults] == ["MR_truncated", "SC_rgb", "test-SR"]


def test_without_pydicom_a_sentence_names_what_to_install(tmp_path: Path, monkeypatch) -> None:
    write_series(tmp_path, stack(), sagittal_oblique())
    for name in ("pydicom", "mrjax.io.dicom_files"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("mrjax.io.dicom_files", raising=False)
    assert readers.find(str(tmp_path)) == [str(tmp_path)]
    with pytest.raises(UserError, match=r"pydicom, which reads DICOM, is missing: pip install 'mrjax\[io\]'"):
        readers.describe(str(tmp_path))


# The patient


def test_the_patient_is_in_no_name_and_no_contrast(tmp_path: Path) -> None:
    names = {"MUSTERMANN_Erika": False, "sub-pid4711_t1": False, "t1_mprage": True, "1.2.840.113": True}
    for name, kept in names.items():
        write_series(tmp_path / name, stack(2), np.eye(4), ProtocolName="T1 Mustermann")
        volume = readers.describe(str(tmp_path / name))
        assert (volume.name == name) == kept
        assert volume.contrast == "GR TE 3.5 TR 2000"
        assert not {"mustermann", "4711"} & set(volume.name.split("_"))
    alias = readers.describe(str(tmp_path / "MUSTERMANN_Erika")).name
    assert len(alias) == 12
    assert alias == readers.describe(str(tmp_path / "MUSTERMANN_Erika")).name


def test_reading_logs_nothing_of_what_pydicom_warns_of(tmp_path: Path) -> None:
    folder = write_series(tmp_path, stack(2), np.eye(4))
    for path in folder.iterdir():  # values that pydicom quotes in its warnings
        path.write_bytes(path.read_bytes().replace(b"1.2.3\0", b"Erika\0").replace(b"19640812", b"Muster64"))
    script = "import logging, sys; from mrjax.io import readers; logging.basicConfig(level=0)\n"
    script += "volume = readers.describe(sys.argv[1]); readers.read_slices(volume.path, volume.data, 2)"
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("keep", [False, True])
def test_a_reconstruction_is_written_beside_its_dicom_source(tmp_path: Path, keep: bool) -> None:
    more = {"SpecificCharacterSet": "ISO_IR 100", "PatientComments": "Erika aus Köln"}
    folder = write_series(tmp_path / "Mustermann", stack(), sagittal_oblique(), **more)
    result = np.random.default_rng(0).normal(size=(6, 10, 14)).astype(np.float32)
    config = defaults()
    config.task, config.acquisition.mask = "paired", "none"
    inference: Any = SimpleNamespace(
        config=config, source={"step": 40}, reconstruct=lambda _: {"reconstruction": result}
    )
    line = reconstruct.reconstruct_file(inference, str(folder), tmp_path / "out", keep_identity=keep)
    places = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [Path(name).suffix for name in places] == [".dicom", ".png", ".t5"]
    assert "mustermann" not in " ".join([*places, line]).lower()
    contents = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file())
    for word in (b"Mustermann", b"Erika", b"PID4711", b"19640812", b"20240229"):
        assert (word in contents) == keep
    first = pydicom.dcmread(tmp_path / "out" / places[0] / "0001.dcm")
    assert (first.StudyInstanceUID, first.FrameOfReferenceUID) == ("1.2.4", "1.2.5")
    assert first.SeriesInstanceUID != "1.2.3"
    assert first.ImageType[:2] == ["DERIVED", "SECONDARY"]
    assert first.DerivationDescription == "mrjax reconstruction; step 40"
    assert first.get("PatientComments") == ("Erika aus Köln" if keep else None)
    assert first.get("PatientIdentityRemoved") == (None if keep else "YES")
    volume, found = read(tmp_path / "out" / places[0])
    assert np.abs(found - result).max() <= np.ptp(result) / 65535
    np.testing.assert_allclose(volume.affine, sagittal_oblique(), atol=1e-8)


# Written files


def write_t5(path: Path, images: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    attributes = {"acquisition": "T1"} | ({} if affine is None else {"affine": affine})
    hdf5.write(path, {"reconstruction": images}, attributes)
    return readers.describe(str(path))


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_values_and_geometry_survive_the_way_to_dicom_and_back(tmp_path: Path, scale: float) -> None:
    images = (np.random.default_rng(0).normal(size=(4, 10, 14)) * scale).astype(np.float32)
    source = write_t5(tmp_path / "a.t5", images, sagittal_oblique())
    READER.write(tmp_path / "a.dicom", {"reconstruction": images}, {}, source)
    volume, found = read(tmp_path / "a.dicom")
    readers.READERS["hdf5"].write(tmp_path / "b.t5", {"reconstruction": found}, {}, volume)
    back, values = read(tmp_path / "b.t5")
    assert (back.contrast, volume.name) == ("T1", "a")
    np.testing.assert_allclose(back.affine, sagittal_oblique(), atol=1e-8)
    assert np.abs(values - images).max() <= np.ptp(images) / 65535


def test_a_flat_volume_without_geometry_is_written_and_says_what_it_is(tmp_path: Path) -> None:
    images = np.full((3, 10, 14), 7.5, np.float32)
    source = dataclasses.replace(write_t5(tmp_path / "a.t5", images), simulated=True)
    READER.write(tmp_path / "a.dicom", {"reconstruction": images}, {"mrjax_method": "cs", "mrjax_psnr": 30.0}, source)
    told = pydicom.dcmread(tmp_path / "a.dicom" / "0001.dcm").DerivationDescription
    assert told == "mrjax reconstruction of simulated k-space; method cs; psnr 30"
    volume, found = read(tmp_path / "a.dicom")
    assert np.array_equal(found, images)
    np.testing.assert_allclose(volume.affine, TO_LPS)


def test_only_folders_that_mrjax_wrote_are_replaced(tmp_path: Path) -> None:
    source = readers.describe(str(write_series(tmp_path / "a.dicom", stack(), np.eye(4))))
    for place in ("a.dicom", "b.dicom"):
        write_series(tmp_path / place, stack(), np.eye(4))
        with pytest.raises(UserError, match="is the source, or no result of mrjax, expected another folder"):
            READER.write(tmp_path / place, {"reconstruction": stack()}, {}, source)
    for slices in (6, 4):
        READER.write(tmp_path / "c.dicom", {"reconstruction": stack(slices)}, {}, source)
        assert np.array_equal(read(tmp_path / "c.dicom")[1], stack(slices))  # whole numbers come back as they are
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dicom", "b.dicom", "c.dicom"]


@pytest.mark.parametrize(
    ("images", "affine", "sentence"),
    [
        (np.ones((2, 4, 4), np.complex64), np.eye(4), "complex64 .*expected real images"),
        (np.full((2, 4, 4), np.nan), np.eye(4), "holds nan to nan, expected finite numbers"),
        (np.ones((2, 4, 4)), np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "right angles"),
        (np.ones((2, 4, 4)), np.diag([1.0, 1, 0, 1]), "its slices lie in one plane"),
    ],
)
def test_what_dicom_cannot_hold_is_a_sentence(tmp_path: Path, images: Any, affine: Any, sentence: str) -> None:
    source = write_t5(tmp_path / "a.t5", np.ones((2, 4, 4), np.float32), affine)
    with pytest.raises(UserError, match=sentence):
        READER.write(tmp_path / "a.dicom", {"reconstruction": images}, {}, source)
    assert not (tmp_path / "a.dicom").exists()


@pytest.mark.skipif(not shutil.which("dcm2niix"), reason="needs dcm2niix")
def test_dcm2niix_finds_a_written_series_in_the_same_place(tmp_path: Path) -> None:
    images = (np.random.default_rng(0).random((5, 32, 48)) * 900).astype(np.float32)
    source = write_t5(tmp_path / "a.t5", images, sagittal_oblique())
    READER.write(tmp_path / "a.dicom", {"reconstruction": images}, {}, source)
    command = ["dcm2niix", "-f", "out", "-o", str(tmp_path), str(tmp_path / "a.dicom")]
    done = subprocess.run(command, capture_output=True, text=True)
    image: Any = nibabel.load(tmp_path / "out.nii")
    corner, (column, row, slice_) = image.affine, np.meshgrid(range(48), range(32), range(5), indexing="ij")
    world = nibabel.affines.apply_affine(sagittal_oblique(), np.stack([column, row, slice_], -1))
    voxels = np.rint(nibabel.affines.apply_affine(np.linalg.inv(corner), world)).astype(int)
    np.testing.assert_allclose(nibabel.affines.apply_affine(corner, voxels), world, atol=1e-3, err_msg=done.stdout)
    found = image.get_fdata()[tuple(np.moveaxis(voxels, -1, 0))]
    assert np.abs(found - images.transpose(2, 1, 0)).max() <= 900 / 65535


@pytest.mark.skipif(not all(map(shutil.which, ("dciodvfy", "dcmdump", "dcmj2pnm"))), reason="needs dcmtk, dicom3tools")
@pytest.mark.parametrize("of_dicom", [False, True])
def test_written_files_are_valid_to_others_and_upright(tmp_path: Path, of_dicom: bool) -> None:
    images = (np.random.default_rng(0).random((3, 32, 48)) * 900).astype(np.float32)
    images[:, :6] *= 5  # brighter at the top
    source = write_t5(tmp_path / "a.t5", images, sagittal_oblique())
    if of_dicom:
        source = readers.describe(str(write_series(tmp_path / "source", images.astype("u2"), sagittal_oblique())))
    READER.write(tmp_path / "b.dicom", {"reconstruction": images}, {"mrjax_step": 3}, source, keep_identity=of_dicom)
    for path in sorted((tmp_path / "b.dicom").iterdir()):
        report = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
        assert "MRImage" in report
        assert "Error" not in report
        dump = subprocess.run(["dcmdump", str(path)], capture_output=True, text=True)
        assert dump.returncode == 0
        assert "[DERIVED\\SECONDARY" in dump.stdout
    command = ["dcmj2pnm", "--write-raw-pnm", "+Wm", str(tmp_path / "b.dicom" / "0002.dcm"), str(tmp_path / "b.pgm")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    shown = np.frombuffer((tmp_path / "b.pgm").read_bytes()[-32 * 48 :], np.uint8)
    assert np.corrcoef(shown, images[1].ravel())[0, 1] > 0.999
