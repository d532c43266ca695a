"""Choose the form of a computation by the platform it is traced for, and barriers for XLA's optimizer."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def traced_platform() -> str:
    """Return the platform of the mesh that is traced for ("cpu", "tpu", "cuda"), JAX's default outside of a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def by_platform(*args: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """Call the form for the platform that is traced for: one of `forms` (cpu=, tpu=) or the default."""
    return forms.get(traced_platform(), default)(*args)


def optimization_barrier(values: Any) -> Any:
    """Return the values unchanged, and keep XLA from recomputing them, or from storing what they are computed from.

    Not on CPUs, where it gains nothing and XLA (JAX 0.10) computes wrong gradients with it inside a `lax.scan`.
    """
    return by_platform(values, cpu=lambda x: x, default=lax.optimization_barrier)


@jax.custom_vjp
def gradient_barrier(values: Any) -> Any:
    """Return the values unchanged; the gradients of all are computed before any of them is used.

    Otherwise XLA puts off the gradients of kernels until devices exchange them, and stores what they are computed from.
    Not on TPUs, where it would keep a normalisation's statistics from being fused into the convolution's gradient.
    """
    return values


gradient_barrier.defvjp(
    lambda values: (values, None),
    lambda _, gradients: (by_platform(gradients, tpu=lambda x: x, default=optimization_barrier),),
)
