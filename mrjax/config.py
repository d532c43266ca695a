"""Describe and check a config: every field stands once in `FIELDS`, with its default, its meaning and its rule.

`python -m mrjax.config` prints the table of fields in docs/config.md.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_dict

from mrjax.errors import UserError
from mrjax.io.storage import AXES
from mrjax.measures.losses import LOSSES
from mrjax.models import MODELS, attribute_names
from mrjax.mri.masks import MASKS
from mrjax.mri.normalise import NORMALISATIONS
from mrjax.mri.tasks import TASKS
from mrjax.optimizers import OPTIMIZERS, SCHEDULES


class Rule(NamedTuple):
    """What a value must satisfy, and the words that an error uses for it."""

    holds: Callable[[Any], bool]
    expected: Callable[[], str]


@dataclasses.dataclass(frozen=True)
class Field:
    """A config field."""

    name: str  # dotted, as in `model.channels`
    default: Any
    help: str
    rule: Rule | None = None


class Resumable(Field):
    """A field that may change when a run is resumed: how it is watched and fed, on which devices, and how long it runs.

    More steps stretch a cosine schedule: the steps to come are then not those that the shorter run would have taken.
    """


def one_of(names: Collection[str]) -> Rule:
    """Require one of the names, those that are registered later included."""
    return Rule(lambda value: value in names, lambda: " or ".join(map(repr, names)))


def between(low: float, high: float) -> Rule:
    """Require a number from `low` to `high`, both included."""
    return Rule(lambda value: low <= value <= high, lambda: f"{low} to {high}")


def _are_integers(values: Any, least: int) -> bool:
    return all(isinstance(n, int) and n >= least for n in values)


def _is_paths(value: Any) -> bool:
    paths = [value] if isinstance(value, str) else value or []
    return isinstance(paths, (list, tuple)) and all(isinstance(path, str) for path in paths)


POSITIVE = Rule(lambda value: value > 0, lambda: "more than 0")
NOT_NEGATIVE = Rule(lambda value: value >= 0, lambda: "0 or more")
PROBABILITY = between(0, 1)
ROTATION = Rule(lambda value: 0 <= value <= 45, lambda: "0 to 45 degrees")
DECAY = Rule(lambda value: 0 <= value < 1, lambda: "0, or less than 1 as in 0.999")
ACCELERATIONS = Rule(lambda value: len(value) > 0 and min(value) >= 1, lambda: "one or more values of at least 1")
INTERVAL = Rule(lambda value: len(value) == 2 and 0 <= value[0] <= value[1], lambda: "(low, high), both 0 or more")
POSITIVE_INTERVAL = Rule(
    lambda value: len(value) == 2 and 0 < value[0] <= value[1], lambda: "(low, high), both more than 0"
)
OPTIONAL_INTERVAL = Rule(
    lambda value: len(value) == 0 or POSITIVE_INTERVAL.holds(value),
    lambda: f"{POSITIVE_INTERVAL.expected()}, or () for none",
)
MESH = Rule(
    lambda value: len(value) == 3 and _are_integers(value, 0) and value.count(0) <= 1,
    lambda: "three numbers of devices (data, model, spatial), at most one of them 0 for all the rest",
)
PATHS = Rule(_is_paths, lambda: "a folder, a glob or a list of these")
SIZE = Rule(lambda value: len(value) in (0, 2) and _are_integers(value, 1), lambda: "height,width as in 320,320")
ORDER = Rule(
    lambda value: {"height", "width"} <= set(value.split(",")) <= set(AXES.split(",")),
    lambda: f"{AXES} in any order, or without slices, coils or both",
)
PRECISION = one_of(("float32", "float32_exact", "bfloat16"))
COVARIANCE = one_of(("white", "measured"))

EXPERIMENTS = Path(__file__).parent / "configs"
FIELDS = (
    Field(
        "task",
        "kspace",
        "what is trained: k-space undersampled on the fly; `input` and `target` images made elsewhere ('paired'); one "
        "repetition of a scan towards the mean of the others ('denoise') or towards one of them ('noise2noise')",
        one_of(TASKS),
    ),
    Field("seed", 0, "of parameters, order of the examples, corruption and augmentation", between(0, 2**32 - 1)),
    Resumable("steps", 1000, "optimizer steps in all", POSITIVE),
    Field("batch_size", 8, "slices in a step, over all devices", POSITIVE),
    Field(
        "precision",
        "float32",
        "of the network's arithmetic; parameters stay float32. Convolutions in 'float32' multiply in TF32 on GPUs (10 "
        "bits of mantissa) and in bfloat16 on TPUs (7), the fast defaults there; in 'float32_exact' nowhere",
        PRECISION,
    ),
    Resumable("mesh", (0, 1, 1), "devices along the axes data, model and spatial; 0: all that are left", MESH),
    Resumable("grad_accumulation_steps", 1, "parts a batch is worked through in: less memory, same result", POSITIVE),
    Resumable("remat", False, "recompute activations for the gradient instead of storing them: less memory, slower"),
    Field(
        "normalise",
        "slice",
        "images by the range of the slice, the maximum of the volume, or to mean 0 and standard deviation 1",
        one_of(NORMALISATIONS),
    ),
    Field("optimizer", "adam", "of the parameters", one_of(OPTIMIZERS)),
    Field("learning_rate", 1e-3, "of the optimizer, at the peak of its schedule", POSITIVE),
    Field("schedule", "cosine", "of the learning rate; 'cosine' ends at zero at the last step", one_of(SCHEDULES)),
    Field("warmup", 0.05, "share of the steps in which the learning rate rises from zero", between(0, 1)),
    Field("decay_every", 0.4, "share of the steps between two drops of the schedule 'step'", POSITIVE),
    Field("decay_factor", 0.1, "of each such drop", POSITIVE),
    Field("weight_decay", 1e-4, "of 'adamw' and 'nadamw'", NOT_NEGATIVE),
    Field("clip_norm", 0.0, "largest norm of the gradients, greater ones are scaled down; 0: none", NOT_NEGATIVE),
    Field("ema", 0.0, "decay of the moving average of the parameters that is evaluated; 0: none", DECAY),
    Resumable("max_skipped_steps", 10, "in a row, for a loss or gradient that is not finite, at most", POSITIVE),
    Field("model.name", "unet", "of the network", one_of(MODELS)),
    Field("model.channels", 32, "of the first level; each level below has twice as many", POSITIVE),
    Field("model.levels", 4, "number of poolings", POSITIVE),
    Field("model.pool", "max", "how a level is halved", one_of(("max", "avg"))),
    Field("model.residual", False, "whether a network adds to its input; a VarNet, to compressed sensing"),
    Field("model.cascades", 12, "of a VarNet, whose channels and levels are those of the U-Net in each", POSITIVE),
    Field("model.sens_channels", 8, "of the U-Net that estimates the maps of a VarNet without `residual`", POSITIVE),
    Field("model.sens_levels", 4, "of the U-Net that estimates the maps of a VarNet without `residual`", POSITIVE),
    Resumable("data.dir", "", "folder with train/, val/ and test/ (or fastMRI's names); empty: the demo data"),
    Resumable("data.train", None, "instead of data.dir: a folder, a glob or a list of these", PATHS),
    Resumable("data.val", None, "instead of data.dir: a folder, a glob or a list of these", PATHS),
    Resumable("data.test", None, "instead of data.dir: a folder, a glob or a list of these", PATHS),
    Field("data.names.kspace", "kspace", "of the data set with k-space; in a group as `scan/kspace`"),
    Field("data.names.input", "input", "of the data set with corrupted images"),
    Field("data.names.target", "", "of the data set with the target; empty: `reconstruction_rss`, ..., or `target`"),
    Field("data.names.mask", "mask", "of the data set with the samples that were measured, or are to be kept"),
    Field("data.axes", AXES, "of k-space as stored (in MATLAB as shown there); of images without the coils", ORDER),
    Field("data.shifted", False, "whether k-space begins with frequency zero, as np.fft.fft2 of an image does"),
    Field("data.adjacent_slices", 0, "on either side, as channels beside the slice's own (2.5-D)", NOT_NEGATIVE),
    Field("data.image_size", (), "(height, width) to bring every slice to; empty: the size of each file", SIZE),
    Field("data.max_shapes", 16, "of batches, where files differ in size: a compilation for each", POSITIVE),
    # crop or zero-pad k-space (another resolution) or the image (another field of view)
    Field("data.resize", "kspace", "what is cropped or zero-padded to image_size", one_of(("kspace", "image"))),
    Resumable("data.check", "samples", "what is read before training, of every file", one_of(("samples", "headers"))),
    Resumable(
        "data.on_bad_file",
        "error",
        "stop, or leave faulty files out and list them; one that fails later is replaced by others, in training only",
        one_of(("error", "skip")),
    ),
    Resumable("data.cache", "none", "where slices stay once they are read", one_of(("none", "host", "device"))),
    Field("data.cache_half", False, "whether a cache on the device keeps k-space in half precision"),
    Resumable("data.workers", 0, "processes that read; 0: threads of this one", NOT_NEGATIVE),
    Resumable("data.prefetch", 2, "batches kept ready (by each worker)", POSITIVE),
    Field("acquisition.accelerations", (4.0,), "one is drawn for each example at each step", ACCELERATIONS),
    Field("acquisition.centre_fractions", (0.08,), "fully sampled centre, one for each acceleration"),
    Field("acquisition.noise", (0.0, 0.01), "standard deviation per coil over the image's maximum", INTERVAL),
    Field("acquisition.mask", "random", "which samples are measured; 'stored': by each file's own", one_of(MASKS)),
    Field("acquisition.snr", (), "mean signal over the noise's deviation, instead of `noise`", OPTIONAL_INTERVAL),
    Field("acquisition.noise_covariance", "white", "between coils; or measured in k-space's corners", COVARIANCE),
    Field("acquisition.motion_p", 0.0, "probability that the head moves during the scan", PROBABILITY),
    Field("acquisition.motion_rotation", 2.0, "largest between two of eight poses, either way", ROTATION),
    Field("acquisition.motion_translation", 0.01, "likewise, over height and width", between(0, 0.5)),
    Field("augment.rotation", 15.0, "degrees, either way", NOT_NEGATIVE),
    Field("augment.rotation_p", 0.5, "probability of a rotation", PROBABILITY),
    Field("augment.scale", (0.9, 1.1), "of height and width alike", POSITIVE_INTERVAL),
    Field("augment.scale_p", 0.5, "probability of a scaling", PROBABILITY),
    Field("augment.anisotropy", (0.95, 1.05), "height against width", POSITIVE_INTERVAL),
    Field("augment.anisotropy_p", 0.5, "probability of an anisotropic scaling", PROBABILITY),
    Field("augment.translation", 0.05, "fraction of height and width, either way", NOT_NEGATIVE),
    Field("augment.translation_p", 0.5, "probability of a translation", PROBABILITY),
    Field("augment.flip_p", 0.5, "probability of a left-right flip", PROBABILITY),
    Field("augment.flip_vertical_p", 0.0, "probability of an up-down flip", PROBABILITY),
    Field("augment.contrast", (-1.0, 1.3), "what the brightest pixel loses of its signal; from 1 on, it turns dark"),
    Field("augment.contrast_p", 0.0, "probability of another contrast", PROBABILITY),
    Field("augment.coils_p", 0.0, "probability of other coils, mixtures of the file's", PROBABILITY),
    Resumable("log_every", 20, "steps between lines of the log", POSITIVE),
    Resumable("eval_every", 500, "steps between evaluations of the validation split", POSITIVE),
    Resumable("checkpoint_every", 200, "steps between checkpoints", POSITIVE),
)

# Attributes of networks that other fields or other networks set.
NO_FIELDS = ("dtype", "remat", "out_channels", "zero_head")

# What parameters belong with: a run that starts from imported ones must share these fields, by their beginning.
PARAMETER_FIELDS = ("model.", "normalise", "data.adjacent_slices")


def fields() -> dict[str, Field]:
    """Return all fields by name: `FIELDS`, a weight for each of LOSSES, and the attributes of networks added later."""
    found = {field.name: field for field in FIELDS}
    for name in LOSSES:
        weight = 1.0 if name == "mse" else 0.0
        found[f"loss.{name}"] = Field(f"loss.{name}", weight, "weight of this term of the loss", NOT_NEGATIVE)
    for model, network in MODELS.items():
        for name in attribute_names(model):
            if name not in NO_FIELDS:
                found.setdefault(f"model.{name}", Field(f"model.{name}", getattr(network, name, None), f"of {model}"))
    return found


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


def markdown() -> str:
    """Return the table of all fields: name, default, meaning, rule."""
    lines = ["| field | default | meaning | values |", "|---|---|---|---|"]
    for field in fields().values():
        rule = field.rule.expected() if field.rule else ""
        lines.append(f"| `config.{field.name}` | `{field.default!r}` | {field.help} | {rule} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("# Config fields\n\nWritten by `python -m mrjax.config`; set one with `--config.FIELD=VALUE`.\n")
    print(markdown())
