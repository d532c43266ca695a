"""`check` doubts what is nearly surely not meant, and names what mends it; good files raise no doubt."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace, write_pair
from test_loader import describe
from test_storage import MATLAB, compound, parts, without_shift, write_matlab

from mrjax import check
from mrjax import config as configs
from mrjax.data import plausibility, splits
from mrjax.errors import UserError
from mrjax.io import hdf5, readers
from mrjax.io.storage import NATIVE, Storage

IMAGES = coil_images(8, 4, 64, 64)
KSPACE = to_kspace(IMAGES)
OVERSAMPLED = to_kspace(np.pad(IMAGES, [(0, 0), (0, 0), (32, 32), (0, 0)]))
GOOD = {
    "native": KSPACE,
    "pairs": parts(KSPACE),
    "compound": compound(KSPACE, "imag", "real"),
    "one_coil": KSPACE[:, 0],
    "noise": np.random.default_rng(0).normal(size=(*KSPACE.shape, 2)),
}
DOUBTFUL = {
    "coils_last": (np.moveaxis(KSPACE, 1, -1), Storage(axes="slices,height,width,coils")),
    "coils_last_one_slice": (np.moveaxis(KSPACE[0], 0, -1), Storage(axes="height,width,coils")),
    "coils_first": (KSPACE.swapaxes(0, 1), Storage(axes="coils,slices,height,width")),
    "coils_first_one_slice": (KSPACE[0], Storage(axes="coils,height,width")),
    "matlab": (KSPACE.T, Storage(axes="height,width,coils,slices")),
    "corners": (without_shift(KSPACE), Storage(shifted=True)),
    "oversampled": (OVERSAMPLED, NATIVE),
}
MENDS = {
    "corners": "config.data.shifted=True",
    "oversampled": "config.data.image_size=64,64 and config.data.resize=image",
}


def doubts(path: Path, kspace: np.ndarray, storage: Storage = NATIVE) -> list[str]:
    hdf5.write(path, {"kspace": kspace})
    volumes, faults, found = check.check([str(path)], storage)
    assert (len(volumes), faults) == (1, [])
    return found


@pytest.mark.parametrize("name", GOOD)
def test_good_files_raise_no_doubt(tmp_path: Path, name: str) -> None:
    assert doubts(tmp_path / "a.t5", GOOD[name]) == []


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_doubt_names_the_field_that_removes_it(tmp_path: Path, name: str) -> None:
    kspace, storage = DOUBTFUL[name]
    (found,) = doubts(tmp_path / "a.t5", kspace)
    assert found.startswith(f"{tmp_path}/a.t5: `kspace` ")
    assert found.endswith(MENDS.get(name, f"config.data.axes={storage.axes}"))
    if storage != NATIVE:
        assert doubts(tmp_path / "a.t5", kspace, storage) == []
    volume = readers.describe(str(tmp_path / "a.t5"))
    assert (plausibility.find_doubts(volume, (64, 64)) == []) == (name == "oversampled")


def test_a_folder_of_every_kind_gives_a_table_doubts_and_faults(tmp_path: Path, capsys) -> None:
    for name, kspace in (GOOD | {name: kspace for name, (kspace, _) in DOUBTFUL.items()}).items():
        hdf5.write(tmp_path / f"{name}.h5", {"kspace": kspace})
    holes = KSPACE.copy()
    holes[2] = 0
    hdf5.write(tmp_path / "hole.h5", {"kspace": holes})
    hdf5.write(tmp_path / "padding.h5", {"kspace": KSPACE}, {"padding_left": 4, "padding_right": 60})
    hdf5.write(tmp_path / "masked.h5", {"kspace": KSPACE, "mask": np.arange(64) % 4 == 0})
    hdf5.write(tmp_path / "kspace" / "a.h5", {"kspace": KSPACE})
    hdf5.write(tmp_path / "image" / "a.h5", {"reconstruction_rss": rss(IMAGES)})
    hdf5.write(tmp_path / "other_names.h5", {"ksp": KSPACE})
    hdf5.write(tmp_path / "one_image.h5", {"input": rss(IMAGES)[0], "target": rss(IMAGES)[0]})
    write_pair(tmp_path / "pair.t5")
    write_matlab(tmp_path / "matlab.mat", {"kspace": KSPACE})
    (tmp_path / "old.mat").write_text("MATLAB 5.0 MAT-file" * 100)
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file["dataset/data"] = np.zeros(3, [("head", "u2"), ("data", "f4")])
        file["dataset/xml"] = "<ismrmrdHeader/>"
    assert check.main(["check", str(tmp_path)]) == 1
    printed = capsys.readouterr().out.replace(f"{tmp_path}/", "")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in printed.splitlines()}
    for name in ("native", "pairs", "compound", "hole", "padding"):
        assert rows[f"{name}.h5"].startswith("kspace 4 x 64 x 64 complex64")
    assert rows["kspace/a.h5"].startswith("kspace 4 x 64 x 64 complex64 unknown 8 target")
    assert rows["matlab.mat"].startswith("kspace 4 x 64 x 64 complex64")
    assert rows["masked.h5"].startswith("kspace, undersampled 4 x 64 x 64")
    assert rows["one_image.h5"].startswith("paired 64 x 64 float32 unknown 1 target")
    lines = [line.split(":")[0] for line in printed.splitlines() if line.startswith(("WARNING", "FAULT"))]
    assert lines == [f"WARNING  {name}.h5" for name in sorted([*DOUBTFUL, "hole"])] + [
        "FAULT  old.mat",
        "FAULT  other_names.h5",
        "FAULT  raw.h5",
    ]


def test_one_doubt_about_several_files_is_one_line_and_goes_with_the_field(tmp_path: Path, capsys) -> None:
    for name in "abc":
        hdf5.write(tmp_path / f"{name}.h5", {"kspace": OVERSAMPLED})
    config = configs.defaults()
    for size, lines in (((), 1), ((64, 64), 0)):
        config.data.image_size = size
        assert check.main(["check", str(tmp_path)], config) == 0
        found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
        assert len(found) == lines
        assert all(f"{tmp_path}/a.h5" in line and line.endswith("(and 2 more files)") for line in found)


def test_a_run_that_a_doubt_explains_stops_with_it(tmp_path: Path) -> None:
    hdf5.write(tmp_path / "a.t5", {"kspace": without_shift(KSPACE), "target": rss(IMAGES)})
    with pytest.raises(UserError, match=r"not an image of `kspace`.*set config\.data\.shifted=True"):
        describe(tmp_path)
    assert len(describe(tmp_path, **{"data.shifted": True})) == 1


@pytest.mark.parametrize(("spacing", "word"), [(2, "accelerated 2.0x"), (4, ""), (8, "accelerated 8.0x")])
def test_another_acceleration_than_the_networks_is_said_in_a_line(tmp_path: Path, spacing: int, word: str) -> None:
    hdf5.write(tmp_path / "a.t5", {"kspace": KSPACE, "mask": (np.arange(64) + 1) % spacing == 0})
    said = plausibility.find_doubt_of_acceleration(readers.describe(str(tmp_path / "a.t5")), (4.0,))
    assert word in said
    assert bool(said) == bool(word)


def test_check_takes_the_fields_that_the_doubts_name(tmp_path: Path, capsys) -> None:
    hdf5.write(tmp_path / "a.t5", {"scan/ksp": KSPACE.transpose(2, 3, 1, 0)})
    config = configs.defaults()
    config.data.names.kspace, config.data.axes = "scan/ksp", MATLAB
    assert splits.storage_of(config.data) == Storage(kspace="scan/ksp", axes=MATLAB)
    assert check.main(["check", str(tmp_path)], config) == 0
    assert "4 x 64 x 64" in capsys.readouterr().out
