"""The U-Net: fastMRI's function and size, exact gradients, float32 where it matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, rss, to_kspace
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.errors import UserError
from mrjax.interop.fastmri import from_fastmri
from mrjax.models import build
from mrjax.models.unet import UNet
from mrjax.models.unet_dc import ConsistentUNet
from mrjax.mri.fourier import centred_ifft2_host as from_kspace
from mrjax.ops.normalisation import normalise_and_activate
from mrjax.ops.pooling import max_pool

SMALL = UNet(channels=4, levels=2)
TINY = UNet(channels=2, levels=1)


def _images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.mark.parametrize(("channels", "levels", "count"), [(32, 4, 7_756_097), (64, 3, 7_692_929), (64, 4, 31_023_745)])
def test_sizes_published_for_fastmri(channels: int, levels: int, count: int) -> None:
    shapes = jax.eval_shape(UNet(channels, levels).init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_names_and_layouts_that_importers_rely_on() -> None:
    params = jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "down_0": {"conv_0": {"kernel": (3, 3, 1, 4)}, "conv_1": {"kernel": (3, 3, 4, 4)}},
        "down_1": {"conv_0": {"kernel": (3, 3, 4, 8)}, "conv_1": {"kernel": (3, 3, 8, 8)}},
        "bottleneck": {"conv_0": {"kernel": (3, 3, 8, 16)}, "conv_1": {"kernel": (3, 3, 16, 16)}},
        "up_1": {
            "transpose": {"kernel": (2, 2, 16, 8)},
            "conv_0": {"kernel": (3, 3, 16, 8)},
            "conv_1": {"kernel": (3, 3, 8, 8)},
        },
        "up_0": {
            "transpose": {"kernel": (2, 2, 8, 4)},
            "conv_0": {"kernel": (3, 3, 8, 4)},
            "conv_1": {"kernel": (3, 3, 4, 4)},
        },
        "head": {"kernel": (4, 1), "bias": (1,)},
    }


@pytest.mark.parametrize(("height", "width"), [(64, 48), (41, 54)])
def test_equals_fastmri(height: int, width: int) -> None:
    """Same weights, same image: same output and, through the whole backward pass, same gradients (float64 there)."""
    torch = pytest.importorskip("torch")
    fastmri_models = pytest.importorskip("fastmri.models")
    # Not any seed: where a value lies within rounding of LeakyReLU's kink, float32 and float64 gradients part (by 6e-3
    # at seed 0, PyTorch's own as much as ours).
    torch.manual_seed(1)
    peer = fastmri_models.Unet(in_chans=1, out_chans=1, chans=8, num_pool_layers=3).double()
    image = _images(2, height, width, 1)

    expected = peer(torch.from_numpy(image.transpose(0, 3, 1, 2)).double())
    expected.square().mean().backward()

    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        output = UNet(channels=8, levels=3, pool="avg").apply({"params": params}, image)
        return jnp.mean(output**2), output

    params = from_fastmri({name: value.numpy() for name, value in peer.state_dict().items()}).params
    gradients, output = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected_gradients = from_fastmri({name: value.grad.numpy() for name, value in peer.named_parameters()}).params
    np.testing.assert_allclose(output, expected.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


def _normalise_and_activate_reference(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    normal = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    return np.where(normal >= 0, normal, 0.2 * normal)


@pytest.mark.parametrize("offset", [0, 1, 10])
def test_one_pass_statistics_against_float64(offset: float) -> None:
    """Guards against cancellation in E[x^2] - E[x]^2, up to means ten times the standard deviation."""
    x = np.random.default_rng(0).normal(offset, 1, (2, 256, 256, 8)).astype(np.float32)
    error = jax.jit(normalise_and_activate)(x) - _normalise_and_activate_reference(x)
    assert np.abs(error).max() < 1e-4


def test_statistics_are_float32_for_bfloat16() -> None:
    """65536 values summed in bfloat16 would stop growing at 256."""
    x = jnp.asarray(np.random.default_rng(0).normal(1, 1, (1, 256, 256, 2)), jnp.bfloat16)
    result = jax.jit(normalise_and_activate)(x)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), _normalise_and_activate_reference(np.asarray(x)), 1e-2, 1e-3)


def test_constant_channels_normalise_to_zero() -> None:
    """A variance that rounds below zero must not become NaN, forwards or backwards."""
    x = jnp.full((1, 17, 19, 3), 0.1)
    result, pullback = jax.vjp(normalise_and_activate, x)
    np.testing.assert_allclose(result, 0, atol=1e-3)
    assert np.isfinite(pullback(x)[0]).all()


def test_gradient_written_by_hand_is_the_one_of_autodiff() -> None:
    def plain(x: jax.Array) -> jax.Array:
        centred = x - x.mean((1, 2), keepdims=True)
        return jax.nn.leaky_relu(centred / jnp.sqrt((centred**2).mean((1, 2), keepdims=True) + 1e-5), 0.2)

    # A small deviation too, where epsilon counts.
    x, g = _images(2, 13, 8, 5) * np.float32([1, 2, 0.1, 0.01, 5]) + 0.3, _images(2, 13, 8, 5, seed=1)
    for ours, theirs in zip(
        *(jax.vjp(f, jnp.asarray(x))[1](jnp.asarray(g)) for f in (normalise_and_activate, plain)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


def test_max_pool_drops_the_odd_and_gives_the_gradient_to_the_first_of_equals() -> None:
    x = jnp.asarray([[1, 2, 9], [4, 4, 9], [9, 9, 9]], jnp.float32)[None, :, :, None]
    pooled, pullback = jax.vjp(max_pool, x)
    assert pooled.tolist() == [[[[4]]]]
    assert pullback(pooled)[0][0, :, :, 0].tolist() == [[0, 0, 0], [4, 0, 0], [0, 0, 0]]


def test_max_pool_finds_every_place() -> None:
    x = jnp.asarray(_images(2, 6, 8, 3))
    pooled, pullback = jax.vjp(max_pool, x)
    expected, reference = jax.vjp(
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), x
    )
    assert (pooled == expected).all()
    assert (pullback(pooled)[0] == reference(pooled)[0]).all()


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_rematerialisation_convolves_again_to_the_same_gradients(pool: str) -> None:
    image = _images(2, 16, 16, 1)
    model = UNet(channels=4, levels=2, pool=pool)
    params = jax.jit(model.init)(jax.random.key(0), image)

    def gradient(remat: bool):
        traced = jax.jit(jax.grad(lambda params: jnp.mean(model.clone(remat=remat).apply(params, image) ** 2))).trace(
            params
        )
        return traced.lower().compile()(params), str(traced.jaxpr).count("conv_general_dilated[")

    (kept, convolutions), (again, more) = gradient(False), gradient(True)
    assert more > convolutions > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), kept, again)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_pixels_folded_into_channels_compute_the_same(pool: str) -> None:
    """The form for TPUs, at three foldings (4, 2 and none), forwards and backwards."""
    image = _images(1, 16, 32, 1)
    model = UNet(channels=4, levels=2, pool=pool)
    params = jax.jit(model.init)(jax.random.key(0), image)

    def gradient(lanes: int):
        return jax.jit(jax.grad(lambda params: jnp.mean((model.clone(lanes=lanes).apply(params, image) - image) ** 2)))(
            params
        )

    for plain, folded in zip(*(jax.tree.leaves(gradient(lanes)) for lanes in (1, 16)), strict=True):
        assert np.linalg.norm(folded - plain) < 1e-4 * np.linalg.norm(plain)


def test_residual_is_the_input_plus_the_network() -> None:
    image = _images(1, 16, 16, 1)
    params = jax.jit(TINY.init)(jax.random.key(0), image)
    correction = jax.jit(TINY.apply)(params, image)
    output = jax.jit(TINY.clone(residual=True).apply)(params, image)
    np.testing.assert_allclose(output, image + correction, rtol=1e-5, atol=1e-6)


def test_neighbouring_slices_are_channels_and_the_first_is_corrected() -> None:
    """2.5-D: three slices in, one out, from the start the slice itself; and the others do count."""
    image = _images(2, 16, 16, 3)
    model = TINY.clone(residual=True)
    params = jax.jit(model.init)(jax.random.key(0), image)
    np.testing.assert_array_equal(jax.jit(model.apply)(params, image), image[..., :1])
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    assert params["params"]["down_0"]["conv_0"]["kernel"].shape == (3, 3, 3, 2)
    of_neighbours = jax.jit(jax.grad(lambda image: model.apply(params, image).sum()))(image)[..., 1:]
    assert np.abs(of_neighbours).max((0, 1, 2)).min() > 0


@pytest.mark.parametrize("lanes", [1, 16])
def test_channels_of_the_result_are_networks_that_share_all_but_the_head(lanes: int) -> None:
    """Also with pixels folded into channels."""
    image = _images(1, 16, 32, 2)
    model = UNet(channels=4, levels=1, out_channels=2, lanes=lanes)
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    both = jax.jit(model.apply)({"params": params}, image)
    for channel in range(2):
        head = {"kernel": params["head"]["kernel"][:, channel, None], "bias": params["head"]["bias"][channel, None]}
        one = jax.jit(UNet(channels=4, levels=1).apply)({"params": params | {"head": head}}, image)
        np.testing.assert_allclose(both[..., channel, None], one, rtol=1e-4, atol=1e-5)


def _measured(empty: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A network's inputs of two slices of two coils, and as many `empty` ones more."""
    rng = np.random.default_rng(0)
    mask = rng.random((2, 1, 20)) < 0.5
    # With noise, as any scan: an image of nothing has no phase.
    noise = rng.normal(size=(2, 2, 16, 20, 2)).astype(np.float32).view(np.complex64)[..., 0]
    kspace = np.where(mask[:, None], to_kspace(coil_images(2, 2, 16, 20)) + 0.02 * noise, 0)
    kspace = np.concatenate([kspace, np.zeros((2, empty, 16, 20), np.complex64)], 1)
    image = np.abs(np.fft.ifft2(np.fft.ifftshift(kspace, (-2, -1)), norm="ortho"))
    offset = np.full((2, 1, 1), 0.05, np.float32)
    return np.fft.fftshift(rss(image), (-2, -1))[..., None] - offset[..., None], kspace, mask, offset


