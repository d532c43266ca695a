"""fastMRI's weights in and out: the same function at any width and depth, and no code in a file is ever run."""

import collections
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import coil_images, rss, run_command, to_kspace

from mrjax import export_fastmri
from mrjax.checkpoint.run import claim
from mrjax.errors import UserError
from mrjax.import_fastmri import import_weights, make_config
from mrjax.inference import Inference
from mrjax.interop import weight_files
from mrjax.interop.fastmri import from_fastmri, to_fastmri
from mrjax.models import MODELS
from mrjax.mri.fourier import centred_ifft2_host

UNET = {"channels": 3, "levels": 3}
VARNET = {"channels": 3, "levels": 2, "sens_channels": 2, "sens_levels": 1, "cascades": 2}


def _state_dict(name: str, fields: dict[str, int]) -> dict[str, np.ndarray]:
    """Random weights of that network, under fastMRI's names."""
    model = MODELS[name](**fields)
    blank = {"image": np.zeros((1, 32, 32, 1), np.float32), "kspace": np.zeros((1, 1, 32, 32), np.complex64)}
    blank |= {"mask": np.ones((1, 1, 32), bool), "offset": np.zeros((1, 1, 1), np.float32)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), *(blank[name] for name in model.input_names))["params"]
    rng = np.random.default_rng(0)
    return to_fastmri(name, fields, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes))


def _peer(name: str, fields: dict[str, int]):
    """Make the same network of fastMRI's, with the same weights in every run."""
    import torch
    from fastmri import models

    torch.manual_seed(0)
    sizes = {"chans": fields["channels"]}
    if name == "unet":
        return models.Unet(1, 1, **sizes, num_pool_layers=fields["levels"])
    sizes |= {"pools": fields["levels"], "sens_chans": fields["sens_channels"], "sens_pools": fields["sens_levels"]}
    return models.VarNet(num_cascades=fields["cascades"], **sizes)


@pytest.mark.parametrize(("name", "fields"), [("unet", UNET), ("varnet", VARNET)])
def test_round_trip_through_every_format(name: str, fields: dict[str, int], tmp_path: Path) -> None:
    weights = _state_dict(name, fields)
    for ending in ("npz", "safetensors"):
        file = str(tmp_path / f"weights.{ending}")
        weight_files.write(file, weights)
        network = from_fastmri(weight_files.read(file))
        assert (network.name, network.fields) == (name, fields)
        again = to_fastmri(name, fields, network.params)
        assert again.keys() == weights.keys()
        for key, value in weights.items():
            np.testing.assert_array_equal(again[key], value)


@pytest.mark.peer
@pytest.mark.parametrize(("name", "fields"), [("unet", UNET), ("varnet", VARNET)])
def test_fastmri_loads_what_is_exported_strictly(name: str, fields: dict[str, int], tmp_path: Path) -> None:
    import torch

    peer, weights = _peer(name, fields), _state_dict(name, fields)
    file = tmp_path / "weights.pt"
    weight_files.write(str(file), weights)
    peer.load_state_dict(torch.load(file, weights_only=True), strict=True)
    read = weight_files.read(str(file))
    for key, value in peer.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[key])
        np.testing.assert_array_equal(read[key], weights[key])


@pytest.mark.peer
@pytest.mark.parametrize("prefix", ["module.", "unet.", "varnet.model."])
def test_checkpoints_of_lightning_are_read(prefix: str, tmp_path: Path) -> None:
    """Prefixed names, buffers of the loss, parameters, views, half precision, and objects of classes of its own."""
    import torch

    weights = _state_dict("unet", UNET)
    tensors = {f"{prefix}{name}": torch.from_numpy(value) for name, value in weights.items()}
    first, second, *_ = (name for name, tensor in tensors.items() if tensor.ndim == 4)
    tensors[first] = torch.nn.Parameter(tensors[first])
    tensors[second] = tensors[second].transpose(0, 1).contiguous().transpose(0, 1)
    tensors["loss.w"] = torch.ones(1, 1, 7, 7, dtype=torch.bfloat16)
    extra = {"hyper_parameters": collections.Counter(a=1), "path": Path("x"), "epoch": 3}
    torch.save({"state_dict": tensors, **extra}, tmp_path / "last.ckpt")
    network = from_fastmri(weight_files.read(str(tmp_path / "last.ckpt")))
    again = to_fastmri("unet", network.fields, network.params)
    for key, value in weights.items():
        np.testing.assert_array_equal(again[key], value)


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    def expect(weights: dict[str, np.ndarray], match: str, ending: str = "npz") -> None:
        file = tmp_path / f"weights.{ending}"
        weight_files.write(str(file), weights)
        with pytest.raises(UserError, match=match) as caught:
            import_weights(str(file), str(tmp_path / "run"), (320, 320))
        assert str(file) in str(caught.value)
        assert not (tmp_path / "run").exists()

    unet, varnet = _state_dict("unet", UNET), _state_dict("varnet", VARNET)
    expect({"encoder.weight": np.ones(3)}, "neither fastMRI's U-Net nor its VarNet: its names are encoder.weight")
    expect({k: v for k, v in unet.items() if "conv.layers.4" not in k}, r"lacks conv\.layers\.4\.weight")
    expect({k: v for k, v in varnet.items() if "sens_net" not in k}, r"neither|lacks|also holds")
    expect(unet | {"loss.w": np.ones(1)}, r"also holds loss\.w")
    expect(unet | {"conv.layers.0.weight": np.ones((3, 3))}, r"conv\.layers\.0\.weight .* expected")
    two = np.concatenate([unet["down_sample_layers.0.layers.0.weight"]] * 2, 1)
    expect(
        unet | {"down_sample_layers.0.layers.0.weight": two}, r"down_sample_layers\.0\.layers\.0\.weight .* expected"
    )
    with pytest.raises(UserError, match=r"image_size is \(8, 320\), expected at least 16"):
        make_config(from_fastmri(unet), (8, 320))
    with pytest.raises(UserError, match="expected an empty or new folder"):
        import_weights(str(tmp_path / "weights.npz"), str(tmp_path), (320, 320))


