"""The convolution in C++ equals float64 to rounding, runs on CPUs alone, and XLA's runs elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mrjax.ops.convolution import convolve_array
from mrjax.parallel import sharding


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


def reference_gradient(x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The kernel's gradient in float64: sums of products of the shifted image and the gradient."""
    padded, (height, width) = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), x.shape[1:3]
    shifts = [[padded[:, row : row + height, column : column + width] for column in range(3)] for row in range(3)]
    return np.einsum("yxbhwi,bhwo->yxio", np.array(shifts), gradient)


def on_one_device(function, mesh=None):
    """Jit a function as one device of a mesh computes it, the only place where the C++ operations run."""
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    return jax.jit(lambda *args: sharding.per_device(function, mesh, replicated_args=len(args) - 1)(*args))


def with_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
    result, pullback = jax.vjp(convolve_array, x, kernel)
    return result, *pullback(gradient)


SHAPES = [
    *[(2, 9, 12, 1, 4), (1, 8, 8, 4, 4), (2, 9, 12, 3, 12), (1, 5, 33, 8, 8), (1, 7, 19, 17, 31), (1, 6, 10, 32, 33)],
    *[
        (3, 1, 1, 5, 3),
        (1, 1, 40, 2, 16),
        (1, 40, 1, 16, 2),
        (2, 2, 2, 65, 96),
        (1, 3, 13, 130, 40),
        (1, 18, 15, 15, 1),
    ],
    *[(1, 70, 300, 33, 20)],
]


@pytest.mark.parametrize(("batch", "height", "width", "cin", "cout"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolution_and_gradients_equal_float64(
    batch: int, height: int, width: int, cin: int, cout: int, dtype: str
) -> None:
    shapes = ((batch, height, width, cin), (3, 3, cin, cout), (batch, height, width, cout))
    given = [jnp.asarray(images(*shape, seed=seed), dtype) for seed, shape in enumerate(shapes)]
    x, kernel, gradient = (np.asarray(a, np.float64) for a in given)
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    exact = reference(x, kernel), reference(gradient, flipped), reference_gradient(x, gradient)
    for ours, theirs in zip(on_one_device(with_gradients)(*given), exact, strict=True):
        assert ours.dtype == dtype
        # Sums are float32, so that bfloat16's own rounding, of the result alone, is what may be seen of it.
        error = 2e-6 if dtype == "float32" else 2.0**-8
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=error * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize(("batch", "height", "width", "cin", "cout"), SHAPES)
def test_1x1_convolution_and_gradients_equal_float64(batch: int, height: int, width: int, cin: int, cout: int) -> None:
    shapes = ((batch, height, width, cin), (1, 1, cin, cout), (batch, height, width, cout))
    given = [jnp.asarray(images(*shape, seed=seed), "bfloat16") for seed, shape in enumerate(shapes)]
    x, kernel, gradient = (np.asarray(a, np.float64) for a in given)
    matrix = kernel[0, 0]
    exact = x @ matrix, gradient @ matrix.T, np.einsum("bhwi,bhwo->io", x, gradient)[None, None]
    for ours, theirs in zip(on_one_device(with_gradients)(*given), exact, strict=True):
        assert ours.dtype == "bfloat16"
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=2.0**-8 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_accelerators_compile_xlas_convolution_alone(platform: str, convolutions: int) -> None:
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.float32)
    mesh = sharding.make_mesh(devices=jax.devices()[:1]).abstract_mesh
    there = mesh.update(abstract_device=jax.sharding.AbstractDevice(platform, None, platform))
    text = on_one_device(with_gradients, there).trace(x, kernel, x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("mrjax_") == 3 - convolutions


@pytest.mark.parametrize(
    ("dtype", "batch", "side"), [("float16", 2, 3), ("float32", 2, 5), ("float32", 0, 3), ("bfloat16", 0, 1)]
)
def test_unsupported_shapes_and_dtypes_use_xla(dtype: str, batch: int, side: int) -> None:
    x, kernel = jnp.ones((batch, 6, 6, 2), dtype), jnp.ones((side, side, 2, 4), dtype)
    result, pullback = jax.vjp(on_one_device(convolve_array), x, kernel)
    assert result.shape == (batch, 6, 6, 4)
    assert (result[:, 3, 3] == 2 * side**2).all()
    assert pullback(result)[1].shape == kernel.shape


def test_vmap_equals_a_batch() -> None:
    x, kernel = (jnp.asarray(images(*shape, seed=0), jnp.float32) for shape in ((3, 1, 6, 7, 2), (3, 3, 2, 4)))
    mapped = on_one_device(jax.vmap(convolve_array, (0, None)))(x, kernel)
    np.testing.assert_allclose(mapped, on_one_device(convolve_array)(x[:, 0], kernel)[:, None], rtol=1e-6)


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "CXX")}
    return subprocess.run(
        [sys.executable, "-c", program], env=kept | environment, capture_output=True, text=True, check=True
    )


@pytest.mark.slow
def test_xla_is_used_without_a_compiler(tmp_path: Path) -> None:
    program = """
import jax, jax.numpy as jnp
from mrjax.ops.convolution import convolve_array
for _ in range(2):
    print(jax.jit(convolve_array).lower(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))).as_text().count("mrjax_"))
"""
    for environment in ({"PATH": str(tmp_path)}, {"CXX": "false"}):
        result = run(program, **environment)
        assert result.stdout.split() == ["0", "0"]
        assert result.stderr.count("slower") == 1


@pytest.mark.slow
def test_results_are_bit_identical_for_any_number_of_threads() -> None:
    program = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["CORES"])])
import hashlib, jax, numpy as np
from mrjax.ops.cpu import native
from mrjax.ops.convolution import convolve_array
assert native.available()
shapes = (3, 64, 50, 24), (3, 3, 24, 40), (3, 64, 50, 40)
for dtype in ("float32", "bfloat16"):
    x, kernel, gradient = (jax.numpy.asarray(np.random.default_rng(0).normal(size=shape), dtype) for shape in shapes)
    result, pullback = jax.vjp(convolve_array, x, kernel)
    print(*(hashlib.sha256(np.asarray(a).tobytes()).hexdigest() for a in (result, *pullback(gradient))))
"""
    one, all_ = (run(program, CORES=cores).stdout for cores in ("1", "1000"))
    assert one == all_