def test_data_consistency_keeps_what_was_measured() -> None:
    """Against NumPy: measured samples are the measurement's, the others the network's, with the coils' own phase."""
    image, kspace, mask, offset = _measured()
    model = ConsistentUNet(channels=2, levels=1)
    params = jax.jit(model.init)(jax.random.key(0), image, kspace, mask, offset)["params"]
    for weight in (0.7, 1.0):
        params = params | {"consistency": np.float32([weight])}
        output = jax.jit(model.apply)({"params": params}, image, kspace, mask, offset)[..., 0]
        unet = {name: value for name, value in params.items() if name != "consistency"}
        estimate = np.asarray(jax.jit(TINY.apply)({"params": unet}, image))[..., 0] + offset
        coils = from_kspace(kspace)
        predicted = to_kspace(coils / rss(coils)[:, None] * estimate[:, None])
        mixed = np.where(mask[:, None], (1 - weight) * predicted + weight * kspace, predicted)
        expected = rss(from_kspace(mixed)) - offset
        assert np.abs(expected - np.abs(estimate) + offset).max() > 0.01
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def test_data_consistency_with_empty_coils_empty_slices_and_bfloat16() -> None:
    """Nothing changes, no gradient is NaN, and errors are of bfloat16's size."""
    inputs, more = _measured(), _measured(empty=2)
    model = ConsistentUNet(channels=2, levels=1)
    params = jax.jit(model.init)(jax.random.key(0), *inputs)
    output = jax.jit(model.apply)(params, *inputs)
    np.testing.assert_allclose(jax.jit(model.apply)(params, *more), output, rtol=1e-5, atol=1e-6)
    half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(params, *inputs)
    assert half.dtype == jnp.float32
    assert 0 < np.linalg.norm(half - output) < 0.05 * np.linalg.norm(output)
    image, kspace, mask, offset = inputs
    kspace[1], image[1], offset[1] = 0, 0, 0
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, image, kspace, mask, offset).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_bfloat16_computes_the_same_network() -> None:
    """float32 parameters and result, and errors of bfloat16's size."""
    image = _images(2, 32, 32, 1)
    half = TINY.clone(dtype=jnp.bfloat16)
    params = jax.jit(half.init)(jax.random.key(0), image)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    output, expected = jax.jit(half.apply)(params, image), jax.jit(TINY.apply)(params, image)
    assert output.dtype == jnp.float32
    assert 0 < np.linalg.norm(output - expected) < 0.05 * np.linalg.norm(expected)


