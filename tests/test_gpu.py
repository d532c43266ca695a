"""On a GPU: the training step agrees with a CPU in both precisions, repeats its bits, and accumulates gradients."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

STEPS = 3
# Print the loss and the gradient norm of each step, then the platform and a hash of the final state. This runs in a
# process of its own, because one process holds one kind of device.
PROGRAM = f"""
import hashlib, sys
import jax
from benchmarks.step_time import Case, compile_step, make_arguments, make_config
from mrjax.parallel import sharding

config, mesh = make_config(Case(sys.argv[1], 128, 16, 8), 3), sharding.make_mesh()
config.grad_accumulation_steps = int(sys.argv[2])
compiled, _ = compile_step(config, mesh, coils=4)
state, batch = make_arguments(config, mesh, coils=4)
for _ in range({STEPS}):
    state, metrics = compiled(state, batch)
    print(float(metrics["loss"]), float(metrics["grad_norm"]))
digest = hashlib.sha256()
for leaf in jax.tree.leaves(jax.device_get(state)):
    digest.update(leaf.tobytes())
print(jax.default_backend(), digest.hexdigest())
"""


def run_steps(precision: str, platform: str, accumulation_steps: int = 1) -> tuple[np.ndarray, list[str]]:
    """Run `STEPS` training steps; return (steps, 2) losses and gradient norms, and [platform, hash of the state]."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    env |= {
        "JAX_PLATFORMS": platform,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-c", PROGRAM, precision, str(accumulation_steps)]
    finished = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    *steps, last = finished.stdout.splitlines()
    return np.array([line.split() for line in steps], float), last.split()


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_a_step_agrees_with_the_cpu_and_repeats_its_bits(precision: str, tolerance: float) -> None:
    steps, (backend, digest) = run_steps(precision, "cuda")
    assert backend == "gpu"
    assert len(steps) == STEPS
    assert steps[-1, 0] != steps[0, 0]
    assert run_steps(precision, "cuda")[1][1] == digest
    on_cpu, (backend, _) = run_steps("float32", "cpu")
    assert backend == "cpu"
    np.testing.assert_allclose(steps[:, 0], on_cpu[:, 0], rtol=tolerance)


def test_gradient_accumulation_gives_the_step_of_the_whole_batch() -> None:
    """Guards the optimization barriers in the scan over parts of the batch, where XLA's CPU backend is wrong."""
    whole, (backend, _) = run_steps("float32", "cuda")
    parts, _ = run_steps("float32", "cuda", accumulation_steps=2)
    assert backend == "gpu"
    np.testing.assert_allclose(parts, whole, rtol=1e-3)
