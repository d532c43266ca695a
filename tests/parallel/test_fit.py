"""The count of moved bytes against hand-computed figures, and compilation ahead of time."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AOT_PYTHON, ROOT
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import fit, hlo, programs
from mrjax.config import defaults
from mrjax.errors import UserError
from mrjax.parallel import sharding


def config(**fields):
    base = defaults()
    base.model.channels, base.model.levels, base.data.image_size, base.batch_size = 4, 2, (32, 32), 8
    base.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return base


def compiled_instructions(function, *args) -> list[hlo.Instruction]:
    return list(hlo.instructions(jax.jit(function).lower(*args).compile().as_text()))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[16,256,256,32]{3,2,1,0}", 2 * 16 * 256 * 256 * 32),
        ("(c64[2,3]{1,0}, /*index=1*/pred[5]{0}, u8[0]{0})", 53),
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("f8e4m3fn[7]{0}", 7),
        ("s4[6]{0}", 3),
    ],
)
def test_bytes_are_counted_from_shapes(shape: str, size: int) -> None:
    assert hlo.size_of(shape) == size


def test_traffic_is_operands_and_results() -> None:
    a, b = jnp.ones((64, 32)), jnp.ones((32, 16))
    assert sum(one.moved for one in compiled_instructions(jnp.dot, a, b)) == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_loops_count_as_often_as_they_run() -> None:
    a = jnp.ones((32, 32))

    def loop(a: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ a, None), a, length=7)[0]

    (product,) = (one for one in compiled_instructions(loop, a) if one.source.endswith("dot_general"))
    assert (product.times, product.moved) == (7, 7 * 3 * 4 * 32 * 32)


def test_collectives_are_counted_by_kind() -> None:
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    split, whole = NamedSharding(mesh, PartitionSpec("data")), sharding.replicated(mesh)
    x = jax.device_put(np.ones((16, 8), np.float32), split)

    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, whole)

    assert hlo.collectives(compiled_instructions(gather, x)) == {"all-gather": (1, 4 * 16 * 8)}
    assert hlo.collectives(compiled_instructions(lambda x: x.sum(0), x)) == {"all-reduce": (1, 4 * 8)}


def test_asynchronous_collectives_count_once() -> None:
    text = """
ENTRY %main (p: f32[4]) -> f32[32] {
  %p = f32[4]{0} parameter(0)
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}
  ROOT %done = f32[32]{0} all-gather-done(%start)
}
"""
    assert hlo.collectives(list(hlo.instructions(text))) == {"all-gather": (1, 128)}


def test_main_memory_of_a_tpu_is_padded_and_leaves_out_what_is_on_the_chip() -> None:
    assert hlo.stored("bf16[16,256,256,32]{3,2,1,0}") == hlo.size_of("bf16[16,256,256,32]")
    assert hlo.stored("bf16[4,8,3]{2,1,0:T(8,128)(2,1)}") == 2 * 4 * 8 * 128
    assert hlo.stored("f32[5,130]{0,1:T(8,128)}") == 4 * 136 * 128
    assert hlo.stored("(f32[130]{0:T(128)}, f32[8,128]{1,0:T(8,128)S(1)})") == 4 * 256
    text = """