def test_batch_sharded_over_devices() -> None:
    """The compiler may split the batch anywhere: also through the gradient written by hand."""
    devices = np.asarray(jax.devices())
    if len(devices) == 1:
        pytest.skip("one device: XLA_FLAGS=--xla_force_host_platform_device_count=8 gives eight")
    image = _images(len(devices), 16, 16, 1)
    params = jax.jit(TINY.init)(jax.random.key(0), image)
    gradient = jax.jit(jax.grad(lambda params, image: jnp.mean(TINY.apply(params, image) ** 2)))
    sharded = jax.device_put(image, NamedSharding(Mesh(devices, "data"), PartitionSpec("data")))
    for whole, split in zip(*(jax.tree.leaves(gradient(params, x)) for x in (image, sharded)), strict=True):
        np.testing.assert_allclose(split, whole, rtol=1e-3, atol=1e-6)


def test_smallest_side_is_computed_and_learns() -> None:
    side = UNet.smallest_side(2)
    model = UNet(channels=2, levels=2)
    image = _images(1, side, side, 1)
    params = jax.jit(model.init)(jax.random.key(0), image)
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, image).sum()))(params)
    assert np.abs(gradient["params"]["bottleneck"]["conv_1"]["kernel"]).max() > 0


def test_registry_builds() -> None:
    assert build("unet", channels=8, pool="avg") == UNet(channels=8, pool="avg")


def test_registry_names_what_was_meant() -> None:
    with pytest.raises(UserError, match=r"config\.model\.name is 'unett', expected one of: unet, unet_dc, varnet"):
        build("unett")
    with pytest.raises(UserError, match=r"config\.model\.chanels .* \(nearest: channels\)"):
        build("unet", chanels=8)
    with pytest.raises(UserError, match=r"config\.model\.pool is 'mean', expected one of: max, avg"):
        build("unet", pool="mean").init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
