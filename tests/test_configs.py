"""Every file in configs/ is ready to run."""

import runpy
from pathlib import Path

import pytest

from mrjax import config, experiment
from mrjax.mri.tasks import TASKS
from mrjax.parallel import sharding

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_works_says_its_command_and_differs_from_the_defaults(path: Path) -> None:
    loaded = runpy.run_path(str(path))
    found = loaded["get_config"]()
    config.check(found)
    assert f"python -m mrjax.main --config=configs/{path.name}" in loaded["__doc__"]
    assert config.flat(found) != config.flat(config.defaults())
    experiment.make_recipe(found, sharding.make_mesh())


def test_there_is_an_experiment_for_every_task() -> None:
    assert {runpy.run_path(str(path))["get_config"]().task for path in FILES} == set(TASKS)