ENTRY %main (p: f32[4,128]) -> f32[1,128] {
  %p = f32[16,128]{1,0:T(8,128)} parameter(0)
  %start = ((f32[16,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p)
  ROOT %done = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%start)
}
"""
    (start,) = hlo.instructions(text)
    assert 0 <= start.stored - 4 * 8 * 128 <= 8  # and its semaphore


@pytest.mark.slow
def test_a_data_parallel_step_exchanges_its_gradients_and_nothing_else() -> None:
    """4 bytes a parameter, and a handful for the loss; and so on one device there is nothing to exchange."""
    cfg = config(model__levels=1)
    for devices, expected in ((8, True), (1, False)):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        compiled, _ = programs.compile_train_step(cfg, mesh, programs.abstract_batch(cfg, mesh, 2))
        gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(programs.abstract_state(cfg, mesh).params))
        sent = hlo.collectives(list(hlo.instructions(compiled.as_text())))
        assert set(sent) == ({"all-reduce"} if expected else set())
        if expected:
            assert 0 <= sent["all-reduce"][1] - gradients < 64


@pytest.mark.slow
def test_flops_are_those_published_for_fastmri() -> None:
    """72.2 GFLOP an image of 256x256 for training, by convolutions and matrix products alone."""
    cfg = config(model__channels=32, model__levels=4, data__image_size=(256, 256))
    mesh = sharding.make_mesh()
    train_step = programs.jit_train_step(cfg, mesh)
    traced = train_step.trace(programs.abstract_state(cfg, mesh), programs.abstract_batch(cfg, mesh, 4))
    assert programs.count_flops(traced.jaxpr.jaxpr) / 8 == pytest.approx(72.2e9, rel=2e-3)


@pytest.mark.parametrize("target", ["h200", "h100:8", "v5e", "v5e:4x4x4", "v5p:2x2", "h100:0x8", "", "v5e:4x"])
def test_unknown_targets_list_the_known_ones(target: str) -> None:
    with pytest.raises(UserError, match=r"--target is .*, expected h100 or a100, .*h100:2x8.*v5e:4x4, v6e:4x4 or v5p"):
        fit.parse_target(target)


def test_targets_parse_to_topologies() -> None:
    assert fit.parse_target("h100").shape == (1, 1)
    assert fit.parse_target("a100:2x8").shape == (2, 8)
    assert fit.parse_target("v5p:2x2x1").shape == (2, 2, 1)


def test_a_missing_compiler_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit.importlib.util, "find_spec", lambda name: None)
    for target, package in (("h100", "jax_cuda12_plugin"), ("v5e:2x2", "libtpu")):
        with pytest.raises(
            UserError, match=rf"{package}, which is not installed: make aot-packages, or pip install 'mrjax\[aot\]'"
        ):
            fit.topology_of(fit.parse_target(target))


def test_a_batch_is_given_for_each_device_and_split_over_the_mesh() -> None:
    mesh, cfg = fit.mesh_and_config(config(mesh=(0, 2, 2)), jax.devices(), 3)
    assert dict(mesh.shape) == {"data": 2, "model": 2, "spatial": 2}
    assert cfg.batch_size == 3 * 4
    kspace = programs.abstract_batch(cfg, mesh, 2)["kspace"]
    assert kspace.sharding.shard_shape(kspace.shape) == (3, 2, 32, 32)


def test_the_verdict_says_by_how_much_and_what_to_change() -> None:
    mesh, cfg = fit.mesh_and_config(config(), jax.devices(), 4)
    assert fit.verdict(60, 100, 20, 4, cfg, mesh).startswith("fits: ")
    too_much = fit.verdict(6 * 10**9, 4 * 10**9, 2 * 10**9, 4, cfg, mesh)
    assert "2.00 GB too much" in too_much
    assert "--batch=2, about the largest that fits" in too_much
    for change in ("config.precision=bfloat16", "config.grad_accumulation_steps=2", "config.remat=True", "config.mesh"):
        assert change in too_much


@pytest.mark.aot
def test_the_step_compiles_ahead_of_time_for_two_hosts_of_two_h100s(tmp_path: Path) -> None:
    """Runs the command in a process of its own, since it chooses JAX's platforms."""
    flags = ["--config=configs/unet.py", "--target=h100:2x2", "--batch=2", f"--json={tmp_path / 'fit.json'}"]
    flags += ["--config.model.channels=8", "--config.model.levels=2", "--config.data.image_size=32,32"]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [str(AOT_PYTHON), "-m", "benchmarks.fit", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    raw = json.loads((tmp_path / "fit.json").read_text())["raw"]
    parameters = raw["memory"]["state"] // 3  # Adam keeps two moments of each
    assert raw["collectives"].keys() == {"all-reduce"}
    assert abs(raw["collectives"]["all-reduce"]["bytes"] - parameters) < 64
    assert raw["traffic_per_image"] > 0
    assert "fits: " in done.stdout
    assert "ESTIMATE" in done.stdout
