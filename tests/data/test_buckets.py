"""Volumes of several sizes: every batch holds slices of one exact size, in an order that a resumed run continues."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import coil_images, read_array, read_example, to_kspace, write_pair, write_scan
from test_loader import describe, draw

from mrjax import experiment, train, train_step
from mrjax.config import defaults
from mrjax.data import buckets, loader
from mrjax.data.dataset import SliceDataset
from mrjax.errors import UserError
from mrjax.inference import Inference
from mrjax.io.volume import Volume
from mrjax.measures.evaluator import score_volume
from mrjax.parallel import sharding

SHAPES = ((1, 24, 20), (2, 32, 32), (4, 28, 36), (2, 24, 20))


def by_size(volumes: list[Volume], max_shapes: int) -> list[SliceDataset]:
    data = defaults().data
    data.max_shapes = max_shapes
    return buckets.bucket_by_size(data, volumes)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four volumes of three sizes to train on, two to validate on."""
    for number, (coils, *size) in enumerate(SHAPES):
        write_scan(tmp_path / "mixed" / "train" / f"{number}_T101.t5", 3 + number, coils, tuple(size), seed=number)
    write_scan(tmp_path / "mixed" / "val" / "8_T201.t5", 3, 2, (28, 20), seed=8)
    write_scan(tmp_path / "mixed" / "val" / "9_T201.t5", 2, 1, (32, 32), seed=9)
    return tmp_path / "mixed"


