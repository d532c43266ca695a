import json
from pathlib import Path

import pytest

from configs import unet
from mrjax import config as configs
from mrjax.config.__main__ import markdown
from mrjax.errors import UserError


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("task", "kspaces", "'kspace' or 'paired'"),
        ("batch_size", 0, "more than 0"),
        ("warmup", 1.5, "0 to 1"),
        ("data.image_size", (128,), "320,320"),
        ("data.train", 3, "a folder, a glob or a list"),
        ("acquisition.centre_fractions", (0.08, 0.04), "one for each acceleration"),
        ("acquisition.centre_fractions", (0.5,), "1/acceleration"),
        ("acquisition.noise", (0.1, 0.0), "(low, high), both 0 or more"),
        ("acquisition.mask", "cartesian", "'random' or 'equispaced'"),
        ("acquisition.snr", (0.0, 10.0), "more than 0"),
        ("acquisition.motion_p", 2.0, "0 to 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_field_and_what_was_expected(field, value, words) -> None:
    config = configs.defaults()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        configs.check(config)
    assert f"config.{field} is {value!r}" in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss.mse": 0.0}, "config.loss.mse is 0.0, expected more than 0, or another"),
        ({"ema": 1.0}, "config.ema is 1.0"),
        ({"model.name": "varnet", "data.adjacent_slices": 1}, "config.data.adjacent_slices is 1, expected 0: varnet"),
        ({"model.cascades": 3}, "config.model.cascades is 3, expected no other than 12: unet has no such field"),
    ],
)
def test_fields_that_do_not_fit_one_another_are_named(fields, message) -> None:
    config = configs.defaults()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        configs.check(config)


def test_a_stored_mask_needs_the_task_kspace() -> None:
    config = configs.defaults()
    config.acquisition.mask = "stored"
    configs.check(config)
    config.task = "denoise"
    with pytest.raises(UserError, match=r"config\.acquisition\.mask is 'stored', expected one that is drawn"):
        configs.check(config)


def test_a_wrong_augmentation_is_named_with_its_field() -> None:
    config = configs.defaults()
    config.augment.scale = (0.0, 1.0)
    with pytest.raises(
        UserError, match=r"config\.augment\.scale is \(0\.0, 1\.0\), expected \(low, high\), both more than 0"
    ):
        configs.check(config)


def test_unknown_fields_and_flags_name_the_nearest_known_one(tmp_path: Path) -> None:
    config = configs.defaults().unlock()
    config.batchsize = 4
    with pytest.raises(UserError, match=r"config\.batchsize is not a field.*config\.batch_size"):
        configs.check(config)
    file = tmp_path / "c.py"
    file.touch()
    with pytest.raises(UserError, match=r"config\.model\.chanels.*config\.model\.channels"):
        configs.check_flags([f"--config={file}", "--config.model.chanels=3"])
    with pytest.raises(UserError, match="no such file"):
        configs.check_flags(["--config", str(tmp_path / "none.py")])
    with pytest.raises(UserError, match="--config is missing"):
        configs.check_flags([])


def test_a_config_survives_the_checkpoint() -> None:
    config = unet.get_config()
    config.data.image_size = (64, 48)
    config.data.train = ["a", "b"]
    again = configs.load(json.loads(json.dumps(config.to_dict())))
    assert configs.flat(again) == configs.flat(config)


def test_a_resumed_run_may_differ_in_how_it_is_fed_but_not_in_what_it_computes() -> None:
    old, new = configs.defaults(), configs.defaults()
    new.steps, new.data.workers = 5, 3
    assert configs.differences(old, new) == []
    new.seed, new.model.channels = 1, 64
    assert configs.differences(old, new) == ["config.model.channels was 32 and is 64", "config.seed was 0 and is 1"]


def test_docs_list_every_field_as_it_is() -> None:
    file = Path(configs.__file__).parents[2] / "docs" / "config.md"
    assert markdown() in file.read_text(), "run: python -m mrjax.config > docs/config.md"


@pytest.mark.parametrize(
    "change", [{"model": 3}, {"steps": "os.abort()"}, {"a.b": 1}, {"loss": None}, {"model": {"name": ["unet"]}}]
)
def test_a_damaged_config_of_a_checkpoint_is_one_sentence(change: dict) -> None:
    with pytest.raises(UserError, match="of the checkpoint"):
        configs.load(configs.defaults().to_dict() | change)


@pytest.mark.parametrize("name", ["steps", "mesh", "data.axes", "model.channels"])
def test_no_value_at_all_breaks_the_rule_of_a_field(name: str) -> None:
    config = configs.defaults()
    config.update_from_flattened_dict({name: None})
    with pytest.raises(UserError, match=f"config.{name} is None, expected "):
        configs.check(config)
