"""Raw files of ISMRMRD, written by its own package."""

from collections.abc import Sequence
from pathlib import Path

import ismrmrd
import numpy as np
from ismrmrd import xsd


def make_readout(data: np.ndarray, flags: Sequence[int] = (), *, position: Sequence[float] = (0, 0, 0), **fields):
    """An acquisition of data (coils, samples), centred unless `center_sample` says otherwise.

    Fields are those of the acquisition's header; `line` and `partition` are its encoding steps, other counters go by
    their own names. Directions are those of an axial slice.
    """
    acquisition = ismrmrd.Acquisition.from_array(np.ascontiguousarray(data, np.complex64))
    acquisition.center_sample = data.shape[1] // 2
    acquisition.sample_time_us = 5
    fields = {"position": position, "read_dir": (1, 0, 0), "phase_dir": (0, 1, 0), "slice_dir": (0, 0, 1)} | fields
    for name, value in fields.items():
        steps = {"line": "kspace_encode_step_1", "partition": "kspace_encode_step_2"}
        if hasattr(acquisition.idx, steps.get(name, name)):
            setattr(acquisition.idx, steps.get(name, name), value)
        elif isinstance(value, tuple):
            getattr(acquisition, name)[:] = value
        else:
            setattr(acquisition, name, value)
    for flag in flags:
        acquisition.set_flag(flag)
    return acquisition


def make_header(
    matrix: tuple[int, int, int],
    *,
    oversampling: int = 1,
    centres: tuple[int, int] | None = None,
    trajectory: str = "cartesian",
    calibration: str | None = None,
    vendor: str = "Someone",
    patient: str = "Doe^Jane",
) -> xsd.ismrmrdHeader:
    """The header of pixels of 2 x 1.5 mm and slices of 4 mm."""
    field = [2 * matrix[0], 1.5 * matrix[1], 4 * matrix[2]]
    sizes = [(matrix, field), ((matrix[0] // oversampling, *matrix[1:]), (field[0] / oversampling, *field[1:]))]
    spaces = [
        xsd.encodingSpaceType(
            matrixSize=xsd.matrixSizeType(x=size[0], y=size[1], z=size[2]),
            fieldOfView_mm=xsd.fieldOfViewMm(x=side[0], y=side[1], z=side[2]),
        )
        for size, side in sizes
    ]
    limits = xsd.encodingLimitsType()
    for step in (1, 2):
        centre = centres[step - 1] if centres else matrix[step] // 2
        limit = xsd.limitType(minimum=0, maximum=matrix[step] - 1, center=centre)
        setattr(limits, f"kspace_encoding_step_{step}", limit)
    encoding = xsd.encodingType(
        encodedSpace=spaces[0], reconSpace=spaces[1], encodingLimits=limits, trajectory=xsd.trajectoryType(trajectory)
    )
    if calibration:
        factor = xsd.accelerationFactorType(kspace_encoding_step_1=2, kspace_encoding_step_2=1)
        mode = xsd.calibrationModeType(calibration)
        encoding.parallelImaging = xsd.parallelImagingType(accelerationFactor=factor, calibrationMode=mode)
    return xsd.ismrmrdHeader(
        subjectInformation=xsd.subjectInformationType(patientName=patient),
        measurementInformation=xsd.measurementInformationType(
            protocolName="T1 tse", measurementID=f"1_{patient}", patientPosition=xsd.patientPositionType.HFS
        ),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            systemVendor=vendor, relativeReceiverNoiseBandwidth=0.5
        ),
        experimentalConditions=xsd.experimentalConditionsType(H1resonanceFrequency_Hz=63_000_000),
        encoding=[encoding],
    )


def write_raw(path: Path, header: xsd.ismrmrdHeader, readouts: list, *, one_by_one: bool = False) -> Path:
    """Write a file at once, or readout by readout as a scanner's converter does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if one_by_one:
        dataset = ismrmrd.Dataset(str(path), "dataset", True)
        dataset.write_xml_header(header.toXML())
        for readout in readouts:
            dataset.append_acquisition(readout)
        dataset.close()
        return path
    with ismrmrd.File(str(path), "w") as file:
        file["dataset"].header, file["dataset"].acquisitions = header, readouts
    return path


def make_lines(kspace: np.ndarray, lines: Sequence[int] | None = None, **fields) -> list:
    """A readout for each line of k-space (coils, samples, width)."""
    chosen = range(kspace.shape[2]) if lines is None else lines
    return [make_readout(kspace[:, :, line], line=line, **fields) for line in chosen]


def write_scan(path: Path, kspace: np.ndarray) -> Path:
    """Write fully sampled k-space (slices, coils, height, width)."""
    _, _, height, width = kspace.shape
    readouts = [line for z, one in enumerate(kspace) for line in make_lines(one, slice=z, position=(0, 0, 4.0 * z))]
    return write_raw(path, make_header((height, width, 1)), readouts)
