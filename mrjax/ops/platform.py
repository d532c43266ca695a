"""Which form of a computation a platform gets."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def by_platform(*args: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """What the form for the platform that this is traced for makes of the arguments: `cpu`, `tpu`, or the default.

    Inside a `shard_map` the mesh names the platform, and no other form is traced: a run starts sooner. Elsewhere the
    forms are all traced, and XLA is given one (`lax.platform_dependent`).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return lax.platform_dependent(*args, default=default, **forms)
    return forms.get(device.platform, default)(*args)
