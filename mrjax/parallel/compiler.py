"""Set XLA's options for the training step; XLA_FLAGS and LIBTPU_INIT_ARGS in the environment win, option by option."""

import os

from jax.sharding import Mesh

OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "gpu": {
        # The same run must give the same bits: autotuning may not choose algorithms that add in no fixed order.
        "xla_gpu_exclude_nondeterministic_ops": True,
        # Overlap the all-reduce of gradients with the backward pass, in buckets of 4 MB: by default, those of 8 million
        # parameters go into one bucket, which is sent after the last gradient.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_reduce_combine_threshold_bytes": 4 << 20,
    },
    "tpu": {"xla_tpu_enable_latency_hiding_scheduler": True},
}


def options(mesh: Mesh) -> dict[str, bool | int | str]:
    """Return the options for `jax.jit` on the mesh's devices, without those that the environment sets."""
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    given = os.environ.get("LIBTPU_INIT_ARGS" if platform == "tpu" else "XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.get(platform, {}).items() if f"--{name}" not in given}
