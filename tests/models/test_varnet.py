"""VarNet: fastMRI's function and size, whatever the coils, masks, mesh and precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, to_kspace
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.interop.fastmri import from_fastmri
from mrjax.models.varnet import VarNet
from mrjax.mri import compressed_sensing
from mrjax.mri.coils import magnitude
from mrjax.mri.fourier import fft2c
from mrjax.mri.noise import estimate_sigma
from mrjax.mri.sense import estimate_maps, find_centre

TINY = VarNet(channels=4, levels=1, cascades=2, sens_channels=2, sens_levels=1)
RESIDUAL = TINY.clone(residual=True, cascades=1)


def _inputs(
    examples: int, coils: int, height: int, width: int, low: int = 6
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K-space of ellipses at a brain scan's magnitudes, with noise; a mask of columns; an offset."""
    rng = np.random.default_rng(0)
    full = 1e-4 * to_kspace(coil_images(examples, coils, height, width))
    full += 1e-6 * (rng.normal(size=full.shape) + 1j * rng.normal(size=full.shape)).astype(np.complex64)
    mask = rng.random((examples, 1, width)) < 0.3
    for example in range(examples):
        half = (low + 2 * example) // 2
        mask[example, 0, width // 2 - half - 1 : width // 2 + half] = True
    return np.where(mask[:, None], full, 0), mask, np.zeros((examples, 1, 1), np.float32)


@functools.cache
def _apply(model: VarNet):
    """Jit the network, once for all tests."""
    return jax.jit(model.apply)


@functools.cache
def _untrained(model: VarNet) -> dict:
    """Initial parameters: they do not depend on the size of the inputs."""
    return jax.device_get(jax.jit(model.init)(jax.random.key(0), *_inputs(1, 1, 32, 30)))


def _trained(model: VarNet) -> dict:
    """Parameters as after some training: the last layers of the cascades start at zero, and would hide the rest."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), _untrained(model))


@pytest.mark.slow
def test_size_published_for_fastmri() -> None:
    """Counted for one and two cascades: tracing all twelve takes seconds."""

    def count(cascades: int) -> int:
        init = VarNet(cascades=cascades).init
        shapes = jax.eval_shape(init, jax.random.key(0), *_inputs(1, 1, 32, 32))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count(1) + (VarNet().cascades - 1) * (count(2) - count(1)) == 29_936_966


@pytest.mark.peer
@pytest.mark.parametrize(
    ("coils", "height", "width", "levels"),
    [(1, 40, 33, (2, 2)), (3, 37, 46, (2, 3)), pytest.param(2, 64, 48, (4, 4), marks=pytest.mark.slow)],
)
def test_equals_fastmri(coils: int, height: int, width: int, levels: tuple[int, int]) -> None:
    """Same weights, same k-space, same mask: same image, and the same gradients through all cascades."""
    import fastmri.models
    import torch

    torch.manual_seed(1)
    fields = {"channels": 4, "levels": levels[0], "cascades": 2, "sens_channels": 3, "sens_levels": levels[1]}
    peer = fastmri.models.VarNet(num_cascades=2, sens_chans=3, sens_pools=levels[1], chans=4, pools=levels[0]).double()
    for cascade in peer.cascades:
        cascade.dc_weight.data.uniform_(0.5, 1.5)
    kspace, mask, offset = _inputs(2, coils, height, width)

    parts = torch.view_as_real(torch.from_numpy(kspace.astype(np.complex128)))
    expected = peer(parts, torch.from_numpy(mask[:, None, :, :, None]))
    (1e8 * expected.square().mean()).backward()

    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        output = model.apply({"params": params}, kspace, mask, offset)[..., 0]
        return 1e8 * jnp.mean(output**2), output

    network = from_fastmri({name: value.numpy() for name, value in peer.state_dict().items()})
    assert (network.name, network.fields) == ("varnet", fields)
    model = VarNet(**network.fields)
    gradients, output = jax.jit(jax.grad(loss, has_aux=True))(network.params)
    expected = expected.detach().numpy()
    assert np.abs(output - expected).max() < 1e-4 * np.abs(expected).max()
    theirs = from_fastmri({name: value.grad.numpy() for name, value in peer.named_parameters()}).params
    norm = lambda tree: np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in jax.tree.leaves(tree)))  # noqa: E731
    assert norm(jax.tree.map(lambda a, b: np.asarray(a) - b, gradients, theirs)) < 5e-3 * norm(theirs)


@pytest.mark.peer
def test_centre_is_fastmris() -> None:
    """For every shape of contiguous centre, even and odd widths, a lone column and everything sampled."""
    import torch
    from fastmri.models import varnet

    find = varnet.SensitivityModel(2, 1).get_pad_and_num_low_freqs
    for width in (17, 18):
        rng = np.random.default_rng(width)
        masks = rng.random((64, 1, width)) < np.linspace(0.3, 1, 64)[:, None, None]
        masks[:, :, width // 2] = True
        start, count = (x.numpy()[:, None, None] for x in find(torch.from_numpy(masks[:, None, :, :, None])))
        position = np.arange(width)
        np.testing.assert_array_equal(find_centre(jnp.asarray(masks)), (position >= start) & (position < start + count))
        assert len(np.unique(count)) > 3


def test_centre_of_two_dimensions_is_all_sampled_and_as_large_as_can_be() -> None:
    mask = np.zeros((3, 24, 32), bool)
    mask[0, 9:16, 12:21] = True
    mask[0, ::3, ::4] = True
    mask[1] = True
    mask[2, 12, 16] = True
    found = np.asarray(find_centre(jnp.asarray(mask)))
    assert not (found & ~mask).any()
    assert [int(part.sum()) for part in found] == [7 * 9, 24 * 32, 1]


@pytest.mark.slow
def test_empty_slice_has_a_finite_gradient() -> None:
    kspace, mask, offset = _inputs(2, 2, 24, 20)
    kspace[1] = 0
    model = TINY.clone(cascades=1)
    loss = lambda params: jnp.sum(model.apply(params, kspace, mask, offset))  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(_trained(model))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_offset_is_subtracted_and_scale_goes_through() -> None:
    """So that the normalisation of the images does not matter: the network is as it is in the file's own units."""
    kspace, mask, offset = _inputs(2, 2, 24, 20)
    output = _apply(TINY)(_trained(TINY), kspace, mask, offset)
    scaled = _apply(TINY)(_trained(TINY), 1e4 * kspace, mask, offset + 0.5)
    np.testing.assert_allclose(scaled + 0.5, 1e4 * output, rtol=1e-4, atol=1e-4 * np.abs(output).max() * 1e4)


@pytest.mark.slow
def test_rematerialised_cascades_compute_the_same() -> None:
    inputs = _inputs(1, 2, 24, 20)
    model = TINY.clone(cascades=1)
    params = _trained(model)

    def gradient(remat: bool):
        loss = lambda params: 1e8 * jnp.mean(model.clone(remat=remat).apply(params, *inputs) ** 2)  # noqa: E731
        traced = jax.jit(jax.grad(loss)).trace(params)
        return traced.lower().compile()(params), str(traced.jaxpr).count("fft[")

    (kept, transforms), (again, more) = gradient(False), gradient(True)
    assert more > transforms > 0
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)


