"""However files store a volume, it is read as the same one."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, read_example, rss, to_kspace

from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.io import hdf5, readers
from mrjax.io.storage import NATIVE, Storage

IMAGES = coil_images(3, 2, 16, 12)
KSPACE = to_kspace(IMAGES)
TARGET = rss(IMAGES)
LAST = "slices,height,width,coils"
MATLAB = "height,width,coils,slices"


def parts(data: np.ndarray) -> np.ndarray:
    return np.stack([data.real, data.imag], -1)


def compound(data: np.ndarray, real: str, imaginary: str, *, swapped: bool = False) -> np.ndarray:
    names = (imaginary, real) if swapped else (real, imaginary)
    result = np.empty(data.shape, [(name, "f4") for name in names])
    result[real], result[imaginary] = data.real, data.imag
    return result


def without_shift(data: np.ndarray) -> np.ndarray:
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(data, (-2, -1)), norm="ortho"), (-2, -1))
    return np.fft.fft2(images, norm="ortho").astype(np.complex64)


FORMS = {
    "last axis of 2": (parts(KSPACE), NATIVE, True),
    "last axis of 2, double": (parts(KSPACE.astype(np.complex128)), NATIVE, True),
    "last axis of 2, big endian": (parts(KSPACE).astype(">f4"), NATIVE, False),
    "compound": (compound(KSPACE, "real", "imag"), NATIVE, True),
    "compound of other names": (compound(KSPACE, "x", "y"), NATIVE, True),
    "compound, imaginary first": (compound(KSPACE, "r", "i", swapped=True), NATIVE, False),
    "coils last": (np.moveaxis(KSPACE, 1, -1), Storage(axes=LAST), False),
    "coils last, last axis of 2": (parts(np.moveaxis(KSPACE, 1, -1)), Storage(axes=LAST), False),
    "slices last": (KSPACE.transpose(2, 3, 1, 0), Storage(axes=MATLAB), False),
    "coils first": (KSPACE.swapaxes(0, 1), Storage(axes="coils,slices,height,width"), False),
    "without shift": (without_shift(KSPACE), Storage(shifted=True), False),
}


@pytest.mark.parametrize("form", FORMS)
def test_kspace_is_the_same_in_every_form(tmp_path: Path, form: str) -> None:
    data, storage, by_offset = FORMS[form]
    path = str(tmp_path / "a.t5")
    hdf5.write(path, {"kspace": data})
    volume = readers.describe(path, "kspace", storage)
    assert volume.shape == KSPACE.shape
    for i in (2, 0):
        read = readers.reader_for(path).read_slice(path, volume.data, i)
        np.testing.assert_allclose(read, KSPACE[i], atol=1e-5)
    assert np.allclose(read_example(SliceDataset([volume], (16, 12)), 1)["kspace"], KSPACE[1], atol=1e-5)
    stored = readers.READERS["hdf5"]._stored[path, volume.data]
    assert (stored.chunks is not None and stored.arrangement is None) == by_offset  # as fast as the native form


def write_matlab(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as MATLAB does with '-v7.3': axes in reverse, complex numbers as `real` and `imag`."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, data in arrays.items():
            stored = compound(data, "real", "imag") if data.dtype.kind == "c" else data
            file.create_dataset(name, data=stored.T, compression="gzip").attrs["MATLAB_class"] = np.bytes_("single")


@pytest.mark.parametrize("axes", [NATIVE.axes, MATLAB])
def test_matlab_files_have_their_axes_as_matlab_shows_them(tmp_path: Path, axes: str) -> None:
    mask = np.arange(12)[None] % 3 > 0
    native = axes == NATIVE.axes
    kspace, target = (KSPACE, TARGET) if native else (KSPACE.transpose(2, 3, 1, 0), TARGET.transpose(1, 2, 0))
    write_matlab(tmp_path / "a.mat", {"kspace": kspace, "target": target, "mask": mask.astype(float)})
    (path,) = readers.find(str(tmp_path))
    volume = readers.describe(path, "kspace", Storage(axes=axes))
    assert (volume.shape, volume.target_shape) == (KSPACE.shape, TARGET.shape)
    assert np.array_equal(volume.mask_of_slice(1), mask)
    assert np.array_equal(readers.read_slices(path, "kspace", 3), KSPACE)
    assert np.array_equal(readers.read_slices(path, "target", 3), TARGET)
    (tmp_path / "old.mat").write_text("MATLAB 5.0 MAT-file" * 100)
    with pytest.raises(UserError, match=r"old\.mat: is a MATLAB file older than v7\.3, .*'-v7\.3'"):
        readers.describe(str(tmp_path / "old.mat"))


def test_an_image_of_two_axes_is_one_slice(tmp_path: Path) -> None:
    for name, stored in (("real", TARGET[0]), ("complex", parts(IMAGES[0, 0]))):
        path = str(tmp_path / f"{name}.t5")
        hdf5.write(path, {"input": stored, "target": stored})
        volume = readers.describe(path, "paired")
        assert (volume.shape, volume.slices) == ((1, 16, 12), 1)
        example = read_example(SliceDataset([volume], (16, 12)), 0)
        expected = TARGET[0] if name == "real" else np.abs(IMAGES[0, 0])
        assert np.allclose(example["input"], expected)
        assert np.allclose(example["target"], expected)


def test_names_say_which_data_set_is_which(tmp_path: Path) -> None:
    path = str(tmp_path / "a.h5")
    mask = np.arange(12) % 2
    with h5py.File(path, "w") as file:
        file["scan/ksp"], file["images/truth"], file["kept"] = KSPACE, TARGET, mask
    with pytest.raises(UserError, match=r"no data set `kspace`, found: `images/truth`, `kept`, `scan/ksp` \(config\."):
        readers.describe(path, "kspace")
    volume = readers.describe(path, None, Storage(kspace="scan/ksp", target="images/truth", mask="kept"))
    assert (volume.layout, volume.data, volume.target) == ("kspace", "scan/ksp", "images/truth")
    assert np.array_equal(volume.mask_of_slice(0), mask[None])
    assert np.array_equal(readers.read_slices(path, volume.data, 3), KSPACE)
    pair = readers.describe(path, "paired", Storage(input="images/truth", target="images/truth"))
    example = read_example(SliceDataset([pair], (16, 12)), 2)
    assert np.array_equal(example["target"], TARGET[2])


@pytest.mark.parametrize(("data", "image"), [("kspace", "image"), ("input", "target")])
def test_targets_are_found_in_a_parallel_folder(tmp_path: Path, data: str, image: str) -> None:
    arrays = {"kspace": KSPACE, "input": TARGET / 2}
    hdf5.write(tmp_path / "train" / data / "a.h5", {data: arrays[data]})
    hdf5.write(tmp_path / "train" / image / "a.h5", {image: TARGET})
    (path,) = readers.find(str(tmp_path / "train"))
    volume = readers.describe(path)
    assert (Path(path).parent.name, volume.target, volume.target_shape) == (data, "target", TARGET.shape)
    assert np.array_equal(readers.read_slices(path, "target", 3), TARGET)


def test_fastmris_padding_was_never_measured(tmp_path: Path) -> None:
    hdf5.write(tmp_path / "a.h5", {"kspace": KSPACE}, {"padding_left": 2, "padding_right": 11})
    example = read_example(SliceDataset([readers.describe(str(tmp_path / "a.h5"))], (16, 12)), 1)
    assert not example["kspace"][..., :2].any()
    assert not example["kspace"][..., 11:].any()
    assert np.array_equal(example["kspace"][..., 2:11], KSPACE[1, ..., 2:11])
