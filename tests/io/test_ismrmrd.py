"""Raw files of ISMRMRD become the k-space that was measured, in its place, and nothing else."""

import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from conftest import ROOT, coil_images, read_example, to_kspace, write_volume
from raw_files import make_header, make_lines, make_readout, write_raw, write_scan
from test_loader import describe

from mrjax import check
from mrjax.config import defaults
from mrjax.data import checks
from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.inference import Inference
from mrjax.io import readers
from mrjax.io.ismrmrd import IsmrmrdReader

HEIGHT, WIDTH = 16, 12
KSPACE = to_kspace(coil_images(3, 2, HEIGHT, WIDTH))
ONE = KSPACE[0]
REAL = ROOT.parent / "shared" / "data" / "ismrmrd_brain_simulated.h5"


def read(path: Path | str) -> np.ndarray:
    volume = readers.describe(str(path))
    kspace = readers.read_slices(str(path), "kspace", volume.slices)
    assert kspace.shape == volume.shape
    assert kspace.dtype == volume.dtype == "complex64"
    return kspace


def transform(x: np.ndarray, axis: int, inverse: bool = False) -> np.ndarray:
    function = np.fft.ifft if inverse else np.fft.fft
    return np.fft.fftshift(function(np.fft.ifftshift(x, axis), axis=axis, norm="ortho"), axis)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_interleaved_slices_come_back_exactly_in_the_order_of_their_positions(tmp_path: Path, one_by_one: bool) -> None:
    readouts = []
    for number, z in enumerate((1, 0, 2)):  # slice 0 of the file is the middle one
        readouts += make_lines(KSPACE[z], slice=number, position=(0, 0, 5.0 * z - 5), segment=number)
    path = write_raw(tmp_path / "scan.h5", make_header((HEIGHT, WIDTH, 1)), readouts[::-1], one_by_one=one_by_one)
    volume = readers.describe(str(path))
    assert (volume.layout, volume.undersampled, volume.target, volume.contrast) == ("kspace", False, None, "T1 tse")
    assert np.array_equal(read(path), KSPACE)


def test_averages_become_their_mean_and_contrasts_and_repetitions_further_stacks(tmp_path: Path) -> None:
    readouts = []
    for repetition in range(2):
        for contrast in range(2):
            for average in (0, 2):
                scale = 1 + contrast + 10 * repetition + average
                fields = {"repetition": repetition, "contrast": contrast, "average": average}
                readouts += make_lines(scale * KSPACE[0], **fields)
                readouts += make_lines(scale * KSPACE[1], slice=1, position=(0, 0, 9), **fields)
    path = write_raw(tmp_path / "scan.h5", make_header((HEIGHT, WIDTH, 1)), readouts)
    expected = np.concatenate([scale * KSPACE[:2] for scale in (2, 3, 12, 13)])
    assert np.allclose(read(path), expected, rtol=1e-6)


def test_oversampled_readouts_are_cropped_in_image_space(tmp_path: Path) -> None:
    header = make_header((2 * HEIGHT, WIDTH, 1), oversampling=2)
    wide = to_kspace(np.pad(coil_images(1, 2, HEIGHT, WIDTH), [(0, 0), (0, 0), (8, 8), (0, 0)]))[0]
    # An object inside the field of view loses nothing.
    assert np.allclose(read(write_raw(tmp_path / "a.h5", header, make_lines(wide))), KSPACE[:1], atol=1e-6)
    # A partial echo: its first 10 of 32 samples are missing, so are the first 5 of 16 rows.
    partial = [make_readout(wide[:, 10:, line], line=line, center_sample=6) for line in range(WIDTH)]
    path = write_raw(tmp_path / "b.h5", header, partial)
    zero_filled = np.where(np.arange(32)[:, None] < 10, 0, wide)
    expected = transform(transform(zero_filled, 1, inverse=True)[:, 8:24], 1)
    expected[:, :5] = 0
    assert np.allclose(read(path)[0], expected, atol=1e-6)
    assert np.abs(expected[:, 5]).max() > 0
    assert readers.describe(str(path)).undersampled


@pytest.mark.parametrize("lines", [range(4, 12), [0, 2, 4, 5, 6, 7, 8, 10]])
def test_lines_left_out_are_zero_and_masked(tmp_path: Path, lines) -> None:
    path = write_raw(tmp_path / "scan.h5", make_header((HEIGHT, WIDTH, 1)), make_lines(ONE, lines))
    volume, expected = readers.describe(str(path)), np.zeros_like(ONE)
    expected[..., lines] = ONE[..., lines]
    assert np.array_equal(read(path)[0], expected)
    assert volume.undersampled
    assert volume.stored_mask is not None
    assert np.array_equal(volume.stored_mask, np.isin(np.arange(WIDTH), lines)[None, None])


