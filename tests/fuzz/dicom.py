"""DICOM files that are damaged, or made to do harm."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from tests.fuzz.mutations import cut, flip, splice

DEFLATED = "1.2.840.10008.1.2.1.99"
ITEM, END_OF_ITEM, END = (b"\xfe\xff" + tag for tag in (b"\0\xe0", b"\x0d\xe0", b"\xdd\xe0"))
OPEN, NO_LENGTH = struct.pack("<L", 2**32 - 1), bytes(4)


def header(rng: np.random.Generator, index: int) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", f"1.2.3.{index}"
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "1.2.3", "1.2"
    dataset.PatientName, dataset.ProtocolName, dataset.ImageType = "Muster^Erika", "t1", ["ORIGINAL", "PRIMARY"]
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 3 * index], [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness, dataset.EchoTime = [1, 1], 3, 5
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = 16
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = rng.integers(0, 2**16, (16, 16), np.uint16).tobytes()
    return dataset


def save(path: Path, dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_dicom(rng: np.random.Generator, folder: Path) -> Path:
    """Write three sound slices, or an enhanced file of three; return the path of the first."""
    form = rng.integers(4)
    if form == 3:
        dataset, frames = header(rng, 0), []
        for index in range(3):
            frame = Dataset()
            frame.PlanePositionSequence = [Dataset()]
            frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3 * index]
            frames.append(frame)
        del dataset.ImagePositionPatient
        dataset.PerFrameFunctionalGroupsSequence, dataset.NumberOfFrames = frames, 3
        dataset["PerFrameFunctionalGroupsSequence"].is_undefined_length = bool(rng.integers(2))
        dataset.PixelData = 3 * dataset.PixelData
        return save(folder / "a.dcm", dataset)
    for path, index in ((folder / "a.dcm", 0), (folder / "b.dcm", 1), (folder / "c.dcm", 2)):
        dataset = header(rng, index)
        save(path, dataset, ImplicitVRLittleEndian if form == 1 else ExplicitVRLittleEndian)
        if form == 2:
            dataset.compress(RLELossless, generate_instance_uid=False)
            dataset.save_as(path)
    return folder / "a.dcm"


def dicom_flipped_bytes(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_dicom(rng, folder))


def dicom_flipped_bytes_in_headers(rng: np.random.Generator, folder: Path) -> Path:
    return flip(rng, write_dicom(rng, folder), 128, 800)


def dicom_truncated(rng: np.random.Generator, folder: Path) -> Path:
    return cut(rng, write_dicom(rng, folder))


def dicom_spliced(rng: np.random.Generator, folder: Path) -> Path:
    return splice(rng, write_dicom(rng, folder))


def dicom_huge_claims(rng: np.random.Generator, folder: Path) -> Path:
    """Sizes, frames and bits that are not there, plain and compressed."""
    dataset = header(rng, 0)
    for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel"):
        if rng.random() < 0.5:
            setattr(dataset, name, int(rng.choice([0, 1, 8, 32, 64, 4096, 65535])))
    if rng.random() < 0.5:
        dataset.NumberOfFrames = int(rng.choice([0, 2, 2**16, 2**31 - 1]))
    if rng.random() < 0.5:
        return save(folder / "a.dcm", dataset)
    # A segment of run lengths that is as long as it may be: 64 bytes from each.
    packed, syntax = struct.pack("<16L", 2, 64, 64 + 2**16, *[0] * 13) + b"\x81\0" * 2**16, RLELossless
    if rng.random() < 0.5:
        Image.new("I;16", (16, 16)).save(stream := io.BytesIO(), "JPEG2000", no_jp2=True)
        sizes = struct.pack(">8L", *(width := [int(rng.choice([16, 12000, 2**31]))] * 2), 0, 0, *width, 0, 0)
        packed, syntax = stream.getvalue()[:8] + sizes + stream.getvalue()[40:], JPEG2000Lossless
    dataset.PixelData = encapsulate([packed])
    return save(folder / "a.dcm", dataset, syntax)


def dicom_other_values(rng: np.random.Generator, folder: Path) -> Path:
    """Numbers that are none, too many of them or too large, and text that is none."""
    path = write_dicom(rng, folder)
    data = path.read_bytes()
    for value in (b"DS\x02\x005 ", b"DS\x02\x002 ", b"DS\x02\x00-1", b"DS\x04\x001\\1 ", b"t1", b"Erika", b"1.2.3\0"):
        if rng.random() < 0.4:
            size, junk = len(value) - 4, [b"Erika", b"nan", b"1e999", b"-inf", b"\x1b[2J", b"\\" * 64, b"9" * 64]
            new = rng.choice(junk)[: size if value.startswith(b"DS") else len(value)]
            data = data.replace(value, value[:4] * value.startswith(b"DS") + new.ljust(size, b" "))
    path.write_bytes(data)
    return path


def dicom_sequences_in_sequences(rng: np.random.Generator, folder: Path) -> Path:
    """Sequences of great depth, or of a great number of items or elements, where they are read and where not."""
    path = save(folder / "a.dcm", header(rng, 0))
    count = int(2 ** rng.integers(3, 18))
    tag = struct.pack("<HH", *[(0x0008, 0x1140), (0x5200, 0x9229), (0x5200, 0x9230)][rng.integers(3)])
    start = tag + b"SQ\0\0"
    contents = [
        (ITEM + OPEN + start + OPEN) * min(count, 20000),
        (ITEM + NO_LENGTH) * count,
        bytes(8) * count,
        ITEM + OPEN + b"".join(struct.pack("<HH2sH", 9, i & 0xFFFF, b"CS", 0) for i in range(min(count, 2**16))),
    ][rng.integers(4)]
    length, end = (OPEN, END + NO_LENGTH) if rng.random() < 0.5 else (struct.pack("<L", len(contents)), b"")
    data = path.read_bytes()
    place = data.index(struct.pack("<HH", 0x0028, 0x0002) if tag[0] == 8 else struct.pack("<HH", 0x7FE0, 0x0010))
    path.write_bytes(data[:place] + start + length + contents + end + data[place:])
    return path


def dicom_deflated_bombs(rng: np.random.Generator, folder: Path) -> Path:
    path = save(folder / "a.dcm", header(rng, 0), DEFLATED)
    packer = zlib.compressobj(wbits=-15)
    block = packer.compress(bytes(2**16)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = path.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    path.write_bytes(data[:start] + block * int(2 ** rng.integers(0, 16)))
    return path


MUTATIONS = (
    dicom_flipped_bytes,
    dicom_flipped_bytes_in_headers,
    dicom_truncated,
    dicom_spliced,
    dicom_huge_claims,
    dicom_other_values,
    dicom_sequences_in_sequences,
    dicom_deflated_bombs,
)
