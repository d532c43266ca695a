from types import SimpleNamespace

import numpy as np
import pytest

from mrjax import compiler


def mesh_of(platform: str) -> SimpleNamespace:
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))


@pytest.mark.parametrize(
    ("platform", "variable", "kind"),
    [("cuda", "XLA_FLAGS", "gpu"), ("gpu", "XLA_FLAGS", "gpu"), ("tpu", "LIBTPU_INIT_ARGS", "tpu")],
)
def test_an_option_named_in_the_environment_is_left_to_it(monkeypatch, platform, variable, kind) -> None:
    monkeypatch.delenv(variable, raising=False)
    ours = compiler.options(mesh_of(platform))
    assert ours == compiler.OPTIONS[kind] != {}
    name = next(iter(ours))
    monkeypatch.setenv(variable, f"--xla_other=1 --{name}=false")
    assert compiler.options(mesh_of(platform)) == {n: value for n, value in ours.items() if n != name}
