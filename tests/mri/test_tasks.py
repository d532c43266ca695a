import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, read_array, rss, to_kspace, write_pair, write_repetitions, write_scan
from test_train import equal, parameters

from mrjax import train
from mrjax.data import splits
from mrjax.inference import Inference
from mrjax.io import readers
from mrjax.measures.evaluator import score_volume
from mrjax.mri import tasks
from mrjax.mri.acquire import Acquisition
from mrjax.mri.augment import Augment
from mrjax.mri.coils import magnitude

PLAIN = (Acquisition((1.0,), (0.1,), (0.0, 0.0)), Augment())
EVERY = jnp.arange(4, dtype=jnp.uint32)


def training(count: int = 4, seed: int = 0) -> tasks.Keys:
    return tasks.training_keys(seed, jnp.arange(count, dtype=jnp.uint32))


def scans(count: int, size: tuple[int, int] = (48, 40), noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """`count` repetitions of four slices, complex64 (4, count, 2, ...), and their noise-free k-space (4, 2, ...)."""
    rng = np.random.default_rng(0)
    clean = to_kspace(coil_images(4, 2, *size))
    phase = np.exp(1j * rng.uniform(-3, 3, (1, count, 1, 1, 1)))
    shape = (4, count, *clean.shape[1:])
    measured = clean[:, None] * phase + noise * (rng.normal(size=shape) + 1j * rng.normal(size=shape))
    measured[..., :3] = 0
    clean[..., :3] = 0
    return measured.astype(np.complex64), clean


def image(kspace: np.ndarray) -> np.ndarray:
    """Root-sum-of-squares in float64, by NumPy alone."""
    axes = (-2, -1)
    coils = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace.astype(complex), axes), norm="ortho"), axes)
    return np.sqrt((np.abs(coils) ** 2).sum(-3))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1])


@pytest.mark.parametrize("name", ["denoise", "noise2noise"])
@pytest.mark.parametrize("trains", [True, False])
def test_noise_of_target_and_input_is_independent(name, trains) -> None:
    measured, clean = scans(3, (96, 80))
    keys = training() if trains else tasks.evaluation_keys(EVERY, EVERY)
    example = jax.jit(tasks.TASKS[name](*PLAIN))({"kspace": measured[:, 0], "repetitions": measured[:, 1:]}, keys)
    clean_image = image(clean)
    noise, left = np.asarray(example.corrupted) - clean_image, np.asarray(example.target) - clean_image
    # Where there is signal: elsewhere the noise floor of a magnitude is common to both.
    bright = clean_image > 0.5 * clean_image.max()
    assert bright.sum() > 900
    assert abs(correlation(noise[bright], left[bright])) < 0.08
    assert (
        correlation(noise[bright], image(measured).mean(1)[bright] - clean_image[bright]) > 0.4
    )  # what a leak looks like
    ratio = left[bright].std() / noise[bright].std()
    assert ratio == pytest.approx(1 if name == "noise2noise" and trains else 2**-0.5, rel=0.1)


def test_denoise_target_is_the_mean_magnitude_of_the_other_repetitions() -> None:
    measured, _ = scans(4)
    others = measured[:, 1:].copy()
    others[1, 2] = 0  # the second study has a repetition less
    example = jax.jit(tasks.denoise(*PLAIN))({"kspace": measured[:, 0], "repetitions": others}, training())
    assert np.array_equal(example.kspace, measured[:, 0])
    assert np.array_equal(example.mask[:, 0], np.broadcast_to(np.arange(40) >= 3, (4, 40)))
    np.testing.assert_allclose(example.corrupted, image(measured[:, 0]), atol=1e-5)
    for i in range(4):
        expected = image(others[i, :2] if i == 1 else others[i]).mean(0)
        np.testing.assert_allclose(example.target[i], expected, atol=1e-5)
    # Their phases differ, so that complex images would cancel one another.
    assert image(others[0].mean(0)).sum() < 0.8 * np.asarray(example.target[0]).sum()


def test_denoise_augments_input_and_target_alike_and_can_undersample() -> None:
    measured, _ = scans(3, noise=0)
    flip = Augment(flip_p=1.0, rotation=20.0, rotation_p=1.0)
    how = Acquisition((4.0,), (0.1,), (0.0, 0.0))
    batch = {"kspace": measured[:, 0], "repetitions": measured[:, 1:]}
    moved = jax.jit(tasks.denoise(PLAIN[0], flip))(batch, training())
    np.testing.assert_allclose(moved.corrupted, moved.target, atol=0.15)  # edges ring: columns are missing again
    assert abs(np.asarray(moved.target) - image(measured[:, 0])).max() > 0.5
    fewer = jax.jit(tasks.denoise(how, Augment()))(batch, training())
    assert 0.15 < np.asarray(fewer.mask).mean() < 0.35
    np.testing.assert_allclose(fewer.target, image(measured[:, 0]), atol=1e-5)
    assert np.array_equal(fewer.kspace, np.where(np.asarray(fewer.mask)[:, None], measured[:, 0], 0))


