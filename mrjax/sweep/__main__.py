"""Search config fields for the best validation SSIM, with Optuna.

    python -m mrjax.sweep --config=configs/unet.py --study=runs/sweep --trials=20 \\
        --search.learning_rate=log:1e-4,1e-2 --search.model.channels=choice:16,32 [--config.FIELD=VALUE ...]

A flag --search.FIELD is float:LOW,HIGH, log:LOW,HIGH (drawn evenly over the logarithm), int:LOW,HIGH or
choice:A,B,... Each trial is a run of mrjax.main in <study>/trial-N. The same command goes on with a study that was
stopped, and several processes may work on one.
"""

import importlib.util
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mrjax import cli
from mrjax.config import check, check_fields, check_flags
from mrjax.errors import UserError, expect

PREFIX = "search."


def main(_: list[str]) -> int:
    """Check all that trials may be given, run them, print the table; the exit status is 3 if it was stopped."""
    expect(importlib.util.find_spec("optuna"), "mrjax.sweep needs Optuna", "pip install 'mrjax[sweep]'")
    from mrjax.sweep import study

    values = flags.FLAGS
    given = values.flag_values_dict().items()
    texts = {name[len(PREFIX) :]: text for name, text in given if name.startswith(PREFIX)}
    expect(texts, "there is no --search.FIELD", "at least one, as in --search.learning_rate=log:1e-4,1e-2")
    space = {field: study.parse_search(field, text) for field, text in texts.items()}
    fixed = study.to_flags(config_flags.get_override_values(values["config"]))
    command = [f"--config={config_flags.get_config_filename(values['config'])}", *fixed]
    for field, distribution in space.items():
        for value in study.extremes(distribution):
            check(load([*command, *study.to_flags({field: value})]))
    folder = Path(values.study)
    opened = study.open_study(folder, " ".join([*command, *(f"--search.{f}={t}" for f, t in texts.items())]))
    sweep = study.Sweep(folder, opened, space, command, lambda arguments: load(arguments).steps)
    finished = sweep.run(values.trials)
    print(sweep.table())
    return 0 if finished else 3


def load(arguments: list[str]) -> ConfigDict:
    """Return the config of a run of mrjax.main with these flags."""
    own = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=["mrjax.main", *arguments])
    try:
        own(["mrjax.main", *arguments])
    except flags.Error as error:
        raise UserError(str(error)) from error
    return own.config


def define_searches(argv: list[str]) -> None:
    """Define a flag for every --search.FIELD; raise a `UserError` for fields that there are not."""
    check_flags(argv)
    for flag in argv:
        name = flag.lstrip("-").partition("=")[0]
        if flag.startswith("-") and name.startswith(PREFIX):
            check_fields([f"--config.{name[len(PREFIX) :]}"])
            if name not in flags.FLAGS:
                flags.DEFINE_string(name, None, "values to try")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "file of the experiment, e.g. configs/unet.py")
    flags.DEFINE_string("study", None, "folder of the sweep", required=True)
    flags.DEFINE_integer("trials", 20, "trials of the study in all", lower_bound=1)
    cli.run(main, define_searches, one_process=True)