def test_a_file_becomes_a_workdir(tmp_path: Path) -> None:
    """With what reconstruction needs; training may choose all that is not the network's, and nothing that is."""
    weights, workdir = _state_dict("unet", UNET), str(tmp_path / "run")
    weight_files.write(str(tmp_path / "weights.npz"), weights)
    import_weights(str(tmp_path / "weights.npz"), workdir, (40, 48))
    inference = Inference.restore(workdir)
    assert (inference.config.model.pool, inference.config.normalise) == ("avg", "standard")
    assert tuple(inference.config.data.image_size) == (40, 48)
    for key, value in to_fastmri("unet", UNET, jax.device_get(inference.params)).items():
        np.testing.assert_array_equal(value, weights[key])

    config = inference.config.copy_and_resolve_references()
    config.learning_rate, config.optimizer, config.data.image_size = 1e-4, "adamw", (32, 32)
    claim(workdir, config)
    config.model.channels, config.normalise = 4, "slice"
    with pytest.raises(UserError, match=r"model\.channels was 3 and is 4.*|normalise was 'standard' and is 'slice'"):
        claim(workdir, config)


@pytest.mark.peer
@pytest.mark.parametrize(("name", "fields"), [("unet", UNET), ("varnet", VARNET)])
def test_a_workdir_reconstructs_as_pytorch_does(name: str, fields: dict[str, int], tmp_path: Path) -> None:
    """From undersampled k-space of odd size to an image in its units, each slice normalised as fastMRI does."""
    import torch
    from fastmri.data import transforms

    peer = _peer(name, fields)
    torch.save(peer.state_dict(), tmp_path / "weights.pt")
    import_weights(str(tmp_path / "weights.pt"), str(tmp_path / "run"), (33, 38))
    inference = Inference.restore(str(tmp_path / "run"), data_consistency=False)
    kspace = 1e-3 * to_kspace(coil_images(8, 2, 33, 38))
    kspace[..., 1:14:2] = kspace[..., 25::2] = 0
    numbers = np.arange(8, dtype=np.uint32)
    batch = {"kspace": kspace, "name": numbers, "slice": numbers, "maximum": np.ones(8, np.float32)}
    images, _ = inference.predict_measured(inference.params, batch)

    if name == "varnet":
        mask = torch.from_numpy((kspace != 0).any((0, 1, 2))).expand(8, -1)[:, None, None, :, None]
        expected = peer(torch.view_as_real(torch.from_numpy(kspace)), mask)
    else:
        zero_filled = torch.from_numpy(rss(centred_ifft2_host(kspace)))
        normal = [transforms.normalize_instance(image, eps=1e-11) for image in zero_filled]
        expected = torch.stack([peer(image[None, None])[0, 0] * std + mean for image, mean, std in normal])
    expected = expected.detach().numpy()
    assert np.abs(images["reconstruction"] - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(images["corrupted"] - expected).max() > 0.01 * np.abs(expected).max()


def test_what_fastmri_lacks_is_not_exported() -> None:
    config = make_config(from_fastmri(_state_dict("unet", UNET)), (32, 32))
    export_fastmri.require_fastmri_network(config)
    for field, value in (("pool", "max"), ("residual", True), ("name", "unet_dc")):
        changed = config.copy_and_resolve_references()
        changed.model[field] = value
        with pytest.raises(UserError, match=rf"config\.model\.{field} of the run is {value!r}"):
            export_fastmri.require_fastmri_network(changed)


@pytest.mark.slow
def test_commands_from_a_file_to_a_trained_run_and_back(scans: Path, tmp_path: Path, small_config: Path) -> None:
    def run(module: str, *flags: str) -> str:
        done = run_command(module, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    smallest = {"channels": 2, "levels": 1, "sens_channels": 2, "sens_levels": 1, "cascades": 1}
    weights, workdir = _state_dict("varnet", smallest), f"--workdir={tmp_path / 'run'}"
    weight_files.write(str(tmp_path / "varnet.safetensors"), weights)
    said = run(
        "import_fastmri", str(tmp_path / "varnet.safetensors"), f"--output={tmp_path / 'run'}", "--image_size=32,32"
    )
    assert "SSIM" in run("reconstruct", workdir, f"--input={scans / 'test'}", f"--output={tmp_path / 'out'}")
    assert (tmp_path / "out" / "9_FLAIR01.t5").exists()
    fields = [word for word in said.split() if word.startswith("--config.")]
    steps = ["--config.steps=1", "--config.ema=0.9", "--config.learning_rate=1e-9", "--config.optimizer=adamw"]
    run("main", f"--config={small_config}", workdir, f"--config.data.dir={scans}", *fields, *steps)
    run("export_fastmri", workdir, f"--output={tmp_path / 'trained.npz'}")
    for key, value in weight_files.read(str(tmp_path / "trained.npz")).items():
        np.testing.assert_allclose(value, weights[key], rtol=1e-4, atol=1e-6)
