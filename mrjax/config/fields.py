"""Every config field: its name, its default, its meaning and its rule, all in one place."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from mrjax.io.storage import AXES
from mrjax.measures.losses import LOSSES
from mrjax.models import MODELS, attribute_names
from mrjax.mri.masks import MASKS
from mrjax.mri.normalise import NORMALISATIONS
from mrjax.mri.tasks import TASKS
from mrjax.optimizers import OPTIMIZERS, SCHEDULES
from mrjax.report.loggers import LOGGERS


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
LOGGER_NAMES = Rule(
    lambda value: isinstance(value, tuple) and set(value) <= set(LOGGERS),
    lambda: f"any of {', '.join(LOGGERS)}; on the command line a flag for each",
)
PRECISION = one_of(("float32", "float32_exact", "bfloat16"))
COVARIANCE = one_of(("white", "measured"))

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
    Resumable("loggers", ("tensorboard",), "where curves and images go, beside metrics.jsonl", LOGGER_NAMES),
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
