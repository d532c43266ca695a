"""Write a volume as a folder of single-frame DICOM files (MR Image Storage), which every viewer opens.

Values are 16 bits with one RescaleSlope: whole numbers come back as they are, others within 1/65535 of their range.
The series is derived: new UIDs, in the study and the frame of reference of a DICOM source. Only with `keep_identity`
does it tell of the patient.
"""

# ruff: noqa: SIM905 - lists of keywords, as lists a line for each

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DS, format_number_as_ds

from mrjax.errors import UserError, expect
from mrjax.io.dicom_files import Header
from mrjax.io.files import replacing_folder
from mrjax.io.volume import DATA_NAMES, Volume

_MARK = "mrjax"  # with which the derivation of every file begins
# What is kept of a DICOM source: none of it tells of the patient.
_KEPT = """StudyInstanceUID FrameOfReferenceUID PositionReferenceIndicator PatientPosition Manufacturer
    ManufacturerModelName BodyPartExamined ScanningSequence SequenceVariant ScanOptions MRAcquisitionType SequenceName
    EchoTime RepetitionTime InversionTime FlipAngle EchoTrainLength NumberOfAverages ImagingFrequency ImagedNucleus
    MagneticFieldStrength PixelBandwidth SliceThickness EchoNumbers TemporalPositionIdentifier""".split()
# What tells of the patient.
_IDENTITY = """PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge PatientSize PatientWeight
    OtherPatientIDs OtherPatientNames EthnicGroup PatientComments AdditionalPatientHistory StudyDate StudyTime
    AccessionNumber ReferringPhysicianName StudyID StudyDescription SeriesDate SeriesTime AcquisitionDate
    AcquisitionTime InstitutionName StationName""".split()
# What must be there, but may be empty.
_EMPTY = """StudyDate StudyTime AccessionNumber ReferringPhysicianName StudyID PatientName PatientID PatientBirthDate
    PatientSex PositionReferenceIndicator PatientPosition Laterality Manufacturer ScanOptions EchoTime RepetitionTime
    EchoTrainLength""".split()


def write(
    path: Path,
    arrays: Mapping[str, Any],
    attributes: Mapping[str, Any],
    source: Volume,
    source_file: str | None,
    keep_identity: bool,
) -> None:
    """Write `reconstruction` (slices, height, width), real, in the geometry of `source` (see `volume.Reader`).

    `source_file` is one of a DICOM source. A folder that is in the place is replaced if mrjax wrote it.
    """
    _require_own(path, source)
    images = np.asarray(arrays.get(DATA_NAMES["image"]))
    label = f"{source.path}: what is written as DICOM is {images.dtype} of shape {images.shape}"
    expect(images.ndim == 3 and images.dtype.kind in "fiub", label, "real images (slices, height, width)")
    images = images.astype(np.float64)
    low, high = float(images.min()), float(images.max())
    found = f"{source.path}: what is written as DICOM holds {low} to {high}"
    expect(np.isfinite(high - low), found, "finite numbers")
    exact = high - low <= 65535 and np.array_equal(images, np.rint(images))
    slope, intercept = _number(1 if exact else (high - low) / 65535 or 1), _number(low)
    common = _common(attributes, source, source_file, keep_identity)
    common.RescaleSlope, common.RescaleIntercept, common.RescaleType = slope, intercept, "US"
    first, last = np.percentile(images, (0.1, 99.9))
    if last - first > 100:  # viewers find windows of their own, and none takes a width below 1
        common.WindowCenter, common.WindowWidth = _number((first + last) / 2), _number(last - first)
    step, origin = _set_geometry(common, source)
    with replacing_folder(path) as part:
        for index, image in enumerate(images):
            stored = np.clip(np.rint((image - float(intercept)) / float(slope)), 0, 65535).astype("<u2")
            _write_slice(part / f"{index + 1:04d}.dcm", common, stored, index, origin + index * step)


def _require_own(path: Path, source: Volume) -> None:
    """Raise a `UserError` if a folder in the place is the source, or was not written here."""
    if not path.exists():
        return
    place, of_source = path.resolve(), Path(source.path).resolve()
    own = path.is_dir() and all(file.suffix == ".dcm" and _is_marked(file) for file in path.iterdir())
    found = f"{path}: is the source, or no result of mrjax"
    expect(own and place != of_source and place not in of_source.parents, found, "another folder for what is written")


def _is_marked(file: Path) -> bool:
    try:
        header = pydicom.dcmread(file, specific_tags=["DerivationDescription"], stop_before_pixels=True)
        return str(header.get("DerivationDescription", "")).startswith(_MARK)
    except Exception:  # pydicom has no exception of its own for what is damaged
        return False


