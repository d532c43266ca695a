"""Every platform gets its own form and no other."""

import jax
import jax.numpy as jnp
import pytest

from mrjax.ops.platform import by_platform
from mrjax.parallel import sharding

FORMS = {"cpu": "stablehlo.sine", "tpu": "stablehlo.cosine", "cuda": "stablehlo.sqrt"}


@pytest.mark.parametrize(("platform", "inside"), [("cpu", True), ("tpu", True), ("cuda", True), ("cpu", False)])
def test_a_platform_gets_its_form_alone(platform: str, inside: bool) -> None:
    def function(x: jax.Array) -> jax.Array:
        return by_platform(x, cpu=jnp.sin, tpu=jnp.cos, default=jnp.sqrt)

    if inside:
        mesh = sharding.make_mesh(devices=jax.devices()[:1]).abstract_mesh
        there = mesh.update(abstract_device=jax.sharding.AbstractDevice(platform, None, platform))
        function = sharding.per_device(function, there)
    traced = jax.jit(function).trace(jax.ShapeDtypeStruct((4,), jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert [form for form in FORMS.values() if form in text] == [FORMS[platform]]