def test_a_bucket_holds_the_slices_of_one_size_as_stored_with_coils_zero_padded(mixed: Path) -> None:
    volumes = describe(mixed / "train")
    datasets = by_size(volumes, 3)
    assert buckets.describe_buckets(datasets) == (
        "3 shapes: 2x24x20 (9 slices), 4x28x36 (5 slices), 2x32x32 (4 slices)"
    )
    seen: dict[tuple[int, int], int] = {}
    epochs = 20
    for number, batch in enumerate(draw(datasets, 18 * epochs // 4)):
        assert batch["index"].tolist() == list(range(4 * number, 4 * number + 4))
        for kspace, volume, i in zip(batch["kspace"], batch["volume"].tolist(), batch["slice"].tolist(), strict=True):
            seen[volume, i] = seen.get((volume, i), 0) + 1
            stored = read_array(volumes[volume].path, "kspace")[i]
            assert np.array_equal(kspace[: len(stored)], stored)
            assert not kspace[len(stored) :].any()
    assert len(seen) == 18
    # A bucket of n slices may lag behind by less than a batch.
    assert min(seen.values()) >= epochs - 2
    assert max(seen.values()) <= epochs + 1


def test_more_sizes_than_max_shapes_are_refused_with_the_way_out(mixed: Path) -> None:
    words = r"max_shapes is 2, found files of 3 sizes, among them 24x20, 28x36, 32x32; .*config\.data\.image_size"
    with pytest.raises(UserError, match=words):
        by_size(describe(mixed / "train"), 2)


def test_the_stream_of_buckets_is_the_same_resumed_and_split_over_processes_and_workers(mixed: Path) -> None:
    datasets = by_size(describe(mixed / "train"), 16)
    whole = draw(datasets, 8)
    assert len({batch["kspace"].shape for batch in whole}) == 3
    for options, expected in (({"start": 12}, whole[3:]), ({"rows": [3, 1]}, whole), ({"workers": 2}, whole)):
        for one, other in zip(draw(datasets, len(expected), **options), expected, strict=True):
            for name in one:
                assert np.array_equal(one[name], other[name][options.get("rows", slice(None))]), (options, name)


def test_evaluation_shows_every_slice_of_every_bucket_once(mixed: Path) -> None:
    volumes = describe(mixed / "train")
    datasets = by_size(volumes, 3)
    with loader.evaluation_batches(datasets, loader.LoaderOptions(4)) as batches:
        seen = [(int(b["volume"][i]), int(b["slice"][i])) for b in batches for i in range(4) if b["valid"][i]]
    assert sorted(seen) == [(v, i) for v, volume in enumerate(volumes) for i in range(volume.slices)]
    assert [v for v, _ in itertools.groupby(v for v, _ in seen)] == list(dict.fromkeys(v for v, _ in seen))


def test_pairs_are_bucketed_by_size_too(tmp_path: Path) -> None:
    for number, size in enumerate(((32, 28), (24, 20))):
        write_pair(tmp_path / f"{number}.t5", 2, size, seed=number)
    datasets = by_size(describe(tmp_path, "paired"), 2)
    assert buckets.describe_buckets(datasets) == "2 shapes: 24x20 (2 slices), 32x28 (2 slices)"
    assert np.array_equal(read_example(datasets[0], 1)["target"], read_array(tmp_path / "1.t5", "target")[1])
    assert [int(read_example(one, 0)["volume"]) for one in datasets] == [1, 0]


@pytest.mark.slow
def test_zero_padded_coils_change_neither_acquisition_nor_reconstruction() -> None:
    """Of one network: `models/test_registry.py` holds all of them to this, gradients included."""
    config = defaults()
    config.model.update(name="unet_dc", channels=4, levels=2)
    config.data.image_size, config.acquisition.noise = (26, 22), (0.05, 0.1)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    recipe = experiment.make_recipe(config, mesh)
    predict = train_step.jit_predict(recipe)
    params = jax.jit(lambda: experiment.initial_state(config, recipe))().params
    kspace = to_kspace(coil_images(2, 2, 26, 22))
    labels = {"name": np.arange(2, dtype=np.uint32), "slice": np.arange(2, dtype=np.int32)}
    results = []
    for coils in (2, 3):
        padded = np.zeros((2, coils, 26, 22), np.complex64)
        padded[:, :2] = kspace
        images, peak = predict(params, labels | {"kspace": padded, "maximum": np.ones(2, np.float32)})
        results.append([*(np.asarray(image) for image in images.values()), np.asarray(peak)])
    for one, other in zip(*results, strict=True):
        assert float(np.abs(one).max()) > 0.1
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(one).max()))


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes of two sizes to train on, one to validate on."""
    data = tmp_path_factory.mktemp("two_sizes")
    # 2 x 32 x 32 as in other tests, whose compiled programs serve here too.
    files = (("train", 1, (16, 12)), ("train", 2, (32, 32)), ("val", 2, (32, 32)))
    for number, (split, coils, size) in enumerate(files):
        write_scan(data / split / f"{number}_T101.t5", 3 + number, coils, size, seed=number)
    return data


RUN = {"schedule": "constant", "steps": 4, "log_every": 2, "eval_every": 4, "data__cache": "device"}


def logged(workdir: Path, name: str, step: int = 4) -> float:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return next(row[name] for row in lines if row["step"] == step and name in row)


@pytest.mark.slow
def test_a_run_on_two_sizes_is_the_same_from_any_cache_and_evaluates_files_at_their_own_size(
    two_sizes: Path, tiny, tmp_path: Path, caplog
) -> None:
    with caplog.at_level("INFO", "mrjax"):
        train.train(tiny(two_sizes, **RUN), str(tmp_path / "device"))
    assert "training: 2 shapes: 1x16x12 (3 slices), 2x32x32 (4 slices)" in caplog.text
    for steps, cache in ((2, "none"), (4, "host")):
        train.train(tiny(two_sizes, **RUN | {"data__cache": cache, "steps": steps}), str(tmp_path / "parts"))
    for step in (2, 4):
        assert logged(tmp_path / "device", "loss", step) == logged(tmp_path / "parts", "loss", step)
    inference = Inference.restore(str(tmp_path / "device"), data_consistency=False)
    assert inference.config.data.image_size == ()
    (volume,) = describe(two_sizes / "val")
    images = inference.reconstruct(volume)
    assert images["reconstruction"].shape == (volume.slices, *volume.data_shape)
    found = score_volume(images, volume)["reconstruction"]["psnr"]
    assert found == pytest.approx(logged(tmp_path / "device", "val/psnr"), abs=1e-3)


def test_sizes_that_cannot_be_trained_on_are_refused(mixed: Path, tiny, tmp_path: Path) -> None:
    for fields, words in (
        ({"model__levels": 4}, r"the files hold slices of 24x20, expected at least 32 a side"),
        ({"mesh": (1, 1, 8)}, r"slices of 28x\d+, expected a height that is a multiple of 8"),
        ({"data__max_shapes": 0}, r"config\.data\.max_shapes is 0, expected more than 0"),
    ):
        with pytest.raises(UserError, match=words):
            train.train(tiny(mixed, **fields), str(tmp_path / "run"))
