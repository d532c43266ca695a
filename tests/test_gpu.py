"""On a GPU: the training step runs in both precisions and in parts, agrees with a CPU, gives the same bits twice."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

STEPS = 3
# In a process of its own, since one process holds one kind of device: prints each step's loss and norm of the
# gradients, and a hash of the parameters after the last one.
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


def run(precision: str, platform: str, accumulate: int = 1) -> tuple[np.ndarray, list[str]]:
    """(losses and norms of the gradients, [platform, hash]) of a few training steps."""
    names = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    names |= {
        "JAX_PLATFORMS": platform,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-c", PROGRAM, precision, str(accumulate)]
    shown = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=names, capture_output=True, text=True, timeout=300
    )
    assert shown.returncode == 0, shown.stderr
    *steps, last = shown.stdout.splitlines()
    return np.array([line.split() for line in steps], float), last.split()


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_a_step_agrees_with_the_cpus_and_with_itself(precision: str, tolerance: float) -> None:
    steps, (backend, digest) = run(precision, "cuda")
    assert backend == "gpu"
    assert len(steps) == STEPS
    assert steps[-1, 0] != steps[0, 0]
    assert run(precision, "cuda")[1][1] == digest
    on_cpu, (backend, _) = run("float32", "cpu")
    assert backend == "cpu"
    np.testing.assert_allclose(steps[:, 0], on_cpu[:, 0], rtol=tolerance)


def test_a_step_in_parts_is_the_whole_one() -> None:
    """Guards the optimization barriers inside the scan over the parts: XLA's CPU backend computes wrong gradients."""
    whole, (backend, _) = run("float32", "cuda")
    parts, _ = run("float32", "cuda", accumulate=2)
    assert backend == "gpu"
    np.testing.assert_allclose(parts, whole, rtol=1e-3)
