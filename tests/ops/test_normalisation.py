"""Instance norm is exact where it is delicate: statistics in one pass, bfloat16, constant channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.ops.features import FeatureMap
from mrjax.ops.normalisation import norm_act


def norm_act_array(x: jax.Array) -> jax.Array:
    return norm_act(FeatureMap(x)).data


def float64_norm_act(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    normal = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    return np.where(normal >= 0, normal, 0.2 * normal)


@pytest.mark.parametrize("offset", [0, 1, 10])
def test_one_pass_statistics_equal_float64(offset: float) -> None:
    """Guards against cancellation in E[x^2] - E[x]^2, up to means ten times the standard deviation."""
    x = np.random.default_rng(0).normal(offset, 1, (2, 256, 256, 8)).astype(np.float32)
    error = jax.jit(norm_act_array)(x) - float64_norm_act(x)
    assert np.abs(error).max() < 1e-4


def test_statistics_are_float32_for_bfloat16() -> None:
    """65536 values summed in bfloat16 would stop growing at 256."""
    x = jnp.asarray(np.random.default_rng(0).normal(1, 1, (1, 256, 256, 2)), jnp.bfloat16)
    result = jax.jit(norm_act_array)(x)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), float64_norm_act(np.asarray(x)), 1e-2, 1e-3)


def test_constant_channels_normalise_to_zero() -> None:
    """A variance that rounds below zero must not become NaN, forwards or backwards."""
    x = jnp.full((1, 17, 19, 3), 0.1)
    result, gradient = jax.jit(lambda x: (norm_act_array(x), jax.vjp(norm_act_array, x)[1](x)[0]))(x)
    np.testing.assert_allclose(result, 0, atol=1e-3)
    assert np.isfinite(gradient).all()
