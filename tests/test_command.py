"""The command `mrjax` runs the others by name, and an experiment may go by its name alone."""

import re
import sys
from pathlib import Path

import pytest
from conftest import run_command

from mrjax import __main__ as command
from mrjax.config import EXPERIMENTS, expand_flags


def test_help_lists_every_command_with_what_it_does(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mrjax"])
    command.main()
    listed = dict(re.findall(r"^  (\S+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert listed.keys() == command.COMMANDS.keys()
    assert listed["train"] == "Train a reconstruction network."


def test_version_and_unknown_commands(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mrjax", "--version"])
    command.main()
    assert re.fullmatch(r"mrjax \d+\.\d+\.\d+\n", capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["mrjax", "trian"])
    with pytest.raises(SystemExit, match="'trian' is no command, expected one of train, "):
        command.main()


def test_a_command_runs_with_the_flags_after_its_name() -> None:
    result = run_command("__main__", "check")
    assert result.returncode == 2
    assert "nothing to check" in result.stderr


def test_an_experiment_goes_by_its_name(tmp_path: Path, monkeypatch) -> None:
    file = str(EXPERIMENTS / "varnet.py")
    monkeypatch.chdir(tmp_path)
    for flags in (["--config=varnet"], ["-config=varnet"]):
        assert expand_flags([*flags, "--workdir=varnet"]) == [
            f"{flags[0].removesuffix('varnet')}{file}",
            "--workdir=varnet",
        ]
    assert expand_flags(["--config", "varnet", "varnet"]) == ["--config", file, "varnet"]
    assert expand_flags(["--config=mine.py", "--config.steps=4"]) == ["--config=mine.py", "--config.steps=4"]
    (tmp_path / "varnet").touch()
    assert expand_flags(["--config=varnet"]) == ["--config=varnet"]