def test_lines_and_samples_are_placed_by_the_centres_of_headers(tmp_path: Path) -> None:
    """Eight of twelve lines about the centre, numbered from 0, with their echo at sample 5."""
    readouts = [make_readout(ONE[:, 3:14, 2 + line], line=line, center_sample=5) for line in range(8)]
    path = write_raw(tmp_path / "scan.h5", make_header((HEIGHT, WIDTH, 1), centres=(4, 0)), readouts)
    expected = np.zeros_like(ONE)
    expected[:, 3:14, 2:10] = ONE[:, 3:14, 2:10]
    assert np.array_equal(read(path)[0], expected)
    volume = checks.check(readers.describe(str(path)))[0]
    assert (volume.undersampled, volume.stored_mask) == (False, None)  # padded by the scanner


def test_centres_that_were_left_0_are_no_centres(tmp_path: Path) -> None:
    header = make_header((HEIGHT, WIDTH, 1), centres=(0, 0))
    assert np.array_equal(read(write_raw(tmp_path / "scan.h5", header, make_lines(ONE, center_sample=0)))[0], ONE)


def test_reversed_readouts_are_turned_round_and_discarded_samples_left_out(tmp_path: Path) -> None:
    junk = np.pad(ONE, [(0, 0), (2, 1), (0, 0)], constant_values=99)
    readouts = [make_readout(junk[:, :, line], line=line, center_sample=10) for line in range(0, WIDTH, 2)]
    for readout in readouts:
        readout.discard_pre, readout.discard_post = 2, 1
    for line in range(1, WIDTH, 2):
        fields = {"discard_pre": 1, "discard_post": 2, "center_sample": 10, "line": line}
        readouts.append(make_readout(junk[:, ::-1, line], [ismrmrd.ACQ_IS_REVERSE], **fields))
    assert np.array_equal(read(write_raw(tmp_path / "a.h5", make_header((HEIGHT, WIDTH, 1)), readouts))[0], ONE)


def test_readouts_that_are_of_no_image_are_left_out(tmp_path: Path) -> None:
    names = ("NAVIGATION_DATA", "PHASECORR_DATA", "HPFEEDBACK_DATA", "DUMMYSCAN_DATA", "RTFEEDBACK_DATA")
    names += ("SURFACECOILCORRECTIONSCAN_DATA", "PHASE_STABILIZATION_REFERENCE", "PHASE_STABILIZATION")
    flags = [getattr(ismrmrd, f"ACQ_IS_{name}") for name in names]
    readouts = [make_readout(np.full((5, 99), 7), [flag], line=500) for flag in flags]
    path = write_raw(tmp_path / "scan.h5", make_header((HEIGHT, WIDTH, 1)), readouts + make_lines(ONE))
    assert np.array_equal(read(path)[0], ONE)
    path = write_raw(tmp_path / "none.h5", make_header((HEIGHT, WIDTH, 1)), readouts)
    with pytest.raises(UserError, match="none of its 8 readouts is of an image"):
        readers.describe(str(path))


@pytest.mark.parametrize("mode", ["embedded", "separate"])
def test_calibration_lines_count_unless_they_are_of_another_image(tmp_path: Path, mode: str, caplog) -> None:
    header = make_header((HEIGHT, WIDTH, 1), calibration=mode)
    readouts = make_lines(ONE, range(0, WIDTH, 2))
    readouts += make_lines(ONE * (1 if mode == "embedded" else 50), [5, 7], flags=[ismrmrd.ACQ_IS_PARALLEL_CALIBRATION])
    path = write_raw(tmp_path / "scan.h5", header, readouts)
    lines = [*range(0, WIDTH, 2)] + [5, 7] * (mode == "embedded")
    expected = np.where(np.isin(np.arange(WIDTH), lines), ONE, 0)
    assert np.array_equal(read(path)[0], expected)
    assert ("2 calibration readouts of another image are left out" in caplog.text) == (mode == "separate")


def test_noise_readouts_make_the_noise_white_at_the_bandwidth_of_the_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mixing = np.array([[3, 0], [1 + 2j, 0.5]])

    def noise(*shape: int) -> np.ndarray:  # sigma 1
        return mixing @ (rng.normal(size=(2, *shape)) + 1j * rng.normal(size=(2, *shape))).reshape(2, -1)

    # Measured at a quarter of the image's bandwidth, through a filter that passes half of that: an eighth of the power.
    measured, scan = noise(4000), np.sqrt(8) * noise(16, 12).reshape(2, 16, 12)
    readouts = [make_readout(measured, [ismrmrd.ACQ_IS_NOISE_MEASUREMENT], sample_time_us=20.0, encoding_space_ref=9)]
    path = write_raw(tmp_path / "scan.h5", make_header((16, 12, 1)), readouts + make_lines(scan))
    white = read(path)[0].reshape(2, -1)
    covariance = white @ white.conj().T / white.shape[1]
    assert np.allclose(covariance, 2 * np.eye(2), atol=0.5)  # of 192 samples
    factor = np.linalg.cholesky(measured @ measured.conj().T / 4000)
    expected = np.sqrt(2 * 5 / 20 * 0.5) * np.linalg.inv(factor) @ scan.reshape(2, -1)
    assert np.allclose(white, expected, rtol=1e-4, atol=1e-5)


