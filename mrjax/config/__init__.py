"""Configs: their defaults, the checks of their values and of the flags that set them.

`python -m mrjax.config` prints the table of fields in docs/config.md.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_dict

from mrjax.config.fields import PARAMETER_FIELDS, Resumable, Rule, fields
from mrjax.errors import UserError
from mrjax.models import MODELS, attribute_names

EXPERIMENTS = Path(__file__).parents[1] / "configs"


def defaults() -> ConfigDict:
    """Return every field with its default; an experiment in configs/ starts here and changes what it needs."""
    values = {name: field.default for name, field in fields().items()}
    placeholders = {name: config_dict.placeholder(object) for name, value in values.items() if value is None}
    return ConfigDict(unflatten_dict(values | placeholders, sep=".")).lock()


def flat(config: ConfigDict) -> dict[str, Any]:
    """Return the value of every field by its dotted name."""
    return flatten_dict(config.to_dict(), sep=".")


def check_fields(argv: list[str]) -> None:
    """Raise a `UserError` for --config flags that name no known field."""
    for flag in argv:
        name = flag.lstrip("-").partition("=")[0]
        if flag.startswith("-") and name.startswith("config.") and name[7:] not in (known := fields()):
            raise _unknown(name[7:], known)


def expand_flags(argv: list[str]) -> list[str]:
    """Return the flags with the file of an experiment of this package in the place of its name, as in --config=unet."""
    files = {path.stem: str(path) for path in EXPERIMENTS.glob("*.py") if not os.path.exists(path.stem)}
    expanded = []
    for before, flag in zip(["", *argv], argv, strict=False):
        name, equals, value = flag.partition("=")
        if name.lstrip("-") == "config" and equals:
            flag = f"{name}={files.get(value, value)}"
        elif before in ("-config", "--config"):
            flag = files.get(flag, flag)
        expanded.append(flag)
    return expanded


def check_flags(argv: list[str], *, required: bool = True) -> None:
    """Raise a `UserError` for --config flags that name no file or no known field, or for none if one is required."""
    config = None
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        name, _, given = flag.lstrip("-").partition("=")
        if flag.startswith("-") and name == "config":
            config = given or value
            if not os.path.isfile(config):
                names = ", ".join(sorted(path.stem for path in EXPERIMENTS.glob("*.py")))
                raise UserError(
                    f"--config is {config!r}: no such file, expected e.g. configs/unet.py, or one of {names}"
                )
    check_fields(argv)
    required |= any(flag.lstrip("-").startswith("config.") for flag in argv)
    if required and config is None and not any(flag.lstrip("-").startswith("help") for flag in argv):
        raise UserError("--config is missing, expected the file of an experiment: --config=configs/unet.py")


def check(config: ConfigDict) -> None:
    """Raise a `UserError` for the first field that is unknown, missing or breaks a rule."""
    known, found = fields(), flat(config)
    for name in sorted(found.keys() - known.keys()):
        raise _unknown(name, known)
    for name in sorted(known.keys() - found.keys()):
        raise UserError(f"config.{name} is missing, expected a config that starts from mrjax.config.defaults()")
    for name, field in known.items():
        if field.rule and not _holds(field.rule, found[name]):
            raise UserError(f"config.{name} is {found[name]!r}, expected {field.rule.expected()}")
    for name, expected in _conflicts(config):
        raise UserError(f"config.{name} is {found[name]!r}, expected {expected}")


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return rule.holds(value)
    except (TypeError, AttributeError):  # a value of another type
        return False


def _conflicts(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """Yield the fields that do not fit the others, each with what is expected."""
    known, model = fields(), config.model.name
    if "image" not in MODELS[model].input_names and config.data.adjacent_slices:
        yield "data.adjacent_slices", f"0: {model} takes one slice"
    if not any(config.loss.values()):
        yield "loss.mse", "more than 0, or another of config.loss"
    for name, value in config.model.items():
        default = known[f"model.{name}"].default
        if name != "name" and name not in attribute_names(model) and value != default:
            yield f"model.{name}", f"no other than {default!r}: {model} has no such field"
    if config.acquisition.mask == "stored" and config.task != "kspace":
        yield "acquisition.mask", f"one that is drawn, for config.task = {config.task!r}"
    centres, accelerations = config.acquisition.centre_fractions, config.acquisition.accelerations
    if len(centres) != len(accelerations):
        yield "acquisition.centre_fractions", "one for each acceleration"
    for centre, acceleration in zip(centres, accelerations, strict=False):
        if not 0 <= centre <= 1 / acceleration:
            yield "acquisition.centre_fractions", f"0 to 1/acceleration, {1 / acceleration:g}"


def _unknown(name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, known, 1, 0.0)[0]
    return UserError(f"config.{name} is not a field, the nearest known one is config.{near}")


def load(values: dict[str, Any]) -> ConfigDict:
    """Make a config from the JSON of its `to_dict`, with defaults for newer fields.

    Raises `UserError` for an unknown field, and for a value of another type.
    """
    config = defaults()
    known = flat(config)
    try:
        found = flat(ConfigDict(values))
        unknown = found.keys() - known.keys()
        for name in known.keys() & found.keys():
            value = found[name]
            config.update_from_flattened_dict({name: tuple(value) if isinstance(known[name], tuple) else value})
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"the config of the checkpoint is damaged ({error})") from error
    if unknown:
        raise UserError(f"config.{min(unknown)} of the checkpoint is not a field of this version of mrjax")
    return config


def differences(old: ConfigDict, new: ConfigDict, *, parameters_only: bool = False) -> list[str]:
    """Return a phrase for each change that forbids to resume, or with `parameters_only` to start from parameters."""
    known, before, after = fields(), flat(old), flat(new)

    def is_fixed(name: str) -> bool:
        return name.startswith(PARAMETER_FIELDS) if parameters_only else not isinstance(known[name], Resumable)

    changed = [name for name in before if before[name] != after[name] and is_fixed(name)]
    return [f"config.{name} was {before[name]!r} and is {after[name]!r}" for name in changed]
