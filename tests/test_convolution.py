"""The convolution for few channels is the library's, to rounding, and only a CPU compiles it otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mrjax.models.convolution import convolve


def images(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def reference(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """SciPy's correlation in float64, channel by channel."""
    result = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for b in range(len(x)):
        for i in range(kernel.shape[2]):
            for o in range(kernel.shape[3]):
                result[b, ..., o] += ndimage.correlate(x[b, ..., i], kernel[..., i, o], mode="constant")
    return result


@pytest.mark.parametrize(("cin", "cout"), [(1, 4), (2, 4), (4, 4), (3, 12), (12, 4)])
def test_convolution_and_gradients_equal_float64(cin: int, cout: int) -> None:
    x, kernel, gradient = images(2, 9, 12, cin, seed=0), images(3, 3, cin, cout, seed=1), images(2, 9, 12, cout, seed=2)
    narrow = [jnp.asarray(a, jnp.float32) for a in (x, kernel, gradient)]
    result, pullback = jax.vjp(convolve, *narrow[:2])
    of_x, of_kernel = pullback(narrow[2])
    np.testing.assert_allclose(result, reference(x, kernel), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(of_x, reference(gradient, kernel[::-1, ::-1].swapaxes(2, 3)), rtol=1e-5, atol=2e-5)
    # The convolution is linear in its kernel: the gradient is that of <gradient, result> by each weight.
    for weight in np.ndindex(3, 3, cin, cout):
        if sum(weight) % 5 == 0:
            unit = np.zeros(kernel.shape)
            unit[weight] = 1
            assert of_kernel[weight] == pytest.approx((gradient * reference(x, unit)).sum(), rel=1e-4, abs=1e-4)


def test_bfloat16_is_summed_in_float32() -> None:
    x, kernel = (jnp.asarray(images(*shape, seed=3), jnp.bfloat16) for shape in ((1, 8, 8, 4), (3, 3, 4, 4)))
    exact = reference(np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    assert np.abs(np.asarray(convolve(x, kernel), np.float64) - exact).max() <= 2.0**-8 * np.abs(exact).max()


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_accelerators_see_the_librarys_convolution_alone(platform: str, convolutions: int) -> None:
    def three(x: jax.Array, kernel: jax.Array, gradient: jax.Array):
        result, pullback = jax.vjp(convolve, x, kernel)
        return result, pullback(gradient)

    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.float32)
    text = jax.jit(three).trace(x, kernel, x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions
