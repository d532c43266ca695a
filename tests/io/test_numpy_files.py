"""NumPy's files are read as the same volume in every form, and nothing in them is unpickled."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import coil_images, read_example, rss, to_kspace
from numpy.lib import format as npy

from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.io import readers
from mrjax.io.storage import NATIVE, Storage
from mrjax.io.volume import Volume

KSPACE = to_kspace(coil_images(3, 2, 16, 12))
IMAGES = rss(coil_images(3, 2, 16, 12))
PARTS = np.stack([KSPACE.real, KSPACE.imag], -1)
LAST = Storage(axes="slices,height,width,coils")

FORMS = {
    "complex64": ({"a.npy": KSPACE}, NATIVE),
    "complex128, Fortran order": ({"a.npy": np.asfortranarray(KSPACE.astype(np.complex128))}, NATIVE),
    "big endian": ({"a.npy": KSPACE.astype(">c8")}, NATIVE),
    "last axis of 2": ({"a.npy": PARTS}, NATIVE),
    "coils last": ({"a.npy": np.moveaxis(KSPACE, 1, -1)}, LAST),
    "npz": ({"kspace": KSPACE, "settings": np.array([{}])}, NATIVE),
    "npz, last axis of 2, big endian": ({"kspace": PARTS.astype(">f8")}, NATIVE),
    "npz, other keys and axes": ({"ksp": np.moveaxis(KSPACE, 1, -1)}, Storage(kspace="ksp", axes=LAST.axes)),
}


def write(folder: Path, arrays: dict[str, np.ndarray], compress: bool = False) -> str:
    if "a.npy" in arrays:
        np.save(folder / "a.npy", arrays["a.npy"])
        return str(folder / "a.npy")
    (np.savez_compressed if compress else np.savez)(folder / "a.npz", **arrays)
    return str(folder / "a.npz")


def read(volume: Volume, name: str) -> np.ndarray:
    return readers.read_slices(volume.path, name, volume.slices)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_kspace_is_the_same_in_every_form(tmp_path: Path, form: str, compress: bool) -> None:
    arrays, storage = FORMS[form]
    volume = readers.describe(write(tmp_path, arrays, compress), "kspace", storage)
    assert volume.shape == KSPACE.shape
    np.testing.assert_array_equal(read(volume, volume.data), KSPACE)
    example = read_example(SliceDataset([volume], (16, 12)), 2)
    np.testing.assert_array_equal(example["kspace"], KSPACE[2])


def test_coils_of_one_slice_and_a_mask(tmp_path: Path) -> None:
    mask = np.arange(12) % 3 == 0
    path = write(tmp_path, {"kspace": KSPACE[0], "mask": mask})
    volume = readers.describe(path, storage=Storage(axes="coils,height,width"))
    assert (volume.shape, volume.undersampled) == ((1, 2, 16, 12), True)
    np.testing.assert_array_equal(volume.mask_of_slice(0), mask[None])


def test_images_alone_and_in_pairs(tmp_path: Path) -> None:
    for place in ("input/a.npy", "target/a.npy", "b_input.npy", "b_target.npy", "c.npy"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        np.save(tmp_path / place, IMAGES + ("target" in place))
    np.savez(tmp_path / "d.npz", input=IMAGES, target=IMAGES + 1)
    found = readers.find(str(tmp_path))
    assert [Path(path).name for path in found] == ["b_input.npy", "c.npy", "d.npz", "a.npy"]
    for path in found:
        volume = readers.describe(path)
        assert volume.layout == ("image" if path.endswith("c.npy") else "paired")
        np.testing.assert_array_equal(read(volume, volume.data), IMAGES)
        if volume.target:
            np.testing.assert_array_equal(read(volume, volume.target), IMAGES + 1)


def test_the_image_of_k_space_in_a_parallel_folder_is_its_target(tmp_path: Path) -> None:
    for place, array in (("kspace/a.npy", KSPACE), ("image/a.npy", IMAGES)):
        (tmp_path / place).parent.mkdir()
        np.save(tmp_path / place, array)
    (path,) = readers.find(str(tmp_path))
    volume = readers.describe(path)
    assert (volume.layout, volume.shape) == ("kspace", KSPACE.shape)
    np.testing.assert_array_equal(read(volume, str(volume.target)), IMAGES)


def test_files_are_known_by_their_contents(tmp_path: Path) -> None:
    for arrays in ({"a.npy": KSPACE}, {"kspace": KSPACE}):
        path = shutil.move(write(tmp_path, arrays), tmp_path / "scan.dat")
        assert readers.describe(str(path)).shape == KSPACE.shape
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:  # as PyTorch writes them
        archive.writestr("archive/data.pkl", "")
    assert readers.find(str(tmp_path)) == [str(tmp_path / "scan.dat")]


class Harm:
    """What leaves a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["a.npy", "kspace", "mask"])
def test_objects_are_refused_and_never_unpickled(tmp_path: Path, name: str) -> None:
    arrays = {"kspace": KSPACE} if name == "mask" else {}
    path = write(tmp_path, arrays | {name: np.array([Harm(tmp_path / "harm")], object)})
    with pytest.raises(UserError, match=r"holds Python objects, which a pickle would make, expected numbers"):
        readers.describe(path)
    assert not (tmp_path / "harm").exists()


def test_claims_beyond_the_file_and_damage_are_a_sentence(tmp_path: Path) -> None:
    def claim(name: str, shape: tuple[int, ...], compression: int = zipfile.ZIP_STORED) -> str:
        with (tmp_path / "header.npy").open("wb") as file:
            npy.write_array_header_1_0(file, {"descr": "<c8", "fortran_order": False, "shape": shape})
            file.write(bytes(1000))
        if name == "a.npy":
            return str((tmp_path / "header.npy").rename(tmp_path / name))
        with zipfile.ZipFile(tmp_path / name, "w", compression) as archive:
            archive.write(tmp_path / "header.npy", "kspace.npy")
        return str(tmp_path / name)

    for path in (
        claim("a.npy", (3, 2**40, 16, 12)),
        claim("a.npz", (3, 2, 16, 12)),
        claim("b.npz", (2**20, 8, 256, 256), zipfile.ZIP_DEFLATED),
    ):
        with pytest.raises(UserError, match=r"claims [0-9,]+ bytes, expected at most [0-9,]+ by the file's size"):
            readers.describe(path)
    volume = readers.describe(claim("c.npz", (3, 2, 16, 12), zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match=r"slice 0 of `kspace` cannot be read \("):
        read(volume, "kspace")
    (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x01\x00\x03\x00(((")
    with pytest.raises(UserError, match=r"d\.npy: is damaged \(.*\), expected a file of np\.save or np\.savez"):
        readers.describe(str(tmp_path / "d.npy"))
    volume = readers.describe(write(tmp_path, {"kspace": KSPACE}))
    write(tmp_path, {"kspace": KSPACE[:2]})
    with pytest.raises(UserError, match=r"slice 0 of `kspace` cannot be read \(the file was replaced or changed"):
        read(volume, "kspace")