@pytest.mark.slow
def test_noise2noise_draws_a_measured_repetition_by_the_index_in_the_stream() -> None:
    measured, _ = scans(4)
    others = measured[:, 1:].copy()
    others[1, 1] = 0
    batch = {"kspace": np.tile(measured[:, 0], (10, 1, 1, 1)), "repetitions": np.tile(others, (10, 1, 1, 1, 1))}
    make = jax.jit(tasks.TASKS["noise2noise"](*PLAIN))
    drawn = np.asarray(make(batch, training(40)).target)
    single = np.tile(np.asarray(magnitude(jnp.asarray(others))), (10, 1, 1, 1))
    found = abs(drawn[:, None] - single).max((2, 3)) < 1e-5
    assert (found.sum(1) == 1).all()
    choice = found.argmax(1).reshape(10, 4)
    assert set(choice[:, 1]) == {0, 2}
    assert all(set(choice[:, i]) == {0, 1, 2} for i in (0, 2, 3))
    assert np.array_equal(drawn, make(batch, training(40)).target)
    later = make({name: x[20:24] for name, x in batch.items()}, tasks.training_keys(0, 20 + EVERY))
    np.testing.assert_allclose(later.target, drawn[20:24], atol=1e-6)
    assert (abs(np.asarray(make(batch, training(40, seed=1)).target) - drawn).max((1, 2)) > 1e-3).any()


ROTATED = Augment(rotation=20.0, rotation_p=1.0, flip_p=0.5)