def _common(attributes: Mapping[str, Any], source: Volume, source_file: str | None, keep_identity: bool) -> Dataset:
    """Return what the headers of all slices have in common."""
    common = Dataset()
    common.SpecificCharacterSet = "ISO_IR 192"
    for name in _EMPTY:
        setattr(common, name, None)
    common.StudyInstanceUID, common.FrameOfReferenceUID = _uid(), _uid()
    common.ScanningSequence, common.SequenceVariant, common.MRAcquisitionType = "RM", "NONE", "2D"
    if source_file is not None:
        _copy(common, source_file, keep_identity)
    common.Modality, common.SOPClassUID = "MR", MRImageStorage
    common.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    common.SeriesInstanceUID, common.SeriesNumber = _uid(), 1000
    contrast = source.contrast.replace("\\", "/")
    common.ProtocolName, common.SeriesDescription = contrast, f"{contrast[:50]} ({_MARK})"
    facts = {name.removeprefix("mrjax_"): value for name, value in attributes.items() if name.startswith("mrjax_")}
    texts = (f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items())
    what = f"{'reconstruction' if facts else 'conversion'}{' of simulated k-space' * source.simulated}"
    common.DerivationDescription = "; ".join([f"{_MARK} {what}", *texts])[:1024]
    if not keep_identity:
        common.PatientIdentityRemoved, common.LongitudinalTemporalInformationModified = "YES", "REMOVED"
        common.DeidentificationMethod = f"{_MARK}: no patient, no dates, acquisition parameters only"
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.BitsAllocated, common.BitsStored, common.HighBit, common.PixelRepresentation = 16, 16, 15, 0
    return common


def _copy(common: Dataset, source_file: str, keep_identity: bool) -> None:
    """Copy what is kept of a source's header."""
    tags: list[Any] = [*_KEPT, *(_IDENTITY if keep_identity else ())]
    try:
        with Header.open(source_file) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
        for element in header:
            if element.keyword in tags:
                common.add(element)
        pydicom.dcmwrite(io.BytesIO(), common, implicit_vr=False, little_endian=True)  # is all of it fit to be written?
    except Exception as error:  # pydicom has no exception of its own for what is damaged
        raise UserError(f"{source_file}: has a header that cannot be copied ({type(error).__name__})") from None


def _set_geometry(common: Dataset, source: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Set what all slices share of their geometry; return the vector from slice to slice, and the first position."""
    affine = np.eye(4) if source.affine is None else np.diag([-1.0, -1, 1, 1]) @ source.affine
    axes, step = affine[:3, :2].T, affine[:3, 2]
    lengths = np.linalg.norm(axes, axis=1)
    square = lengths.min() > 0 and abs(axes[0] @ axes[1]) < 1e-3 * lengths.prod()
    found = f"{source.path}: its rows and columns are not at right angles, or have no length"
    expect(square, found, "a grid that DICOM can describe")
    cosines = axes / lengths[:, None]
    spacing = abs(float(step @ np.cross(*cosines)))
    expect(spacing > 0, f"{source.path}: its slices lie in one plane", "a distance between them")
    common.ImageOrientationPatient = [_number(x) for x in cosines.ravel()]
    common.PixelSpacing = [_number(x) for x in lengths[::-1]]
    common.SpacingBetweenSlices = _number(spacing)
    if "SliceThickness" not in common:
        common.SliceThickness = _number(spacing)
    return step, affine[:3, 3]


def _write_slice(path: Path, common: Dataset, stored: np.ndarray, index: int, position: np.ndarray) -> None:
    """Write a file of one slice: its pixels, number and place."""
    dataset = Dataset()
    dataset.update(common)
    dataset.SOPInstanceUID, dataset.InstanceNumber = _uid(), index + 1
    dataset.ImagePositionPatient = [_number(x) for x in position]
    axes = np.reshape(common.ImageOrientationPatient, (2, 3)).astype(np.float64)
    dataset.SliceLocation = _number(position @ np.cross(*axes))
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelData = stored.tobytes()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, dataset.SOPInstanceUID
    meta.TransferSyntaxUID, meta.ImplementationVersionName = ExplicitVRLittleEndian, _MARK
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)


def _number(value: Any) -> Any:
    """Return a number as DICOM writes it, in 16 characters."""
    return DS(format_number_as_ds(float(value)))


def _uid() -> str:
    return generate_uid(prefix=None)
