"""How XLA is asked to compile a training step: the one place where its options are set.

XLA_FLAGS (GPU, CPU) and LIBTPU_INIT_ARGS (TPU) in the environment win over what is set here, option by option.
"""

import os

from jax.sharding import Mesh

OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "gpu": {
        # The same run must give the same bits: algorithms that add in no fixed order are left out of the autotuning.
        "xla_gpu_exclude_nondeterministic_ops": True,
        # Gradients travel while the layers below are still computed, in packets of about 4 MB: by default those of 8 M
        # parameters would be copied into one, which leaves when the last one is there.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_reduce_combine_threshold_bytes": 4 << 20,
    },
    "tpu": {"xla_tpu_enable_latency_hiding_scheduler": True},
    "cpu": {},
}


def options(mesh: Mesh) -> dict[str, bool | int | str]:
    """Options for `jax.jit` by the kind of the mesh's devices, without those that the environment names."""
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    named = os.environ.get("LIBTPU_INIT_ARGS" if platform == "tpu" else "XLA_FLAGS", "")
    return {name: value for name, value in OPTIONS.get(platform, {}).items() if f"--{name}" not in named}
