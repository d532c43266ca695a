"""What the reference of pooling does not tell: odd sizes and equal values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.ops import reference
from mrjax.ops.features import FeatureMap
from mrjax.ops.pooling import avg_pool, max_pool


def test_max_pool_drops_the_odd_and_gives_the_gradient_to_the_first_of_equals() -> None:
    x = jnp.asarray([[1, 2, 9], [4, 4, 9], [9, 9, 9]], jnp.float32)[None, :, :, None]
    pooled, pullback = jax.vjp(lambda x: max_pool(FeatureMap(x)).data, x)
    assert pooled.tolist() == [[[[4]]]]
    assert pullback(pooled)[0][0, :, :, 0].tolist() == [[0, 0, 0], [4, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("pool", "plain", "error"), [(max_pool, reference.max_pool, 0), (avg_pool, reference.avg_pool, 1e-6)]
)
def test_odd_sizes_equal_the_reference(pool, plain, error: float) -> None:
    x = np.random.default_rng(0).random((2, 7, 9, 3), dtype=np.float32)

    @jax.jit
    def both(x: jax.Array) -> tuple:
        pairs = [jax.vjp(f, x) for f in (lambda x: pool(FeatureMap(x)).data, plain)]
        return [(pooled, pullback(pooled)[0]) for pooled, pullback in pairs]

    for found, expected in zip(*both(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=error)