@pytest.mark.parametrize(("name", "augment"), [("kspace", ROTATED), ("denoise", Augment())])
def test_adjacent_slices_share_mask_and_augmentation_and_leave_the_slice_unchanged(name, augment) -> None:
    kspace = to_kspace(coil_images(4, 2, 32, 40))
    # The first neighbour is the slice once more; the second one's echo lies elsewhere.
    stack = np.stack([kspace, kspace, np.roll(kspace, (1, 4), (0, -1))], 1)
    others = {"repetitions": kspace[:, None]}
    make = jax.jit(tasks.TASKS[name](Acquisition((4.0,), (0.1,), (0.0, 0.0)), augment))
    alone = make({"kspace": kspace} | others, training())
    stacked = make({"kspace": stack} | others, training())
    assert alone.adjacent is None
    assert stacked.adjacent.shape == (4, 32, 40, 2)
    for one, other in zip(alone[:4], stacked[:4], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(stacked.adjacent[..., 0], alone.corrupted, atol=1e-5)
    if augment is not ROTATED:
        seen = np.where(np.asarray(alone.mask)[:, None], stack[:, 2], 0)
        np.testing.assert_allclose(stacked.adjacent[..., 1], image(seen), atol=1e-5)


def test_adjacent_slices_have_independent_noise_of_equal_level() -> None:
    clean = np.tile(to_kspace(10 * coil_images(1, 2, 64, 64)), (3, 1, 1, 1))[
        None
    ]  # a slice and itself twice, one example
    how = Acquisition((1.0,), (0.1,), (0.01, 0.01))
    example = jax.jit(tasks.kspace(how, Augment()))({"kspace": clean}, training(1))
    noise = [
        np.asarray(x) - image(clean[0, 0]) for x in (example.corrupted[0], *jnp.moveaxis(example.adjacent[0], -1, 0))
    ]
    bright = image(clean[0, 0]) > 0.5 * image(clean[0, 0]).max()
    for i, one in enumerate(noise):
        assert one[bright].std() == pytest.approx(noise[0][bright].std(), rel=0.1)
        assert all(abs(correlation(one[bright], other[bright])) < 0.1 for other in noise[:i])


def test_paired_images_and_measured_files_come_with_adjacent_slices() -> None:
    images = rss(coil_images(4, 1, 32, 40))
    stack = np.stack([images, images + 1, images + 2], 1)
    given = tasks.as_measured({"input": stack}, training())
    assert np.array_equal(given.corrupted, images)
    assert np.array_equal(given.adjacent, np.moveaxis(stack[:, 1:], 1, -1))
    pair = jax.jit(tasks.paired(PLAIN[0], ROTATED))({"input": stack, "target": images}, training())
    np.testing.assert_allclose(pair.corrupted, pair.target, atol=1e-6)
    inside = np.asarray(pair.target) > 0.1
    for k in (0, 1):
        np.testing.assert_allclose(np.asarray(pair.adjacent[..., k] - pair.target)[inside], k + 1, atol=1e-3)
    kspace = to_kspace(coil_images(4, 2, 32, 40))
    given = tasks.as_measured({"kspace": np.stack([kspace, kspace[::-1]], 1)}, training())
    np.testing.assert_allclose(given.corrupted, image(kspace), atol=1e-5)
    np.testing.assert_allclose(given.adjacent[..., 0], image(kspace[::-1]), atol=1e-5)
    assert given.mask.shape == (4, 32, 40)


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """A folder with train/, val/ and test/ of repetitions, one of which moved."""
    data = tmp_path / "data"
    write_repetitions(data / "train", "1_T1", 3, moved={3: 4}, noise=0.02)
    write_repetitions(data / "train", "2_FLAIR", 2, seed=1, noise=0.02)
    write_repetitions(data / "val", "3_T1", 3, seed=2, noise=0.02)
    write_repetitions(data / "test", "4_T1", 3, seed=3, noise=0.02)
    return data


@pytest.mark.slow
def test_denoise_end_to_end(repeated: Path, tiny, tmp_path: Path, caplog) -> None:
    fields = {"acquisition__accelerations": (1.0,), "acquisition__noise": (0.0, 0.0), "augment__flip_p": 0.5}
    fields |= {"steps": 2, "eval_every": 2, "model__levels": 1}
    workdir = tmp_path / "run"
    with caplog.at_level("INFO", "mrjax"):
        train.train(tiny(repeated, task="denoise", **fields), str(workdir))
    assert any("1_T103.h5: moved by about 4" in message for message in caplog.messages)
    assert any("training on 4 files, 12 slices" in message for message in caplog.messages)
    inference = Inference.restore(str(workdir))
    paths = [str(repeated / "test" / f"4_T10{i}.h5") for i in (1, 2, 3)]
    volume = splits.describe_split(inference.config, paths)[0]
    images = inference.reconstruct(volume)
    first, second, third = (image(read_array(path, "kspace")) for path in paths)
    np.testing.assert_allclose(images["corrupted"], first, atol=1e-5)
    np.testing.assert_allclose(images["target"], (second + third) / 2, atol=1e-5)
    alone = inference.reconstruct(readers.describe(paths[0]))
    assert set(alone) == {"corrupted", "reconstruction"}  # a scan's own image is no target
    np.testing.assert_allclose(alone["reconstruction"], images["reconstruction"], atol=1e-5)


@pytest.mark.slow
def test_repetitions_and_adjacent_slices_train_alike_from_any_cache_and_when_resumed(repeated, tiny, tmp_path) -> None:
    fields = {"task": "noise2noise", "data__adjacent_slices": 1, "schedule": "constant", "data__image_size": (32, 32)}
    fields |= {"steps": 2, "eval_every": 2, "checkpoint_every": 1, "mesh": (4, 2, 1), "model__levels": 1}
    train.train(tiny(repeated, **fields), str(tmp_path / "whole"))
    for steps, cache, workers in ((1, "host", 1), (2, "device", 0)):
        part = fields | {"steps": steps, "data__cache": cache, "data__workers": workers}
        train.train(tiny(repeated, **part), str(tmp_path / "parts"))
    assert equal(parameters(tmp_path / "whole"), parameters(tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["kspace", "paired"])
def test_adjacent_slices_end_to_end(tiny, tmp_path: Path, task) -> None:
    write = {"kspace": write_scan, "paired": write_pair}[task]
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        write(tmp_path / "data" / split / f"{seed}_T101.h5", seed=seed)
    fields = {"steps": 2, "eval_every": 2, "model__levels": 1, "data__adjacent_slices": 1}
    config = tiny(tmp_path / "data", task=task, **fields)
    train.train(config, str(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    path = str(tmp_path / "data" / "val" / "1_T101.h5")
    volume = splits.describe_split(config, [path])[0]
    images = Inference.restore(str(tmp_path / "run"), data_consistency=False).reconstruct(volume)
    expected = next(row["val/psnr"] for row in rows if "val/psnr" in row)
    assert score_volume(images, volume)["reconstruction"]["psnr"] == pytest.approx(expected, abs=0.01)
