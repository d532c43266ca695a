"""DICOM files: their headers, frame by frame, and their pixels.

pydicom's own messages and warnings may quote what a header says of a patient, so none of them is shown.
"""

# ruff: noqa: SIM905 - lists of keywords, as lists a line for each

import functools
import io
import logging
import os
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_sequence
from pydicom.pixels import as_pixel_options, get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
)

from mrjax.errors import UserError, expect

logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="pydicom")

_READS = 2**20  # of a header at most: three may take 40 us and 700 bytes, the header of an honest file 200 for a frame
_PIXELS = 2**24  # of a slice at most
_FRAMES = 2**16  # of a file at most
_IDENTITY = "PatientName PatientID OtherPatientIDs OtherPatientNames PatientBirthDate AccessionNumber".split()
# What splits a series into stacks, beside the orientation: kind of image, echo, time, diffusion.
_STACKS = """SeriesInstanceUID ImageType FrameType ComplexImageComponent EchoNumbers EchoTime EffectiveEchoTime
    TemporalPositionIdentifier TemporalPositionIndex DiffusionBValue DiffusionGradientOrientation""".split()
_VALUES = """ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices RescaleSlope
    RescaleIntercept ProtocolName SeriesDescription ScanningSequence RepetitionTime AcquisitionNumber
    FrameAcquisitionNumber SOPInstanceUID SOPClassUID""".split()
_VALUES += _STACKS
_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
_GROUPS = """PlanePositionSequence PlaneOrientationSequence PixelMeasuresSequence MREchoSequence FrameContentSequence
    PixelValueTransformationSequence MRImageFrameTypeSequence MRDiffusionSequence
    MRTimingAndRelatedParametersSequence""".split()
_PIXEL_MODULE = """SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns
    BitsAllocated BitsStored PixelRepresentation ExtendedOffsetTable ExtendedOffsetTableLengths""".split()
_WANTED: list[Any] = [*_IDENTITY, *_VALUES, *_PIXEL_MODULE, _SHARED, _PER_FRAME, "ModalityLUTSequence"]


class ImageFile(NamedTuple):
    """A file with frames of one size."""

    path: str
    offset: int  # of the first byte of its pixel data
    syntax: str  # UID of the transfer syntax
    options: dict[str, Any]  # of its pixel data, for pydicom's decoder
    shape: tuple[int, int]  # (height, width)
    inverted: int | None  # MONOCHROME1: smallest and largest possible value together
    contrast: str
    identity: frozenset[str]  # words that name the patient
    fault: str  # why its frames cannot be read; '' if they can


class Frame(NamedTuple):
    """A slice of a file, and what its header says of it."""

    file: ImageFile
    number: int  # in its file, from 0
    uid: str
    stack: tuple[Any, ...]  # equal for all frames of a stack
    acquisition: int
    position: np.ndarray | None  # (3,) of the first pixel, mm towards left, back and up
    axes: np.ndarray | None  # (2, 3) unit vectors along a row and along a column
    spacing: np.ndarray | None  # (2,) mm between rows, and between columns
    thickness: float  # mm from slice to slice, as the header says
    slope: float
    intercept: float