def test_noise_that_cannot_be_used_is_said(tmp_path: Path, caplog) -> None:
    for name, data in {"coils": np.ones((3, 8)), "singular": np.ones((2, 8))}.items():
        noise = make_readout(data, [ismrmrd.ACQ_IS_NOISE_MEASUREMENT])
        path = write_raw(tmp_path / f"{name}.h5", make_header((HEIGHT, WIDTH, 1)), [noise, *make_lines(ONE)])
        assert np.array_equal(read(path)[0], ONE)
    assert "do not have the 2 coils" in caplog.text
    assert "singular" in caplog.text


@pytest.mark.parametrize("memory", [0, 2**40])
def test_the_second_phase_encoding_becomes_slices_if_it_is_complete(tmp_path: Path, monkeypatch, memory: int) -> None:
    """One slice at a time, or all of a slab together."""
    monkeypatch.setattr("mrjax.io.ismrmrd.available_memory", lambda: memory)
    volume = to_kspace(coil_images(4, 2, HEIGHT, WIDTH))
    partitions = transform(volume, 0)
    header, lines = make_header((HEIGHT, WIDTH, 4)), [0, 2, 4, 5, 6, 7, 8, 10]
    readouts = [line for z in range(4) for line in make_lines(partitions[z], lines, partition=z)]
    path = write_raw(tmp_path / "a.h5", header, readouts)
    assert np.allclose(read(path), np.where(np.isin(np.arange(WIDTH), lines), volume, 0), atol=1e-6)
    assert readers.describe(str(path)).undersampled
    with pytest.raises(UserError, match=r"b\.h5: lacks lines of the second phase encoding"):
        readers.describe(str(write_raw(tmp_path / "b.h5", header, readouts[1:])))


@pytest.mark.parametrize("vendor", ["Someone", "SIEMENS"])
def test_the_affine_leads_from_pixels_to_millimetres(tmp_path: Path, vendor: str) -> None:
    """An oblique stack; the middle pixel is at the position of its slice, whose coordinates point left and back."""
    directions = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    names = ("read_dir", "phase_dir", "slice_dir")
    fields = {name: tuple(map(float, direction)) for name, direction in zip(names, directions, strict=True)}
    positions = np.array([10.0, -20, 30]) + 7 * np.arange(3)[:, None] * directions[2]
    readouts = []
    for z in (2, 0, 1):
        readouts += make_lines(np.zeros((1, HEIGHT, WIDTH)), slice=z, **fields | {"position": tuple(positions[z])})
    path = write_raw(tmp_path / "scan.h5", make_header((HEIGHT, WIDTH, 1), vendor=vendor), readouts)
    affine, sign = readers.describe(str(path)).affine, -1 if vendor == "SIEMENS" else 1
    for column, row, z in [(6, 8, 0), (6, 8, 2), (0, 8, 1), (6, 0, 1)]:
        expected = positions[z] + sign * (1.5 * (column - 6) * directions[1] + 2 * (row - 8) * directions[0])
        assert np.allclose(affine @ [column, row, z, 1], [*expected * (-1, -1, 1), 1], atol=1e-3)


def test_the_affine_of_a_slab_has_the_position_in_its_middle(tmp_path: Path) -> None:
    readouts = [line for z in range(4) for line in make_lines(ONE, partition=z, position=(1.0, 2.0, 3.0))]
    affine = readers.describe(str(write_raw(tmp_path / "a.h5", make_header((HEIGHT, WIDTH, 4)), readouts))).affine
    assert np.allclose(affine @ [6, 8, 2, 1], [-1, -2, 3, 1])
    assert np.allclose(affine @ [6, 8, 3, 1], [-1, -2, 7, 1])
    readouts = make_lines(ONE, read_dir=(0.0, 0.0, 0.0))
    assert readers.describe(str(write_raw(tmp_path / "b.h5", make_header((HEIGHT, WIDTH, 1)), readouts))).affine is None