def test_bfloat16_computes_the_same_network() -> None:
    inputs = _inputs(2, 2, 24, 20)
    output = _apply(TINY.clone(dtype=jnp.bfloat16))(_trained(TINY), *inputs)
    expected = _apply(TINY)(_trained(TINY), *inputs)
    assert output.dtype == jnp.float32
    assert 0 < np.linalg.norm(output - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.xfail(
    jax.__version_info__ >= (0, 11),
    reason="XLA's CPU backend of JAX 0.12 cannot lay out the FFT that it makes of split rows (RET_CHECK in fft_thunk)",
    raises=jax.errors.JaxRuntimeError,
    strict=False,
)
def test_meshes_compute_the_same() -> None:
    """Examples split over some devices, rows of the result over others, as the loss compares them."""
    if len(jax.devices()) < 4:
        pytest.skip("XLA_FLAGS=--xla_force_host_platform_device_count=8 gives eight devices")
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 1, 2), ("data", "model", "spatial"))
    model = TINY.clone(cascades=1)
    kspace, mask, offset = _inputs(2, 2, 24, 20)
    params = _trained(model)

    place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    examples = ("data", "model")

    def value_and_gradient(rows: NamedSharding | None, params: dict, *inputs: jax.Array) -> tuple[jax.Array, dict]:
        def loss(params: dict, *inputs: jax.Array) -> jax.Array:
            output = model.apply(params, *inputs)
            return 1e8 * jnp.mean((jax.lax.with_sharding_constraint(output, rows) if rows else output) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params, *inputs)

    whole = value_and_gradient(None, params, kspace, mask, offset)
    rows = NamedSharding(mesh, PartitionSpec(examples, "spatial"))
    split = (place(x, examples) for x in (kspace, mask, offset))
    sharded = value_and_gradient(rows, jax.tree.map(lambda leaf: place(leaf), params), *split)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)


