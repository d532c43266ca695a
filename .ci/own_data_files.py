"""Small files of the real formats, made from the demo data: the folders that the pages in docs/data/ speak of.

Two training subjects, one each for validation and test, of 64 x 64 pixels and 4 slices. The formats' own packages write
them: pydicom, nibabel, ismrmrd, and h5py in the places of MATLAB, fastMRI and M4Raw.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import h5py
import nibabel
import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from raw_files import make_header, make_lines, make_readout, write_raw, write_scan

from mrjax.data.resize import crop_or_pad
from mrjax.io.readers import read_slices
from mrjax.mri.fourier import magnitude_host

SIZE, SLICES = 64, 4
SUBJECTS = {"train": 2, "val": 1, "test": 1}
AFFINE = np.array([[-3.6, 0, 0.4, 115], [0, 3.6, 0, -115], [0.3, 0, 5, -10], [0, 0, 0, 1]])


class Scan(NamedTuple):
    """A scan of a subject."""

    split: str  # 'train', 'val' or 'test'
    subject: int  # from 1 on
    contrast: str  # 'T1' or 'T2'
    kspace: np.ndarray  # (slices, coils, SIZE, SIZE) complex64
    images: np.ndarray  # (slices, SIZE, SIZE) float32, its root-sum-of-squares


def read_scans(demo: Path) -> list[Scan]:
    """Read scans of the demo data, and crop their k-space."""
    scans = []
    for split, count in SUBJECTS.items():
        for contrast in ("T1", "T2"):
            for path in sorted((demo / split).glob(f"*_{contrast}01.t5"))[:count]:
                kspace = crop_or_pad(read_slices(str(path), "kspace", 12)[8 : 8 + SLICES], (SIZE, SIZE))
                subject = len({(scan.split, scan.subject) for scan in scans if scan.contrast == contrast}) + 1
                scans.append(Scan(split, subject, contrast, kspace, magnitude_host(kspace)))
    return scans


def write_dicom(scans: list[Scan]) -> None:
    """Write dicom/<split>/<patient>/<series>/IM<NNNN>.dcm, as a picture archive sends them."""
    for scan in scans:
        series, study = generate_uid(), generate_uid()
        folder = Path("dicom", scan.split, f"patient{scan.subject}", f"{scan.contrast}_tse")
        folder.mkdir(parents=True)
        scale = 4000 / scan.images.max()
        for i, image in enumerate(scan.images):
            data = pydicom.Dataset()
            data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, generate_uid()
            data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, study
            data.PatientName, data.PatientID, data.Modality = "Doe^Jane", f"4711{scan.subject}", "MR"
            data.StudyDate, data.ProtocolName = "20240229", f"{scan.contrast}_tse_tra"
            data.ImageType, data.SeriesNumber, data.InstanceNumber = ["ORIGINAL", "PRIMARY"], 3, i + 1
            place = np.diag([-1, -1, 1, 1]) @ AFFINE
            axes = (place[:3, :2] / np.linalg.norm(place[:3, :2], axis=0)).T.ravel()
            data.ImageOrientationPatient = [f"{x:.8f}" for x in axes]
            data.ImagePositionPatient = [f"{x:.8f}" for x in (place @ [0, 0, i, 1])[:3]]
            data.PixelSpacing, data.SliceThickness = ["3.612478", "3.6"], "5"
            data.Rows, data.Columns, data.SamplesPerPixel = SIZE, SIZE, 1
            data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
            data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
            data.RescaleSlope, data.RescaleIntercept = "2.5", "0"
            data.PixelData = np.round(scale * image).astype("<u2").tobytes()
            data.file_meta = pydicom.dataset.FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            data.save_as(folder / f"IM{i + 1:04d}.dcm", enforce_file_format=True)


def write_nifti(scans: list[Scan]) -> None:
    """Write nifti/<split>/sub-<NN>/anat/sub-<NN>_<T1w|T2w>.nii.gz, as BIDS; and pairs/, blurred images beside them."""
    for scan in scans:
        name = f"sub-{scan.subject:02d}_{scan.contrast}w.nii.gz"
        volume = (1000 * scan.images).astype(np.int16).transpose(2, 1, 0)[:, ::-1]
        folder = Path("nifti", scan.split, f"sub-{scan.subject:02d}", "anat")
        blurred = magnitude_host(scan.kspace * (np.hanning(SIZE) ** 4)[:, None]).transpose(2, 1, 0)[:, ::-1]
        places = {folder: volume, Path("pairs", scan.split, "target"): volume}
        places[Path("pairs", scan.split, "input")] = (1000 * blurred).astype(np.int16)
        for place, data in places.items():
            place.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(data, AFFINE), place / name)


def write_ismrmrd(scans: list[Scan]) -> None:
    """Write raw/<split>/<contrast>_<NN>.mrd; the first with a noise scan and oversampled readouts; and fast.mrd.

    fast.mrd is undersampled twice, with calibration lines in the centre and partial Fourier.
    """
    rng = np.random.default_rng(0)
    for i, scan in enumerate(scans):
        path = Path("raw", scan.split, f"{scan.contrast}_{scan.subject:02d}.mrd")
        if i:
            write_scan(path, scan.kspace)
            continue
        wide = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(_pad_readout(scan.kspace), 2), axis=2), 2)
        noise = rng.standard_normal((2, wide.shape[1], 2 * SIZE)) * 1e-3
        readouts = [make_readout(noise[0] + 1j * noise[1], [19])]  # 19: ACQ_IS_NOISE_MEASUREMENT
        for z, kspace in enumerate(wide):
            readouts += make_lines(kspace, slice=z, position=(0, 0, 5.0 * z))
        write_raw(path, make_header((2 * SIZE, SIZE, 1), oversampling=2), readouts)
    lines = [line for line in range(0, 52) if line % 2 == 0 or 26 <= line < 38]
    readouts = []
    for z, kspace in enumerate(scans[-1].kspace):
        readouts += make_lines(kspace, lines, slice=z, position=(0, 0, 5.0 * z))
    write_raw(Path("fast.mrd"), make_header((SIZE, SIZE, 1), calibration="embedded"), readouts)


def _pad_readout(kspace: np.ndarray) -> np.ndarray:
    """Return images along the readout (axis 2), of twice the field of view."""
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(kspace, 2), axis=2), 2)
    return np.pad(image, ((0, 0), (0, 0), (SIZE // 2, SIZE // 2), (0, 0)))


def write_matlab(scans: list[Scan]) -> None:
    """Write matlab/<split>/scan<NN>.mat as MATLAB's save -v7.3 does `ksp`, (height, width, coils, slices) there."""
    for i, scan in enumerate(scans):
        path = Path("matlab", scan.split, f"scan{i + 1:02d}.mat")
        path.parent.mkdir(parents=True, exist_ok=True)
        compound = np.dtype([("real", "<f8"), ("imag", "<f8")])
        with h5py.File(path, "w", userblock_size=512) as file:  # reversed axes: (slices, coils, width, height)
            shown = np.ascontiguousarray(scan.kspace.swapaxes(2, 3), np.complex128)
            data = file.create_dataset("ksp", data=shown.view(compound), chunks=True, compression="gzip")
            data.attrs["MATLAB_class"] = np.bytes_("double")
        with open(path, "r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, HDF5 schema 1.00 .".ljust(124) + b"\x00\x02IM")