@pytest.mark.parametrize(
    ("header", "readouts", "message"),
    [
        ({"trajectory": "radial"}, {}, "its trajectory is radial, expected cartesian"),
        ({"trajectory": "epi"}, {}, "its trajectory is epi, expected cartesian"),
        ({"matrix": (HEIGHT, 11, 1)}, {}, "its kspace_encode_step_1 0 to 11 have their centre at 5"),
        (
            {"matrix": (15, WIDTH, 1)},
            {},
            "its samples 0 to 15 have their centre at 8, expected places in a matrix",
        ),
        ({"centres": (2, 0)}, {}, "its kspace_encode_step_1 0 to 11 have their centre at 2, expected places"),
        ({}, {"encoding_space_ref": 1}, "its header has 1 encodings, expected encoding 1"),
        ({}, {"discard_pre": 16}, "its readouts discard all of their samples"),
    ],
)
def test_what_is_no_cartesian_scan_is_one_sentence(tmp_path: Path, header, readouts, message: str) -> None:
    header = {"matrix": (HEIGHT, WIDTH, 1)} | header
    path = write_raw(tmp_path / "scan.h5", make_header(**header), make_lines(ONE, **readouts))
    with pytest.raises(UserError, match=f"scan.h5: {message}"):
        readers.describe(str(path))


def test_claims_beyond_the_file_are_one_sentence(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.h5", make_header((65535, 65535, 1)), make_lines(ONE))
    with pytest.raises(UserError, match="claims 68,717,379,600 bytes a slice"):
        readers.describe(str(path))
    path = write_raw(tmp_path / "b.h5", make_header((HEIGHT, WIDTH, 1)), make_lines(ONE))
    with h5py.File(path, "a") as file:
        head = file["dataset/data"][3]
        head["head"]["number_of_samples"] = 400
        file["dataset/data"][3] = head
    with pytest.raises(UserError, match="readout 3 holds 64 numbers, expected 1600"):
        readers.describe(str(path))
    with h5py.File(path, "a") as file:
        file.copy("dataset", "again")
    with pytest.raises(UserError, match=r"2 groups \(.*\), expected one measurement a file"):
        readers.describe(str(path))


def test_a_reader_is_pickled_read_by_threads_and_notices_a_file_that_changed(tmp_path: Path) -> None:
    path = str(write_scan(tmp_path / "scan.h5", KSPACE))
    reader = IsmrmrdReader()
    reader.describe(path)
    reader = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: reader.read_slice(path, "kspace", i % 3), range(24)))
    assert np.array_equal(found, np.concatenate([KSPACE] * 8))
    out = np.empty(KSPACE.shape[1:], np.complex64)
    assert reader.read_slice(path, "kspace", 1, out) is out
    write_scan(tmp_path / "scan.h5", KSPACE[:1])
    with pytest.raises(UserError, match="slice 0 of `kspace` cannot be read"):
        reader.read_slice(path, "kspace", 0)
    assert reader.describe(path).slices == 1


def test_raw_files_are_named_by_check_and_give_the_examples_of_hdf5(tmp_path: Path, capsys) -> None:
    write_scan(tmp_path / "raw" / "a.h5", KSPACE)
    write_volume(tmp_path / "t5" / "a.t5", {"kspace": KSPACE})
    volumes = [describe(tmp_path / name) for name in ("raw", "t5")]
    examples = [read_example(SliceDataset(volume, (HEIGHT, WIDTH)), 1) for volume in volumes]
    assert all(np.array_equal(examples[0][name], examples[1][name]) for name in examples[1])
    write_raw(tmp_path / "raw" / "b.h5", make_header((HEIGHT, WIDTH, 1)), make_lines(ONE, range(0, WIDTH, 2)))
    assert check.main(["check", str(tmp_path / "raw")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1][1:6] == ["kspace", "2", "x", "16", "x"]
    assert rows[2][1:3] == ["kspace,", "undersampled"]


@pytest.mark.slow
def test_raw_files_are_reconstructed_as_hdf5_is(tmp_path: Path) -> None:
    write_scan(tmp_path / "raw.h5", KSPACE)
    write_volume(tmp_path / "t5.t5", {"kspace": KSPACE})
    volumes = [readers.describe(str(tmp_path / name)) for name in ("raw.h5", "t5.t5")]
    volumes = [dataclasses.replace(volume, undersampled=True) for volume in volumes]
    method = Inference.from_method("zero_filled", defaults())
    raw, t5 = (method.reconstruct(volume)["reconstruction"] for volume in volumes)
    assert np.array_equal(raw, t5)


@pytest.mark.skipif(not REAL.exists(), reason="needs the measurements beside the checkout")
def test_a_file_of_a_simulator_is_that_of_its_readouts() -> None:
    """Its header lacks what the package ismrmrd demands."""
    with h5py.File(REAL) as file:
        readouts = file["dataset/data"].fields("data")[()]
    expected = np.stack([readout.view(np.complex64) for readout in readouts], 1)
    assert np.array_equal(read(REAL)[0, 0], expected)