@pytest.mark.slow
def test_smallest_side_is_computed() -> None:
    model = TINY.clone(levels=4, cascades=1)
    side = VarNet.smallest_side(4)
    output = _apply(model)(_trained(model), *_inputs(1, 1, side, side))
    assert np.ptp(output) > 0


def test_an_untrained_network_gives_the_zero_filled_image() -> None:
    """What a cascade takes away starts at nothing but a constant: the first steps need not undo a random network."""
    given = kspace, *_ = _inputs(2, 2, 24, 20)
    image = _apply(TINY)(_untrained(TINY), *given)[..., 0]
    zero_filled = np.asarray(magnitude(kspace))
    assert np.linalg.norm(image - zero_filled) < 0.1 * np.linalg.norm(zero_filled)


@pytest.mark.slow
@pytest.mark.parametrize("coils", [1, 3])
def test_an_untrained_residual_network_is_compressed_sensing_with_the_measured_samples_kept(coils: int) -> None:
    """Its corrections start at nothing; against the functions of `mri`, which are tested for themselves."""
    kspace, mask, _ = given = _inputs(1, coils, 32, 30)
    image = _apply(RESIDUAL)(_untrained(RESIDUAL), *given)[0, ..., 0]

    @jax.jit
    def expect(kspace: jax.Array, mask: jax.Array) -> jax.Array:
        sigma = estimate_sigma(kspace, mask)
        maps, weight = estimate_maps(kspace, mask, sigma), compressed_sensing.noise_weight(mask, sigma)
        solution = fft2c(maps * compressed_sensing.reconstruct(kspace, mask, maps, weight=weight, iterations=30))
        return magnitude(jnp.where(mask, kspace, solution))

    expected = np.asarray(expect(kspace[0], mask[0]))
    np.testing.assert_allclose(image, expected, atol=1e-4 * expected.max())
    assert np.linalg.norm(expected - magnitude(kspace[0])) > 0.01 * np.linalg.norm(expected)


@pytest.mark.slow
def test_an_empty_coil_changes_nothing_in_a_residual_network() -> None:
    kspace, mask, offset = _inputs(1, 3, 32, 30)
    params = jax.tree.map(lambda x: x + 0.1, _untrained(RESIDUAL))
    padded = np.concatenate([kspace, np.zeros_like(kspace[:, :1])], 1)
    images = [_apply(RESIDUAL)(params, x, mask, offset) for x in (kspace, padded)]
    np.testing.assert_allclose(*images, atol=1e-3 * float(images[0].max()))
