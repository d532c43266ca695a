"""Volumes of several sizes in one training: in which order they come, and that a slice is what it is in any bucket."""

import itertools
import json
import math
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, to_kspace, write_pair, write_scan

from mrjax import experiment, reconstruct, train, train_step
from mrjax.config import defaults
from mrjax.data import buckets, hdf5, loader, splits
from mrjax.data.schedule import Turns
from mrjax.errors import UserError
from mrjax.measures import losses, metrics
from mrjax.models.unet import UNet
from mrjax.mri import tasks
from mrjax.parallel import sharding
from mrjax.sizes import OwnSize

SHAPES = ((1, 24, 20), (2, 32, 32), (4, 28, 36), (2, 24, 20))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four volumes of three sizes to train on, two to validate on."""
    for number, (coils, *size) in enumerate(SHAPES):
        write_scan(tmp_path / "mixed" / "train" / f"{number}_T101.t5", 3 + number, coils, tuple(size), seed=number)
    write_scan(tmp_path / "mixed" / "val" / "8_T201.t5", 3, 2, (28, 20), seed=8)
    write_scan(tmp_path / "mixed" / "val" / "9_T201.t5", 2, 1, (32, 32), seed=9)
    return tmp_path / "mixed"


def volumes(folder: Path, layout: str = "kspace") -> list[hdf5.Volume]:
    return splits.volumes(hdf5.find(str(folder)), layout, on_bad_file="error", read_all=False)


def padding(groups: list[list[buckets.Shape]], counts: dict[buckets.Shape, int]) -> int:
    return sum(counts[s] * math.prod(buckets.enclosing(group)[1:]) for group in groups for s in group)


def test_shapes_are_grouped_with_little_padding() -> None:
    generator, found, best = random.Random(0), 0, 0
    for _ in range(30):
        counts = {
            (generator.choice((1, 2, 4)), generator.choice((20, 24, 32, 40)), generator.choice((20, 28, 32))): 1
            + generator.randrange(9)
            for _ in range(6)
        }
        shapes = sorted(counts)
        for most in (1, 2, 3):
            groups = buckets.plan(counts, most)
            assert sorted(itertools.chain(*groups)) == shapes
            assert len(groups) <= most
            found += padding(groups, counts)
            best += min(
                padding([[s for s, g in zip(shapes, of, strict=True) if g == i] for i in set(of)], counts)
                for of in itertools.product(range(most), repeat=len(shapes))
            )
    assert found <= 1.03 * best
    assert buckets.plan(dict.fromkeys(SHAPES, 1), 4) == [[shape] for shape in sorted(SHAPES)]
    # Coils cost less than pixels.
    assert [SHAPES[0], SHAPES[3]] in buckets.plan(dict.fromkeys(SHAPES, 1), 3)
    # A bucket as large as another one is that one.
    assert len(buckets.plan({(1, 8, 6): 1, (1, 6, 8): 1, (1, 8, 8): 9, (1, 99, 99): 9}, 2)) == 2


@pytest.mark.parametrize("lengths", [(7, 18, 5), (40, 1), (12,), (2, 3)])
def test_turns_give_every_source_its_share_in_each_epoch(lengths: tuple[int, ...]) -> None:
    size = 4
    turns = Turns(lengths, size, seed=3)
    stream = [turns[number] for number in range(300)]
    seen = [0] * len(lengths)
    for number, (source, turn) in enumerate(stream):
        assert turn == seen[source]
        seen[source] += 1
        epochs = (number + 1) * size / sum(lengths)
        assert all(
            abs(size * count - epochs * length) <= size + length for count, length in zip(seen, lengths, strict=True)
        )
    assert [turns[number] for number in (250, 3, 299)] == [stream[number] for number in (250, 3, 299)]
    if len(lengths) == 3:
        assert [s for s, _ in stream] != [Turns(lengths, size, seed=4)[n][0] for n in range(300)]
        epoch = sum(lengths) // size
        assert len({tuple(s for s, _ in stream[n : n + epoch]) for n in range(0, 280, epoch)}) > 10


def draw(sources, count: int, **options) -> list[loader.Batch]:
    options = {"batch_size": 4, "seed": 0, "start": 0, "workers": 0, "prefetch": 2} | options
    with loader.training_batches(sources, **options) as batches:
        return [next(batches) for _ in range(count)]


def test_batches_hold_slices_of_one_bucket_as_they_are_in_the_file(mixed: Path) -> None:
    found = volumes(mixed / "train")
    sources = buckets.buckets(found, 2)
    assert buckets.describe(sources).startswith("2 shapes for 3 sizes, ")
    assert len(sources) == 2
    assert sum(map(len, sources)) == 3 + 4 + 5 + 6
    seen: dict[tuple[int, int], int] = {}
    epochs = 20
    for number, batch in enumerate(draw(sources, 18 * epochs // 4)):
        assert batch["index"].tolist() == list(range(4 * number, 4 * number + 4))
        for row in range(4):
            volume, i = int(batch["volume"][row]), int(batch["slice"][row])
            seen[volume, i] = seen.get((volume, i), 0) + 1
            stored = hdf5.read(found[volume].path, "kspace")[i]
            assert tuple(batch["size"][row]) == stored.shape[1:]
            corner = tuple(map(slice, stored.shape))
            rest = batch["kspace"][row].copy()
            assert np.array_equal(rest[corner], stored)
            rest[corner] = 0
            assert not rest.any()
    assert len(seen) == 18
    # A bucket of n slices may lag behind by less than a batch.
    assert min(seen.values()) >= epochs - 2
    assert max(seen.values()) <= epochs + 1


def test_the_stream_of_buckets_goes_on_where_it_was_left_whoever_reads_it(mixed: Path) -> None:
    sources = buckets.buckets(volumes(mixed / "train"), 2)
    whole = draw(sources, 8)
    assert len({batch["kspace"].shape for batch in whole}) == 2
    for options, expected in (({"start": 12}, whole[3:]), ({"rows": [3, 1]}, whole), ({"workers": 2}, whole)):
        for one, other in zip(draw(sources, len(expected), **options), expected, strict=True):
            for name in one:
                assert np.array_equal(one[name], other[name][options.get("rows", slice(None))]), (options, name)


def test_evaluation_shows_every_slice_of_every_bucket_once(mixed: Path) -> None:
    found = volumes(mixed / "train")
    sources = buckets.buckets(found, 2)
    with loader.evaluation_batches(sources, batch_size=4, workers=0, prefetch=2) as batches:
        seen = [(int(b["volume"][i]), int(b["slice"][i])) for b in batches for i in range(4) if b["valid"][i]]
    assert sorted(seen) == [(v, i) for v, volume in enumerate(found) for i in range(volume.slices)]
    assert [v for v, _ in itertools.groupby(v for v, _ in seen)] == list(dict.fromkeys(v for v, _ in seen))


def test_images_in_pairs_keep_their_sizes_too(tmp_path: Path) -> None:
    for number, size in enumerate(((24, 20), (32, 28))):
        write_pair(tmp_path / f"{number}.t5", 2, size, seed=number)
    (source,) = buckets.buckets(volumes(tmp_path, "paired"), 1)
    assert source.shape == (32, 28)
    assert [source[place]["size"].tolist() for place in range(4)] == [[24, 20]] * 2 + [[32, 28]] * 2
    assert np.array_equal(source[1]["target"][:24, :20], hdf5.read(str(tmp_path / "0.t5"), "target")[1])
    assert not source[1]["target"][24:].any()


THE_REST = {"pool": "avg", "residual": True, "remat": True, "lanes": 16}


@pytest.mark.parametrize("fields", [{}, pytest.param(THE_REST, marks=pytest.mark.slow)])
def test_the_network_sees_the_canvas_and_nothing_else(fields: dict) -> None:
    rng = np.random.default_rng(0)
    model = UNet(channels=8, levels=2, **fields)
    small, weights = rng.normal(size=(2, 2, 24, 20, 1)).astype(np.float32)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), jax.jit(model.init)(jax.random.key(0), small)
    )
    canvas = np.array([[24, 20], [32, 32]], np.int32)
    large = rng.normal(size=(2, 32, 32, 1)).astype(np.float32)
    large[0] = 0
    large[0, :24, :20] = small[0]

    def alone(params, image):
        return (model.apply(params, image)[0] * weights[0]).sum()

    def beside(params, image):
        return (model.apply(params, image, canvas)[0, :24, :20] * weights[0]).sum()

    (value, expected), (padded, found) = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(params, image) for f, image in ((alone, small), (beside, large))
    )
    assert float(padded) == pytest.approx(float(value), rel=1e-5, abs=1e-4)
    pairs = zip(
        jax.tree.leaves((expected[0], expected[1][0])), jax.tree.leaves((found[0], found[1][0, :24, :20])), strict=True
    )
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()))


def config(**fields):
    base = defaults()
    base.model.channels, base.model.levels = 8, 2
    base.acquisition.noise = (0.05, 0.1)
    base.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return base


def batch_of(shape: tuple[int, ...], sizes: list[tuple[int, int]], coils: int = 2) -> dict[str, np.ndarray]:
    """Eight slices, the first of the first size and always the same, in arrays of the shape."""
    kspace = np.zeros((8, *shape), np.complex64)
    for row in range(8):
        height, width = sizes[row % len(sizes)]
        kspace[row, :coils, :height, :width] = to_kspace(coil_images(1, coils, height, width, seed=row))[0]
    labels = {"index": np.uint32, "name": np.uint32, "slice": np.int32}
    batch = {"kspace": kspace, "maximum": np.ones(8, np.float32)}
    batch |= {name: np.arange(8, dtype=dtype) for name, dtype in labels.items()}
    return batch | {"size": np.array([sizes[row % len(sizes)] for row in range(8)], np.int32)}


BUCKETS = [((2, 26, 22), [(26, 22)]), ((3, 37, 32), [(26, 22), (37, 32), (30, 25)])]


def test_a_slice_is_corrupted_and_reconstructed_alike_in_every_bucket() -> None:
    cfg, mesh = config(), sharding.make_mesh(devices=jax.devices()[:1])
    table = dict(BUCKETS)
    model, task = experiment.model(cfg), experiment.task(cfg)
    params = jax.jit(experiment.initial_state(cfg))().params

    def network_and_loss(batch):
        def normalised(part):
            example = task(part, tasks.training_keys(0, part["index"]))
            scale = train_step.scaling(example.corrupted, part, "slice")
            return train_step.without_kspace(train_step.network_inputs(example, scale), model), scale.apply(
                example.target
            )

        own = OwnSize(batch, table, model)
        inputs, truth = own.of(normalised)(batch)
        prediction = own.cut(train_step.run_network(model, params, inputs._replace(canvas=own.canvas)))
        return own.cut(inputs.image[..., 0]), own.cut(truth), prediction

    predict = train_step.compile_predict(mesh, model=model, task=task, normalise_by="slice", sizes=table)
    results = []
    for shape, sizes in BUCKETS:
        batch = batch_of(shape, sizes)
        made = [np.asarray(x)[0] for x in jax.jit(network_and_loss)(batch)]
        images, peak = predict(params, batch)
        made += [np.asarray(images[name])[0] for name in ("corrupted", "target", "reconstruction")]
        for image in made:
            assert not image[26:].any()
            assert not image[:, 22:].any()
        results.append([image[:26, :22] for image in made] + [np.asarray(peak)[:1]])
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert float(np.abs(one).max()) > 0.1
            np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(one).max()))


@pytest.mark.parametrize("name", ["mse", "l1", "ssim"])
def test_losses_and_metrics_count_no_padding(name: str) -> None:
    rng = np.random.default_rng(1)
    size = np.array([[17, 12], [20, 9], [20, 14]], np.int32)
    images = rng.uniform(size=(2, 3, 20, 14)).astype(np.float32)
    for i, (height, width) in enumerate(size):
        images[:, i, height:], images[:, i, :, width:] = 0, 0
    prediction, target = images
    offset = np.full((3, 1, 1), 0.1, np.float32)
    loss = losses.weighted_sum({name: 1.0})
    alone = [float(loss(*(x[i : i + 1, :h, :w] for x in images), offset[i : i + 1])) for i, (h, w) in enumerate(size)]
    assert float(loss(prediction, target, offset, size)) == pytest.approx(np.mean(alone), rel=1e-5)
    slopes = jax.grad(lambda x: loss(x, target, offset, size))(prediction)
    assert np.isfinite(slopes).all()
    assert not slopes[0, 17:].any()
    sums = metrics.slice_sums(target, prediction, np.ones(3, np.float32), size)
    for i, (h, w) in enumerate(size):
        expected = metrics.slice_sums(target[i : i + 1, :h, :w], prediction[i : i + 1, :h, :w], 1.0)
        for key, value in expected.items():
            assert float(sums[key][i]) == pytest.approx(float(value[0]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulate"), [((1, 1, 1), 2), ((2, 2, 2), 1)])
def test_a_training_step_is_the_same_in_a_larger_bucket(mesh: tuple[int, int, int], accumulate: int) -> None:
    cfg = config(batch_size=8)
    sizes = [(26, 22), (30, 25)]
    fixed = {"task": experiment.task(cfg), "normalise_by": "slice", "optimizer": experiment.optimizer(cfg), "seed": 0}
    found = []
    for shape, split, parts in (((2, 30, 25), (1, 1, 1), 1), ((3, 41, 32), mesh, accumulate)):
        devices = sharding.make_mesh(split, jax.devices()[: math.prod(split)])
        table = {shape: sizes}
        one = train_step.compile_train(devices, model=experiment.model(cfg), sizes=table, accumulate=parts, **fixed)
        batch = jax.device_put(batch_of(shape, sizes), sharding.by_example(devices))
        state = jax.device_put(jax.jit(experiment.initial_state(cfg))(), sharding.replicated(devices))
        _, values = one(state, batch)
        found.append([float(values[name]) for name in ("loss", "grad_norm")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_a_run_on_files_of_several_sizes_ends_in_a_checkpoint_for_any_size(
    mixed: Path, tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_one = experiment.train_step
    monkeypatch.setattr(experiment, "train_step", lambda *a, **k: compiled.append(a[3]) or compile_one(*a, **k))
    fields = {"schedule": "constant", "data__max_shapes": 2, "eval_every": 3, "model__channels": 8}
    with caplog.at_level("INFO", "mrjax"):
        train.train(tiny(mixed, **fields), str(tmp_path / "whole"))
    assert "2 shapes for 3 sizes" in caplog.text
    assert len(compiled) == 2
    for steps in (2, 6):
        train.train(tiny(mixed, steps=steps, data__cache="host", **fields), str(tmp_path / "parts"))
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    whole, parts = ({row["step"]: row["loss"] for row in some if "loss" in row} for some in rows)
    assert whole[6] == parts[6]
    assert whole[4] == parts[4]
    # Each file at its own size: what validation saw while training is what evaluation finds.
    inference = experiment.restore(str(tmp_path / "whole"), sharding.make_mesh())
    assert inference.config.data.image_size == ()
    scores = []
    for volume in volumes(mixed / "val"):
        images = reconstruct.reconstruct(inference, volume)
        assert images["reconstruction"].shape == (volume.slices, *volume.data_shape)
        scores.append(reconstruct.scores(images, volume)["reconstruction"]["psnr"])
    seen = {row["step"]: row["val/psnr"] for row in rows[0] if "val/psnr" in row}
    assert np.mean(scores) == pytest.approx(seen[inference.progress["step"]], abs=1e-3)


def test_what_needs_one_size_for_all_says_so(mixed: Path, tiny, tmp_path: Path) -> None:
    for fields, words in (
        ({"data__cache": "device"}, r"config\.data\.cache is 'device' and the files differ in size \(24x20, 28x20"),
        ({"model__levels": 4}, r"expected at least 32 pixels a side"),
        ({"mesh": (1, 1, 8)}, r"config\.mesh splits rows over 8 devices"),
        ({"data__max_shapes": 0}, r"config\.data\.max_shapes is 0, expected more than 0"),
    ):
        with pytest.raises(UserError, match=words):
            train.train(tiny(mixed, **fields), str(tmp_path / "run"))
