"""The ISMRMRD XML header: written as fastMRI's readers expect it in a k-space file, and read of raw files."""

import math
from typing import NamedTuple
from xml.etree import ElementTree

import h5py
import numpy as np

from mrjax.errors import UserError, expect
from mrjax.io.hdf5_contents import find_data_sets, require_honest
from mrjax.io.hdf5_heap import POINTER, GlobalHeap, read_elements, read_into

MAX_BYTES = 2**22  # of a header
# Parts of a header by which a patient or a visit could be found.
IDENTITY = {
    "subjectInformation",
    "studyInformation",
    "measurementID",
    "measurementDependency",
    "seriesDate",
    "seriesTime",
}
IDENTITY |= {"seriesInstanceUIDRoot", "frameOfReferenceUID", "referencedImageSequence"}
IDENTITY |= {"institutionName", "stationName", "deviceID", "deviceSerialNumber"}

_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  <experimentalConditions><H1resonanceFrequency_Hz>12770000</H1resonanceFrequency_Hz></experimentalConditions>
  <encoding>
    <encodedSpace>{space}</encodedSpace>
    <reconSpace>{space}</reconSpace>
    <encodingLimits>
      <kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center></kspace_encoding_step_1>
    </encodingLimits>
    <trajectory>cartesian</trajectory>
  </encoding>
</ismrmrdHeader>
"""


def header(size: tuple[int, int], pixel_mm: float = 1.0, thickness_mm: float = 5.0) -> str:
    """Write the XML header of a Cartesian 2-D acquisition at 0.3 T in which every phase-encode column was sampled.

    `size` is (height, width) of k-space and image; height is the readout (`x`), width the phase encoding (`y`).
    """
    height, width = size
    matrix = f"<matrixSize><x>{height}</x><y>{width}</y><z>1</z></matrixSize>"
    sides = f"<x>{height * pixel_mm:g}</x><y>{width * pixel_mm:g}</y><z>{thickness_mm:g}</z>"
    space = f"{matrix}<fieldOfView_mm>{sides}</fieldOfView_mm>"
    return _HEADER.format(space=space, last=width - 1, centre=width // 2)


class RawHeader(NamedTuple):
    """What the header of a raw file says of one of its encodings; axes are readout, phase and second phase encoding."""

    matrix: tuple[int, int, int]  # encoded
    field: tuple[float, float, float]  # encoded field of view in mm, 0 if unknown
    height: int  # samples of the readout in the field of view of the reconstruction
    centres: tuple[int, int]  # of both phase encodings; size // 2 if the header does not say
    calibration: str
    protocol: str
    siemens: bool
    noise_bandwidth: float  # of the noise readouts' receiver, relative to their sampling rate


def find_raw(file: h5py.File, path: str) -> dict[str, tuple[h5py.Dataset, h5py.Dataset]]:
    """Find the groups of raw data in the file `path`, each with its header and its readouts."""
    found = find_data_sets(file, path)
    groups = {}
    for name, data in found.items():
        group = name.removesuffix("data")
        header, parts = found.get(f"{group}xml"), isinstance(data, h5py.Dataset) and data.dtype.names
        if group != name and isinstance(header, h5py.Dataset) and {"head", "data"} <= set(parts or ()):
            groups[group] = (header, data)
    return groups


def read_xml(data: h5py.Dataset, path: str) -> bytes:
    """Read the header of a raw file."""
    name = str(data.name)
    require_honest(data, path, name, None)
    kind = h5py.check_string_dtype(data.dtype)
    expect(kind, f"{path}: `{name}` is {data.dtype}", "text")
    text = read_elements(data, path)[0]
    if kind.length is None:
        with open(path, "rb") as file:
            _, address, index = text.view(POINTER)[0].tolist()
            offset, length = GlobalHeap(file.fileno()).locate(address, index)
            text = np.empty(length, np.uint8)
            read_into(file.fileno(), text, offset)
    expect(len(text) <= MAX_BYTES, f"{path}: `{name}` has {len(text):,} bytes", f"at most {MAX_BYTES:,}")
    return text.tobytes().strip(b"\0")


def parse(xml: bytes, encoding: int, path: str) -> RawHeader:
    """Parse the header of the file `path` for one of its encodings; a `UserError` if it is no Cartesian one.

    The parser of the package ismrmrd refuses headers that lack anything of the schema, as those of simulators do.
    """
    root = _parse(xml, path)
    encodings = root.findall("{*}encoding")
    expect(encoding < len(encodings), f"{path}: its header has {len(encodings)} encodings", f"encoding {encoding}")
    found = encodings[encoding]
    trajectory = _text(found, "trajectory")
    label = f"{path}: its trajectory is {trajectory or 'not said'}"
    expect(trajectory.lower() == "cartesian", label, "cartesian; others have to be gridded by another program first")
    space, limits = "encodedSpace/matrixSize/", "encodingLimits/kspace_encoding_step_"
    matrix = [_number(found, f"{space}{axis}") for axis in "xyz"]
    label = f"{path}: its encoded matrix is {' x '.join(f'{size:g}' for size in matrix)}"
    expect(all(size in range(1, 2**16) for size in matrix), label, "whole numbers from 1 to 65,535")
    field = [_number(found, f"encodedSpace/fieldOfView_mm/{axis}") for axis in "xyz"]
    kept = _number(found, "reconSpace/fieldOfView_mm/x")
    part = kept / field[0] if 0 < kept < field[0] else 1
    centres = [int(_number(found, f"{limits}{step}/center", matrix[step] // 2)) for step in (1, 2)]
    return RawHeader(
        matrix=(int(matrix[0]), int(matrix[1]), int(matrix[2])),
        field=(field[0], field[1], field[2]),
        height=max(round(matrix[0] * part), 1),
        centres=(centres[0], centres[1]),
        calibration=_text(found, "parallelImaging/calibrationMode"),
        protocol=_text(root, "measurementInformation/protocolName"),
        siemens=_text(root, "acquisitionSystemInformation/systemVendor").lower().startswith("siemens"),
        noise_bandwidth=_number(root, "acquisitionSystemInformation/relativeReceiverNoiseBandwidth") or 1,
    )


def without_identity(xml: bytes, path: str) -> bytes:
    """Return a header without the parts by which the patient could be found."""
    root = _parse(xml, path)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in IDENTITY:
                parent.remove(child)
    ElementTree.register_namespace("", "http://www.ismrm.org/ISMRMRD")
    return ElementTree.tostring(root)


def _parse(xml: bytes, path: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path}: its XML header cannot be parsed ({error}), expected that of ISMRMRD") from error


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext("/".join(f"{{*}}{name}" for name in path.split("/"))) or "").strip()


def _number(element: ElementTree.Element, path: str, default: float = 0) -> float:
    """Return a number, the default if it is missing, or none, or not finite."""
    try:
        value = float(_text(element, path))
    except ValueError:
        return default
    return value if math.isfinite(value) else default
