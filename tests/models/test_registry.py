"""Networks by name, their inputs, and what holds for all of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import coil_images, to_kspace
from flax import linen as nn

from mrjax import config as configs
from mrjax import models
from mrjax.errors import UserError
from mrjax.models import MODELS, NetworkInputs
from mrjax.models.unet_dc import ConsistentUNet


def test_registry_names_what_was_meant() -> None:
    for field, value, expected in (
        ("name", "unett", "config.model.name is 'unett', expected 'unet' or 'unet_dc' or 'varnet'"),
        ("pool", "mean", "config.model.pool is 'mean', expected 'max' or 'avg'"),
        ("chanels", 8, "config.model.chanels is not a field, the nearest known one is config.model.channels"),
    ):
        config = configs.defaults().unlock()
        config.model[field] = value
        with pytest.raises(UserError, match=re.escape(expected)):
            configs.check(config)


def test_a_network_from_outside_needs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Module):
        width: int = 3
        input_names = ("image", "offset")

        @nn.compact
        def __call__(self, image: jax.Array, offset: jax.Array) -> jax.Array:
            return nn.Conv(1, (self.width, self.width))(image) + offset[..., None]

    monkeypatch.setitem(MODELS, "mine", Mine)
    assert models.attribute_names("mine") == ["width"]
    model = Mine(width=5)
    inputs = NetworkInputs(jnp.ones((1, 8, 8, 1)), None, None, jnp.ones((1, 1, 1)))
    output, params = model.init_with_output(jax.random.key(0), *models.select_inputs(model, inputs))
    assert output.shape == (1, 8, 8, 1)
    assert params["params"]["Conv_0"]["kernel"].shape == (5, 5, 1, 1)


def test_a_network_of_kspace_is_refused_without_it() -> None:
    inputs = NetworkInputs(jnp.ones((1, 8, 8, 1)), None, None, jnp.zeros((1, 1, 1)))
    with pytest.raises(UserError, match=r"config\.model\.name .* needs kspace, expected config\.task = 'kspace'"):
        models.select_inputs(ConsistentUNet(), inputs)


SMALL = {
    "unet": {"channels": 2, "levels": 1},
    "unet_dc": {"channels": 2, "levels": 1},
    "varnet": {"channels": 2, "levels": 1, "cascades": 2, "sens_channels": 2, "sens_levels": 1},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "unet" else []) for n in MODELS])
def test_coils_padded_with_zeros_change_no_result_and_no_gradient(name: str) -> None:
    """Batches hold them where files differ in their number of coils."""
    model, rng = MODELS[name](**SMALL[name]), np.random.default_rng(0)
    mask = rng.random((2, 1, 20)) < 0.5
    mask[..., 7:13] = True
    kspace = to_kspace(coil_images(2, 3, 24, 20))
    kspace += 0.02 * rng.normal(size=(2, 3, 24, 20, 2)).view(np.complex128)[..., 0].astype(np.complex64)
    kspace = np.where(mask[:, None], kspace, 0)
    image = rng.random((2, 24, 20, 1), dtype=np.float32)
    inputs = NetworkInputs(image, kspace, mask, np.full((2, 1, 1), 0.05, np.float32))
    padded = inputs._replace(kspace=np.concatenate([kspace, np.zeros((2, 2, 24, 20), np.complex64)], 1))
    params = jax.jit(model.init)(jax.random.key(0), *models.select_inputs(model, inputs))
    # As after some training: last layers start at zero, and would hide the rest.
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)

    @jax.jit
    def value_and_gradient(inputs: NetworkInputs) -> tuple[jax.Array, dict]:
        apply = lambda params: model.apply(params, *models.select_inputs(model, inputs))  # noqa: E731
        output, pullback = jax.vjp(apply, params)
        return output, pullback(jnp.ones_like(output))[0]

    (output, gradient), (other, same) = value_and_gradient(inputs), value_and_gradient(padded)
    assert np.abs(other - output).max() <= 1e-5 * np.abs(output).max()
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)