class Header(io.BufferedReader):
    """A file of which a header is read: in a limited number of pieces, and none of it inflated.

    `left` is how many, at first by the size; sequences in the header share it.
    """

    def __init__(self, raw: io.RawIOBase | io.BytesIO, left: list[int]) -> None:
        super().__init__(raw)
        self.left = left

    @classmethod
    def open(cls, path: str) -> "Header":
        """Open a file."""
        return cls(io.FileIO(path), [min(2**16 + os.path.getsize(path) // 32, _READS)])

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, for pydicom."""
        self.left[0] -= 1
        expect(self.left[0] > 0, "its header has too many elements", "an image's")
        expect(size is not None and size >= 0, "its header is deflated", "a plain one; see dcmtk's dcmconv")
        return super().read(size)


def read_frames(path: str) -> tuple[Frame, ...]:
    """Read the header of a file; `UserError` if it is damaged. There are no frames in what is no image."""
    stat = os.stat(path)
    return _read_frames(path, stat.st_size, (stat.st_ino, stat.st_mtime_ns))


@functools.lru_cache(maxsize=2**14)
def _read_frames(path: str, size: int, version: tuple[int, int]) -> tuple[Frame, ...]:
    try:
        with Header.open(path) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=_WANTED)
            if "Rows" not in header:
                kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
                other = kind and "Image Storage" not in UID(kind).name
                expect(other, "is damaged", "a whole DICOM file; copy it again")
                return ()
            return tuple(_frames(header, _describe_file(path, header, file, size), file.left))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # pydicom has no exception of its own for what is damaged
        raise UserError(f"{path}: is damaged ({type(error).__name__}), expected a whole DICOM file") from None


def _describe_file(path: str, header: pydicom.FileDataset, file: Header, size: int) -> ImageFile:
    """Describe the pixel data, at whose tag the file stands."""
    implicit, little = header.original_encoding
    plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    syntax = header.file_meta.get("TransferSyntaxUID") or plain
    offset = file.tell() + (8 if implicit else 12)
    expect(file.read(4) in (b"\xe0\x7f\x10\0", b"\x7f\xe0\0\x10"), "has no pixel data", "an image")
    options = as_pixel_options(header, pixel_keyword="PixelData", pixel_vr="OW")
    options = {name: value if isinstance(value, tuple) else _plain(value) for name, value in options.items()}
    rows, columns, bits, frames = (options[n] for n in ("rows", "columns", "bits_allocated", "number_of_frames"))
    expect(0 < rows * columns <= _PIXELS, f"has slices of {rows} x {columns}", f"1 to {_PIXELS} pixels")
    expect(0 < frames <= _FRAMES, f"has {frames} frames", f"1 to {_FRAMES}")
    least = frames * (8 if syntax.is_encapsulated else rows * columns * bits // 8)
    found = f"has {size - offset} bytes of pixel data, {frames} frames of {rows} x {columns} take {least}"
    expect(least <= size - offset, found, "a whole file; copy it again")
    identity = frozenset(word for name in _IDENTITY for word in _words(str(header.get(name) or "")))
    fault, inverted = _find_fault(header, syntax, options), None
    if options["photometric_interpretation"] == "MONOCHROME1":
        inverted = -1 if options["pixel_representation"] else 2 ** int(options["bits_stored"]) - 1
    contrast = _contrast(_values(header), identity)
    return ImageFile(path, offset, str(syntax), options, (rows, columns), inverted, contrast, identity, fault)


def _find_fault(header: Dataset, syntax: UID, options: dict[str, Any]) -> str:
    """Return what was found, and what is expected, where the frames of a sound file cannot be read; else ''."""
    kind = options["photometric_interpretation"]
    if "MOSAIC" in (header.get("ImageType") or ()):
        return "is a Siemens mosaic of several slices in one image, expected single slices; dcm2niix takes it apart"
    if options["samples_per_pixel"] != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        return f"is {kind}, expected grey values"
    if options["bits_allocated"] not in (8, 16, 32):
        return f"has {options['bits_allocated']} bits a pixel, expected 8, 16 or 32"
    if "ModalityLUTSequence" in header:
        return "has values by a table (ModalityLUTSequence), expected RescaleSlope and RescaleIntercept"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return f"has the transfer syntax {syntax.name}, expected one of single images"
    packages = "; ".join(decoder.missing_dependencies)
    return "" if decoder.is_available else f"is compressed as {syntax.name}, expected a package for it: {packages}"


def _frames(header: Dataset, file: ImageFile, left: list[int]) -> Iterator[Frame]:
    shared, per_frame = _items(header, _SHARED, left), _items(header, _PER_FRAME, left)
    count = file.options["number_of_frames"]
    expect(len(per_frame) in (0, count), f"describes {len(per_frame)} of its {count} frames", "all")
    common = _values(header) | _group_values(shared[0] if shared else Dataset(), left)
    for index in range(count):
        values = common | _group_values(per_frame[index], left) if per_frame else common
        axes = _numbers(values, "ImageOrientationPatient", 6)
        if axes is not None:
            axes = axes.reshape(2, 3)
            square = np.abs(axes @ axes.T - np.eye(2)).max() < 0.01
            expect(square, "its ImageOrientationPatient is no plane's", "two unit vectors at a right angle")
            axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
        spacing = _numbers(values, "PixelSpacing", 2)
        orientation = None if axes is None else tuple(np.round(axes, 3).ravel() + 0.0)
        stack = (*(str(values.get(name)) for name in _STACKS), orientation)
        thickness = [float(values.get(name) or 0) for name in ("SpacingBetweenSlices", "SliceThickness")]
        yield Frame(
            file=file,
            number=index,
            uid=f"{values.get('SOPInstanceUID')} {index}",
            stack=(stack[0], file.fault) if file.fault else stack,
            acquisition=int(values.get("FrameAcquisitionNumber") or values.get("AcquisitionNumber") or 0),
            position=_numbers(values, "ImagePositionPatient", 3),
            axes=axes,
            spacing=None if spacing is None or spacing.min() <= 0 else spacing,
            thickness=next((abs(size) for size in thickness if 0 < abs(size) < 1e4), 1.0),
            slope=float(values.get("RescaleSlope") or 1),
            intercept=float(values.get("RescaleIntercept") or 0),
        )


def _values(dataset: Dataset) -> dict[str, Any]:
    return {name: dataset.get(name) for name in _VALUES if name in dataset}


def _group_values(item: Dataset, left: list[int]) -> dict[str, Any]:
    """Return the values in a frame's functional groups."""
    groups = (group for name in _GROUPS for group in _items(item, name, left)[:1])
    return {name: value for group in groups for name, value in _values(group).items()}


def _items(dataset: Dataset, name: str, left: list[int]) -> list[Dataset]:
    """Return the items of a sequence, read in a limited number of pieces."""
    element = dataset.get_item(name) if name in dataset else None
    if not isinstance(element, RawDataElement):
        return [] if element is None else list(element.value or ())
    value, implicit = element.value or b"", element.is_implicit_VR or element.VR == "UN"
    file = Header(io.BytesIO(value), left)
    return list(read_sequence(file, implicit, element.is_little_endian, len(value), "iso8859"))


def _numbers(values: dict[str, Any], name: str, count: int) -> np.ndarray | None:
    """Return so many numbers, None if there are none at all."""
    if not (value := values.get(name)):
        return None
    numbers = np.asarray(value, np.float64)
    fits = numbers.shape == (count,) and np.abs(numbers).max() < 1e6  # false for NaN as well
    expect(fits, f"its {name} holds {numbers.size} values", f"{count} finite numbers")
    return numbers


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, int) else str(value)


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", text.casefold()) if word]


def names_patient(text: str, identity: frozenset[str]) -> bool:
    """Tell whether a text holds a word that names the patient; short ones only count apart."""
    words = set(_words(text))
    parts = {word for word in identity if len(word) > 2 or not word.isascii()}
    return bool(identity & words) or any(part in text.casefold() for part in parts)


def _contrast(values: dict[str, Any], identity: frozenset[str]) -> str:
    """Return the protocol, or what the series is called, or the timing, whichever is the first that names nobody."""
    for name in ("ProtocolName", "SeriesDescription"):
        if (text := str(values.get(name) or "").strip()) and not names_patient(text, identity):
            return text
    sequence, *times = (values.get(name) for name in ("ScanningSequence", "EchoTime", "RepetitionTime"))
    parts = [sequence if isinstance(sequence, str) else "/".join(sequence or ())]
    parts += [f"{name} {time:g}" for name, time in zip(("TE", "TR"), times, strict=True) if time]
    return " ".join(filter(None, parts)) or "unknown"


def _require_size(opened: BinaryIO, frame: Frame) -> None:
    """Raise an error if a JPEG 2000 stream, of 300 bytes maybe, says that it holds a larger image than the header."""
    if frame.file.syntax in JPEG2000TransferSyntaxes:
        stream = get_frame(opened, frame.number, number_of_frames=frame.file.options["number_of_frames"])
        start = stream.index(b"\xff\x4f\xff\x51") + 8
        right, bottom, left, top = struct.unpack(">4L", stream[start : start + 16])
        if (bottom - top, right - left) != frame.file.shape:
            raise ValueError
        opened.seek(frame.file.offset)


@np.errstate(over="ignore", invalid="ignore")
def read_pixels(frame: Frame) -> np.ndarray:
    """Decode a frame, (height, width) float32; `UserError` if it is damaged."""
    file = frame.file
    decoder = get_decoder(UID(file.syntax))
    try:
        with open(file.path, "rb") as opened:
            opened.seek(file.offset)
            _require_size(opened, frame)
            pixels, _ = decoder.as_array(opened, index=frame.number, raw=True, **file.options)
        values = pixels.reshape(file.shape).astype(np.float64)
    except Exception as error:  # decoders raise anything
        packages = "".join(f", or {package}" for package in decoder.missing_dependencies)
        found = f"{file.path}: frame {frame.number} ({decoder.UID.name}) cannot be decoded ({type(error).__name__})"
        raise UserError(f"{found}, expected a whole file{packages}") from None
    if file.inverted is not None:
        values = file.inverted - values
    return (values * frame.slope + frame.intercept).astype(np.float32)
