"""Every tuned operation equals its plain reference, gradients included, on every platform, packed or not."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.ops import features, platform, reference
from mrjax.ops.convolution import convolve, upsample
from mrjax.ops.features import FeatureMap, pad_like
from mrjax.ops.normalisation import conv_norm_act, norm_act, norm_act_conv1x1
from mrjax.ops.pooling import avg_pool, max_pool
from mrjax.parallel import sharding

BATCH, HEIGHT, WIDTH = 2, 8, 16


def unpack(x: FeatureMap) -> jax.Array:
    """The image of a feature map, without what means nothing."""
    b, h, w, _ = x.data.shape
    return x.data.reshape(b, h, w * x.lane_pack, -1)[..., : x.channels]


def pack(image: jax.Array, lane_pack: int) -> FeatureMap:
    b, h, w, c = image.shape
    return FeatureMap(image.reshape(b, h, w // lane_pack, lane_pack * c), lane_pack)


class Case(NamedTuple):
    """An operation on images and weights, and its reference.

    Attributes:
      tuned: from packed images (how many pixels are stored as one) and weights.
      plain: from the same images and weights as arrays.
      images: channels of each image.
      weights: shapes.
    """

    tuned: Callable[..., Any]
    plain: Callable[..., Any]
    images: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...] = ()


def convolve_pooled(pack: int, x: FeatureMap, kernel: jax.Array) -> jax.Array:
    """A convolution of the map that pooling leaves: spaced where it is packed."""
    return unpack(convolve([max_pool(x)], kernel))


def upsample_packed(pack_: int, x: FeatureMap, kernel: jax.Array) -> jax.Array:
    like = pack(jnp.zeros((BATCH, 2 * HEIGHT, 2 * WIDTH, kernel.shape[-1])), pack_)
    return unpack(upsample(pack(unpack(x), max(pack_ // 2, 1)), kernel, like))


def two_results(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = reference.norm_act(x)
    return y, reference.max_pool(y)


def joined(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, y, *weights: function(jnp.concatenate([x, y], -1), *weights)


CASES = {
    "convolve": Case(lambda pack, x, k: unpack(convolve([x], k)), reference.convolve, (3,), ((3, 3, 3, 4),)),
    "convolve a concatenation": Case(
        lambda pack, x, y, k: unpack(convolve([x, y], k)),
        joined(reference.convolve),
        (4, 3),
        ((3, 3, 7, 4),),
    ),
    "convolve what was pooled": Case(
        convolve_pooled, lambda x, k: reference.convolve(reference.max_pool(x), k), (4,), ((3, 3, 4, 8),)
    ),
    "upsample": Case(upsample_packed, reference.upsample, (4,), ((2, 2, 4, 2),)),
    "max_pool": Case(lambda pack, x: unpack(max_pool(x)), reference.max_pool, (4,)),
    "avg_pool": Case(lambda pack, x: unpack(avg_pool(x)), reference.avg_pool, (4,)),
    "norm_act": Case(lambda pack, x: unpack(norm_act(x)), reference.norm_act, (3,)),
    "norm_act and max_pool": Case(
        lambda pack, x: tuple(map(unpack, norm_act(x, epilogue=max_pool))), two_results, (4,)
    ),
    "norm_act_conv1x1": Case(
        lambda pack, x, k, b: norm_act_conv1x1(x, k, b), reference.norm_act_conv1x1, (3,), ((3, 2), (2,))
    ),
    "conv_norm_act of an image": Case(
        lambda pack, x, k: unpack(conv_norm_act([x], k)),
        lambda x, k: reference.norm_act(reference.convolve(x, k)),
        (1,),
        ((3, 3, 1, 4),),
    ),
}


# Platforms, and how many pixels are packed as one.
FORMS = (("cpu", 1), ("cuda", 1), ("tpu", 1), ("tpu", 2), ("tpu", 4))


@pytest.mark.parametrize("name", CASES)
def test_tuned_operation_equals_its_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all forms at once: together they compile in half the time."""
    case, rng = CASES[name], np.random.default_rng(0)
    # Far from standardised, and with a small deviation too, where epsilon counts.
    images = [
        (rng.normal(size=(BATCH, HEIGHT, WIDTH, c)) * np.logspace(0, -2, c) + 0.1).astype(np.float32)
        for c in case.images
    ]
    weights = [rng.normal(size=shape).astype(np.float32) for shape in case.weights]

    def tuned(lane_pack: int, *args: jax.Array) -> Any:
        packed = [pack(image, lane_pack) for image in args[: len(images)]]
        return case.tuned(lane_pack, *packed, *args[len(images) :])

    @jax.jit
    def values_and_gradients(*args: jax.Array) -> tuple[Any, list[Any]]:
        plain, pullback = jax.vjp(case.plain, *args)
        cotangent = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), plain)
        expected, found = (plain, pullback(cotangent)), []
        for on, lane_pack in FORMS:
            monkeypatch.setattr(platform, "traced_platform", lambda on=on: on)
            ours, pullback = jax.vjp(functools.partial(tuned, lane_pack), *args)
            found.append((ours, pullback(cotangent)))
        return expected, found

    expected, found = values_and_gradients(*images, *weights)
    for form, ours in zip(FORMS, found, strict=True):
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert one.shape == other.shape, form
            np.testing.assert_allclose(one, other, 1e-3, 1e-4 * np.abs(other).max(), err_msg=str(form))


@pytest.mark.parametrize(
    ("shape", "levels", "lane_pack"), [((16, 32), 2, 4), ((16, 32), 4, 4), ((16, 34), 1, 1), ((15, 32), 1, 1)]
)
def test_packing_fills_the_lanes_where_every_level_divides(
    shape: tuple[int, int], levels: int, lane_pack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(features.LANES, "cpu", 16)
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape, 1)
    x = features.feature_map(image, jnp.float32, 4, levels)
    assert x.lane_pack == lane_pack
    assert x.channels == 1
    np.testing.assert_array_equal(unpack(x), image)


@pytest.mark.parametrize(("on", "lane_pack"), [("tpu", 4), ("cuda", 1), ("cpu", 1)])
def test_packing_follows_the_mesh_that_is_traced_for(on: str, lane_pack: int) -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1]).abstract_mesh
    target = mesh.update(abstract_device=jax.sharding.AbstractDevice(on, None, on))
    with jax.sharding.use_abstract_mesh(target):
        x = jax.eval_shape(lambda image: features.feature_map(image, jnp.bfloat16, 32, 4), jnp.zeros((1, 64, 64, 1)))
    assert x.lane_pack == lane_pack
    assert x.data.shape == (1, 64, 64 // lane_pack, lane_pack)


def test_channels_that_do_not_divide_the_lanes_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(features.LANES, "cpu", 16)
    for channels, lane_pack in ((3, 1), (16, 1), (32, 1), (8, 2)):
        assert features.feature_map(jnp.zeros((1, 32, 48, 1)), jnp.float32, channels, 2).lane_pack == lane_pack


def test_pad_like_reflects_the_last_row_and_column() -> None:
    x = FeatureMap(jnp.arange(4.0).reshape(1, 2, 2, 1))
    like = FeatureMap(jnp.zeros((1, 3, 3, 1)))
    assert pad_like(x, like).data[0, ..., 0].tolist() == [[0, 1, 0], [2, 3, 2], [0, 1, 0]]
