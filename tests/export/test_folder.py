"""A model handed on: the folder, its programs in processes without mrjax, and the way back."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import coil_images, one_device_flags, rss, run_command, to_kspace

from mrjax import load
from mrjax.checkpoint.run import claim
from mrjax.config import defaults
from mrjax.errors import UserError
from mrjax.export import card, stablehlo
from mrjax.inference import Inference
from mrjax.measures.metrics import METRICS

SIZE, COILS = (32, 40), 2


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a U-Net for k-space."""
    path = tmp_path_factory.mktemp("exported") / "model"
    load(trained).export(path, SIZE, COILS)
    return path


def load_with(exported: Path, path: Path, **fields: object) -> Inference:
    """Load the same parameters by a config with other fields."""
    config = load(exported).config.copy_and_resolve_references()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    path.mkdir(parents=True)
    shutil.copy(exported / "model.safetensors", path)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return load(path)


@pytest.fixture(scope="module")
def for_images(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same U-Net for the task 'paired'."""
    path = tmp_path_factory.mktemp("exported")
    load_with(exported, path / "weights", task="paired").export(path / "images", SIZE)
    return path / "images"


def run_alone(folder: Path, arrays: dict[Path, dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Run StableHLO programs in a process that can import neither mrjax nor its other dependencies."""
    for number, (program, inputs) in enumerate(arrays.items()):
        (folder / f"program_{number}").write_bytes((program / "model.stablehlo").read_bytes())
        np.savez(folder / f"inputs_{number}.npz", **inputs)
    code = f"""
        import sys
        for name in ("mrjax", "flax", "orbax", "optax", "ml_collections", "grain", "h5py", "absl", "safetensors"):
            sys.modules[name] = None
        import numpy as np
        from jax import export
        for number in range({len(arrays)}):
            program = export.deserialize(open(f"program_{{number}}", "rb").read())
            np.save(f"image_{{number}}.npy", program.call(*np.load(f"inputs_{{number}}.npz").values()))
    """
    environment = os.environ | {"XLA_FLAGS": one_device_flags(), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment, cwd=folder)
    return [np.load(folder / f"image_{number}.npy") for number in range(len(arrays))]


def scan() -> tuple[np.ndarray, np.ndarray]:
    """Noisy k-space of three slices, and a mask of every other column and a centre."""
    rng, shape = np.random.default_rng(0), (3, COILS, *SIZE)
    noise = 0.02 * (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)
    mask = np.zeros((3, *SIZE), bool)
    mask[..., ::2] = mask[..., 14:26] = True
    return to_kspace(coil_images(3, COILS, *SIZE)) + noise, mask


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to 1e-6 of the maximum in root-mean-square, and to 5e-6 in each pixel.

    On a CPU the network runs its own convolutions in C++, the program XLA's. Either is as near to the network in
    float64 as float32 allows, which is 1e-6 in single pixels.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error = np.abs(found - expected) / expected.max()
    assert np.sqrt(np.mean(error**2)) < 1e-6
    assert error.max() < 5e-6


def test_programs_run_without_mrjax_and_equal_the_network(exported, for_images, trained, tmp_path: Path) -> None:
    (kspace, mask), images = scan(), rss(coil_images(2, 1, *SIZE))
    inputs = {exported: {"kspace": kspace, "mask": mask}, for_images: {"input": images}}
    reconstructed, improved = run_alone(tmp_path, inputs)
    assert_equal(reconstructed, load(trained)(kspace, mask))
    assert_equal(improved, load(for_images)(images))
    program = json.loads((exported / "model.json").read_text())["stablehlo"]
    assert [given["shape"] for given in program["inputs"]] == [["batch", COILS, *SIZE], ["batch", *SIZE]]
    assert [given["dtype"] for given in program["inputs"]] == ["complex64", "bool"]
    assert (program["platforms"], program["outputs"][0]["shape"]) == (["cpu", "cuda", "tpu"], ["batch", *SIZE])


def test_weights_are_read_back_and_damage_is_one_sentence(exported: Path, trained: Path, tmp_path: Path) -> None:
    before, after = load(trained), load(exported)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert (after.source, after.metrics) == (before.source, before.metrics)
    assert after.config.model == before.config.model

    def damaged(**weights: np.ndarray) -> str:
        path = tmp_path / str(len(os.listdir(tmp_path)))
        path.mkdir()
        arrays = safetensors.numpy.load_file(exported / "model.safetensors") | weights
        arrays = {name: array for name, array in arrays.items() if array.size}
        safetensors.numpy.save_file(arrays, path / "model.safetensors")
        (path / "config.json").write_bytes((exported / "config.json").read_bytes())
        return str(path)

    name, shape = "head.bias", (1,)
    assert load(damaged()).config == after.config  # model.json is not needed
    for path, message in (
        (damaged(**{name: np.zeros(0, np.float32)}), rf"safetensors lacks {name}, expected the parameters of"),
        (damaged(extra=np.zeros(2)), "safetensors also holds extra, expected the parameters of"),
        (damaged(**{name: np.zeros(2, np.float32)}), rf"{name} is float32 of shape \(2,\), expected float32 of shape"),
        (damaged(**{name: np.full(shape, np.nan, np.float32)}), f"{name} holds NaN or Inf, expected finite numbers"),
    ):
        with pytest.raises(UserError, match=message):
            load(path)
    (Path(path) / "model.json").write_bytes((exported / "model.json").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors has changed, expected the file that was exported"):
        load(path)
    (Path(path) / "model.json").unlink()
    (Path(path) / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is list, expected the JSON of a config"):
        load(path)
    (Path(path) / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json, expected the files that mrjax\.export has written"):
        load(path)


def test_nothing_is_trained_into_an_exported_folder(exported: Path) -> None:
    with pytest.raises(UserError, match="holds files but no run of mrjax"):
        claim(str(exported), defaults())


def test_the_card_is_the_hubs_and_no_path_is_in_the_folder(exported: Path, trained: Path) -> None:
    text = (exported / "README.md").read_text()
    front = text.split("---\n")[1]
    for field in ("license: ", "library_name: mrjax", "tags: [", "metrics: [nmse, psnr, ssim]"):
        assert field in front
    for section in ("Intended use and limits", "Training data", "Metrics", "How to load it"):
        assert f"\n## {section}\n" in text
    assert "Not for diagnosis" in text
    data = load(trained).config.data.dir
    assert data
    assert not any(data.encode() in (exported / name).read_bytes() for name in os.listdir(exported))
    scores = {name: {"mean": 0.5, "std": 0.25} for name in METRICS}
    metrics = {"test": {"T1": {"corrupted": scores, "reconstruction": scores}}}
    described = json.loads((exported / "model.json").read_text()) | {"metrics": metrics}
    assert "| T1 | zero-filled | 0.5000 ± 0.2500 | 0.50 ± 0.25 | 0.5000 ± 0.2500 |" in card.text(described)


def test_onnx_of_a_unet_equals_the_network_at_any_size(for_images: Path) -> None:
    pytest.importorskip("onnx")
    session, network = pytest.importorskip("onnxruntime").InferenceSession(for_images / "model.onnx"), load(for_images)
    for slices, *size in ((3, 33, 50), (1, 48, 32)):
        images = rss(coil_images(slices, 1, *size))
        (found,), expected = session.run(None, {"input": images}), network(images)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"task": "paired", "normalise": "volume", "model__residual": True},
        {"normalise": "standard", "data__image_size": (24, 32)},
        {"task": "denoise", "model__residual": True, "model__pool": "avg"},
    ],
)
def test_programs_of_other_configs_equal_their_networks(exported, tmp_path: Path, fields: dict[str, object]) -> None:
    network = load_with(exported, tmp_path / "weights", **fields)
    network.export(tmp_path / "model", SIZE, COILS)
    maximum = {"maximum": np.full(3, 2, np.float32)} if network.config.normalise == "volume" else {}
    if network.config.task == "paired":
        data = {"input": rss(coil_images(3, COILS, *SIZE))}
    else:
        data = dict(zip(("kspace", "mask"), scan(), strict=True))
    (image,) = run_alone(tmp_path, {tmp_path / "model": data | maximum})
    expected = network(*data.values(), **({"maximum": 2} if maximum else {}))
    assert_equal(image, expected)


def test_a_name_on_the_hub_is_fetched_and_failure_is_one_sentence(exported: Path, monkeypatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "user/nothing":
            raise OSError("404\nno such model")
        return str(exported)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    hub.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load("user/model").config.model.channels == 4
    assert asked == [("user/model", ["model.safetensors", "config.json", "model.json"])]
    with pytest.raises(UserError, match=r"user/nothing: no such folder, nor can it be had from the hub \(404\)"):
        load("user/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub, which is not installed"):
        load("user/model")
    with pytest.raises(UserError, match="/no/such/folder: no such folder, expected the workdir of a run"):
        load("/no/such/folder")


def test_an_export_is_written_complete_or_not_at_all(exported: Path, tmp_path: Path, monkeypatch) -> None:
    network = load(exported)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UserError, match="full is there already, expected an empty or new folder"):
        network.export(tmp_path / "full", SIZE)
    with pytest.raises(UserError, match=r"config\.data\.image_size is empty: .*, expected .* --size=H,W"):
        network.export(tmp_path / "new")
    with pytest.raises(UserError, match="slices of 4x4, expected at least"):
        network.export(tmp_path / "new", (4, 4))
    with pytest.raises(UserError, match=r"--size is \(32, 40\), expected \(32, 32\), config\.data\.image_size"):
        load_with(exported, tmp_path / "of_32", task="paired", data__image_size=(32, 32)).export(tmp_path / "new", SIZE)
    monkeypatch.setattr(stablehlo, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network.export(tmp_path / "new", SIZE)
    assert sorted(os.listdir(tmp_path)) == ["full", "of_32"]


@pytest.mark.slow
def test_the_command_writes_a_folder_that_commands_take_for_a_workdir(trained, scans, tmp_path: Path) -> None:
    def run(module: str, *flags: str) -> str:
        done = run_command(module, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    model = tmp_path / "model"
    said = run("export", f"--workdir={trained}", f"--output={model}", "--size=32,32", "--coils=2")
    assert "model.stablehlo" in said
    assert "SSIM" in run(
        "reconstruct", f"--workdir={model}", f"--input={scans / 'test'}", f"--output={tmp_path / 'out'}"
    )
