"""XLA's options for each platform, and the folder of compiled programs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mrjax import train_step
from mrjax.ops.cpu import native


def mesh_of(platform: str) -> SimpleNamespace:
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))


@pytest.mark.parametrize(
    ("platform", "variable", "kind"),
    [("cuda", "XLA_FLAGS", "gpu"), ("gpu", "XLA_FLAGS", "gpu"), ("tpu", "LIBTPU_INIT_ARGS", "tpu")],
)
def test_an_option_set_in_the_environment_is_not_overridden(monkeypatch, platform, variable, kind) -> None:
    monkeypatch.delenv(variable, raising=False)
    options = train_step.compiler_options(mesh_of(platform))
    assert options == train_step.XLA_OPTIONS[kind] != {}
    name = next(iter(options))
    monkeypatch.setenv(variable, f"--xla_other=1 --{name}=false")
    assert train_step.compiler_options(mesh_of(platform)) == {n: value for n, value in options.items() if n != name}


def test_compiled_programs_are_cached_only_where_nobody_else_may_write(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = native.private_folder("compiled")
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(OSError, match="others may write"):
        native.private_folder("compiled")