def write_fastmri(scans: list[Scan]) -> None:
    """Write fastmri/multicoil_<train|val|test>/file_brain_<AXT1|AXT2>_<NNN>.h5, test files as the challenge's."""
    mask = (np.arange(SIZE) % 4 == 1) | (abs(np.arange(SIZE) - SIZE // 2) < 3)
    for i, scan in enumerate(scans):
        wide = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(_pad_readout(scan.kspace), 2), axis=2, norm="ortho"), 2)
        kspace = (1e-4 * wide).astype(np.complex64)
        path = Path("fastmri", f"multicoil_{scan.split}", f"file_brain_AX{scan.contrast}_200_{i + 1:07d}.h5")
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["ismrmrd_header"] = make_header((2 * SIZE, SIZE, 1), oversampling=2).toXML()
            file.attrs["acquisition"], file.attrs["patient_id"] = f"AX{scan.contrast}", f"{i:064x}"
            if scan.split == "test":
                file["kspace"], file["mask"] = kspace * mask, mask
                file.attrs["acceleration"], file.attrs["num_low_frequency"] = 4, 5
                continue
            rss = crop_or_pad(magnitude_host(kspace), (SIZE, SIZE))
            file["kspace"], file["reconstruction_rss"] = kspace, rss
            file.attrs["max"], file.attrs["norm"] = rss.max(), np.linalg.norm(rss)


def write_m4raw(scans: list[Scan]) -> None:
    """Write m4raw/multicoil_<train|val|test>/<study>_<contrast><NN>.h5, three repetitions of partly sampled k-space."""
    rng = np.random.default_rng(0)
    for scan in scans:
        folder = Path("m4raw", f"multicoil_{scan.split}")
        folder.mkdir(parents=True, exist_ok=True)
        for repetition in (1, 2, 3):
            noise = rng.standard_normal((2, *scan.kspace.shape)) * 0.02 * scan.images.max()
            kspace = (scan.kspace + noise[0] + 1j * noise[1]).astype(np.complex64)
            kspace[..., :8] = kspace[..., 57:] = 0  # M4Raw measures columns 30 to 225 of 256
            name = f"20220610{scan.subject:02d}_{scan.contrast}{repetition:02d}.h5"
            with h5py.File(folder / name, "w") as file:
                file["kspace"], file["reconstruction_rss"] = kspace, magnitude_host(kspace)
                file["ismrmrd_header"] = "<ismrmrdHeader><encoding></ismrmrdHeader>"  # no valid XML, as M4Raw's
                file.attrs["acquisition"], file.attrs["patient_id"] = scan.contrast, f"20220610{scan.subject:02d}"
                file.attrs["max"] = file["reconstruction_rss"][()].max()


def write_safetensors(scans: list[Scan]) -> None:
    """Write tensors/<split>/<NN>.safetensors, the format that docs/extending.md adds."""
    for i, scan in enumerate(scans):
        path = Path("tensors", scan.split, f"{i + 1:02d}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"kspace": scan.kspace}, path)


def write_all(demo: Path) -> None:
    """Write the folders of all pages into the current one."""
    scans = read_scans(demo)
    for write in (write_dicom, write_nifti, write_ismrmrd, write_matlab, write_fastmri, write_m4raw, write_safetensors):
        write(scans)
