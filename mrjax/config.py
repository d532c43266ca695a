"""The one place where a config is described and checked; errors say the field, what was found and what was expected."""

import difflib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from mrjax.errors import UserError
from mrjax.models import MODELS, attributes
from mrjax.mri import masks
from mrjax.mri.augment import Augment
from mrjax.mri.tasks import TASKS


def defaults() -> ConfigDict:
    """Every field there is, with its default. An experiment in configs/ starts here and changes what it needs."""
    config = ConfigDict()
    # 'kspace': multi-coil k-space, undersampled on the fly; 'paired': `input` and `target` images; 'denoise': a
    # repetition of a scan, towards the mean of the others; 'noise2noise': towards one of the others
    config.task = "kspace"
    config.seed = 0  # of the parameters, the order of the examples, their corruption and augmentation
    config.steps = 1000  # optimizer steps in all
    config.batch_size = 8  # slices in a step, over all devices
    config.precision = "float32"  # of the network's arithmetic: 'float32' or 'bfloat16'; parameters stay float32
    config.mesh = (0, 1, 1)  # devices: examples split, parameters split too, rows of images split; 0: all that are left
    config.accumulate = 1  # parts of a batch that are worked through one after the other: less memory, same result
    config.remat = False  # compute activations again for the gradient instead of keeping them: less memory, slower
    # to 0..1 by the corrupted 'slice', or by the file's attribute `max`, 'volume'; 'standard': each slice to mean 0 and
    # standard deviation 1, as fastMRI's U-Net has it
    config.normalise = "slice"
    config.optimizer = "adam"  # 'adam', 'adamw' or 'nadamw'
    config.learning_rate = 1e-3  # at its peak
    config.schedule = "cosine"  # 'constant', 'cosine' down to zero at the last step, or 'step'
    config.warmup = 0.05  # share of the steps in which the learning rate rises from zero
    config.decay_every = 0.4  # of 'step': after this share of the steps, from the warm-up on, the rate falls, and so on
    config.decay_factor = 0.1  # and by how much
    config.weight_decay = 1e-4  # of 'adamw' and 'nadamw'
    config.clip_norm = 0.0  # gradients of a greater norm are scaled down to it; 0: never
    config.ema = 0.0  # decay a step of an average of the parameters, which is then what is evaluated; 0: none

    config.loss = ConfigDict()  # weights of a sum, of images normalised to 0..1
    config.loss.mse = 1.0
    config.loss.l1 = 0.0
    config.loss.ssim = 0.0  # of 1 - SSIM

    config.model = ConfigDict()
    config.model.name = "unet"
    config.model.channels = 32  # of the first level; each level below has twice as many
    config.model.levels = 4  # number of poolings
    config.model.pool = "max"  # 'max' or 'avg'
    config.model.residual = False  # whether the network's output is added to its input
    config.model.cascades = 12  # of a VarNet, whose channels and levels are those of the U-Net in each cascade
    config.model.sens_channels = 8  # of the U-Net that finds a VarNet's sensitivity maps
    config.model.sens_levels = 4

    config.data = ConfigDict()
    config.data.dir = ""  # folder with train/, val/ and test/ (or fastMRI's names); empty: the demo data
    config.data.train = config_dict.placeholder(object)  # instead of dir: a folder, a glob, or a list of these
    config.data.val = config_dict.placeholder(object)
    config.data.test = config_dict.placeholder(object)
    config.data.neighbours = 0  # slices on either side that the network sees as channels beside its own (2.5-D)
    config.data.image_size = ()  # (height, width) at which the network works; empty: the size that each file has
    config.data.max_shapes = (
        4  # of batches, where files differ in size: more of them are less padding, but compile longer
    )
    config.data.resize = (
        "kspace"  # k-space of another size: crop or pad 'kspace' (resolution), or the 'image' (field of view)
    )
    config.data.check = "samples"  # before training: read every 'samples' of every file, or 'headers' only
    config.data.on_bad_file = "error"  # 'error', or 'skip' to leave faulty files out and list them
    config.data.cache = (
        "none"  # after their first reading slices stay: "none", "host" (memory) or "device" (all on accelerators)
    )
    config.data.cache_half = False  # whether a cache on the device keeps k-space in half precision, in half the memory
    config.data.workers = 0  # processes that read; 0: threads of this one
    config.data.prefetch = 2  # batches kept ready (by each worker)

    config.acquisition = ConfigDict()  # of all tasks with k-space: a new draw for each example at each step
    config.acquisition.accelerations = (4.0,)
    config.acquisition.centre_fractions = (0.08,)  # fully sampled centre, one for each acceleration
    config.acquisition.noise = (
        0.0,
        0.01,
    )  # standard deviation per coil, as a fraction of the image's maximum: (low, high)
    # Of columns: 'random', 'equispaced', 'equispaced_fraction', 'magic' (these four as fastMRI), 'gaussian1d'; of
    # samples: 'gaussian2d', 'poisson' (denser in the middle), 'poisson_uniform', 'radial', 'spiral'; or 'stored': the
    # `mask` (width,) that each file holds beside fully sampled k-space, in the task 'kspace'.
    config.acquisition.mask = "random"
    config.acquisition.snr = ()  # (low, high): noise by the mean signal over its standard deviation, instead of `noise`
    config.acquisition.noise_covariance = "white"  # between coils: 'white', or 'measured' in the corners of k-space
    config.acquisition.motion_p = 0.0  # probability that the head moves during the scan
    config.acquisition.motion_rotation = 2.0  # degrees at most, either way, from one of eight poses to the next
    config.acquisition.motion_translation = 0.01  # likewise, of height and width

    config.augment = ConfigDict()  # on the device, before the corruption; each with its probability
    config.augment.rotation = 15.0  # degrees, either way
    config.augment.rotation_p = 0.5
    config.augment.scale = (0.9, 1.1)
    config.augment.scale_p = 0.5
    config.augment.anisotropy = (0.95, 1.05)  # height against width
    config.augment.anisotropy_p = 0.5
    config.augment.translation = 0.05  # of height and width, either way
    config.augment.translation_p = 0.5
    config.augment.flip_p = 0.5  # left-right
    config.augment.flip_vertical_p = 0.0

    config.log_every = 20  # steps
    config.eval_every = 500  # steps between evaluations of the validation split
    config.checkpoint_every = 200  # steps
    return config.lock()


CHOICES = {
    "model.name": tuple(MODELS),
    "task": tuple(TASKS),
    "acquisition.mask": tuple(masks.MASKS),
    "acquisition.noise_covariance": ("white", "measured"),
    "precision": ("float32", "bfloat16"),
    "normalise": ("slice", "volume", "standard"),
    "optimizer": ("adam", "adamw", "nadamw"),
    "schedule": ("constant", "cosine", "step"),
    "model.pool": ("max", "avg"),
    "data.resize": ("kspace", "image"),
    "data.check": ("samples", "headers"),
    "data.on_bad_file": ("error", "skip"),
    "data.cache": ("none", "host", "device"),
}
POSITIVE = (
    *("steps", "batch_size", "learning_rate", "model.channels", "model.levels", "data.prefetch"),
    "data.max_shapes",
    *("accumulate", "log_every", "eval_every", "checkpoint_every", "decay_every", "decay_factor"),
    *("model.cascades", "model.sens_channels", "model.sens_levels"),
)

# What may change when a run is resumed: how it is watched and fed and on which devices, not what it computes; and how
# long it goes on, which stretches a cosine, so that the steps to come are not those the shorter run would have taken.
FREE = (
    *("steps", "log_every", "eval_every", "checkpoint_every", "data.dir", "data.train", "data.val", "data.test"),
    *("data.check", "data.on_bad_file", "data.workers", "data.prefetch", "data.cache", "mesh", "accumulate", "remat"),
)

# What parameters belong with: a run that starts from imported ones must share these fields, by their beginning.
NETWORK = ("model.", "normalise", "data.neighbours")


def flat(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _unknown(name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, known, 1, 0.0)[0]
    return UserError(f"config.{name} is not a field, the nearest known one is config.{near}")


def check_flags(argv: list[str]) -> None:
    """Raises a `UserError` for --config flags that name no file or no known field."""
    config = None
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        name, _, given = flag.lstrip("-").partition("=")
        if flag.startswith("-") and name == "config":
            config = given or value
            if not os.path.isfile(config):
                raise UserError(f"--config is {config!r}: no such file, expected e.g. configs/unet.py")
        elif flag.startswith("-") and name.startswith("config.") and name[7:] not in (known := dict(flat(defaults()))):
            raise _unknown(name[7:], known)
    if config is None and not any(flag.lstrip("-").startswith("help") for flag in argv):
        raise UserError("--config is missing, expected the file of an experiment: --config=configs/unet.py")


def check(config: ConfigDict) -> None:
    """Raises a `UserError` for the first field that is unknown, missing or cannot work."""
    known = dict(flat(defaults()))
    found = dict(flat(config))
    for name in sorted(found.keys() - known.keys()):
        raise _unknown(name, known)
    for name in sorted(known.keys() - found.keys()):
        raise UserError(f"config.{name} is missing, expected a config that starts from mrjax.config.defaults()")

    def expect(name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"config.{name} is {found[name]!r}, expected {expected}")

    for name, choices in CHOICES.items():
        expect(name, found[name] in choices, " or ".join(map(repr, choices)))
    for name in POSITIVE:
        expect(name, found[name] > 0, "more than 0")
    expect("warmup", 0 <= found["warmup"] <= 1, "0 to 1")
    expect("ema", 0 <= found["ema"] < 1, "0, or less than 1 as in 0.999")
    for name in ("weight_decay", "clip_norm", "data.neighbours", "loss.mse", "loss.l1", "loss.ssim"):
        expect(name, found[name] >= 0, "0 or more")
    sees_slices = "image" in MODELS[found["model.name"]].needs
    expect("data.neighbours", sees_slices or not found["data.neighbours"], f"0: {found['model.name']} takes one slice")
    expect("loss.mse", any(config.loss.values()), "more than 0, or another of config.loss")
    fields = attributes(found["model.name"])
    for name in (name for name in found if name.startswith("model.") and name != "model.name"):
        if name.removeprefix("model.") not in fields:
            expect(
                name,
                found[name] == known[name],
                f"no other than {known[name]!r}: {found['model.name']} has no such field",
            )
    mesh = found["mesh"]
    whole = len(mesh) == 3 and all(isinstance(n, int) and n >= 0 for n in mesh) and sum(n == 0 for n in mesh) <= 1
    expect(
        "mesh", whole, "three numbers of devices (data, model, spatial), one of which may be 0 for all that are left"
    )
    expect("seed", 0 <= found["seed"] < 2**32, "0 to 4294967295")
    expect("data.workers", found["data.workers"] >= 0, "0 or more")

    for name in ("data.train", "data.val", "data.test"):
        paths = [found[name]] if isinstance(found[name], str) else found[name] or []
        several = isinstance(paths, (list, tuple)) and all(isinstance(path, str) for path in paths)
        expect(name, several, "a folder, a glob or a list of these")
    size = found["data.image_size"]
    pair = len(size) in (0, 2) and all(isinstance(n, int) and n > 0 for n in size)
    expect("data.image_size", pair, "height,width as in 320,320")
    try:
        Augment(**config.augment)
    except UserError as error:
        raise UserError(f"config.augment.{error}") from error
    noise = found["acquisition.noise"]
    expect("acquisition.noise", len(noise) == 2 and 0 <= noise[0] <= noise[1], "(low, high), both 0 or more")
    here = found["acquisition.mask"] != masks.STORED or found["task"] == "kspace"
    expect("acquisition.mask", here, f"one that is drawn, for config.task = {found['task']!r}")
    snr = found["acquisition.snr"]
    ordered = len(snr) == 0 or (len(snr) == 2 and 0 < snr[0] <= snr[1])
    expect("acquisition.snr", ordered, "(low, high), both more than 0, or () for none")
    expect("acquisition.motion_p", 0 <= found["acquisition.motion_p"] <= 1, "0 to 1")
    expect("acquisition.motion_rotation", 0 <= found["acquisition.motion_rotation"] <= 45, "0 to 45 degrees")
    expect("acquisition.motion_translation", 0 <= found["acquisition.motion_translation"] <= 0.5, "0 to 0.5")
    accelerations, centres = found["acquisition.accelerations"], found["acquisition.centre_fractions"]
    expect(
        "acquisition.accelerations",
        len(accelerations) > 0 and min(accelerations) >= 1,
        "one or more values of at least 1",
    )
    expect("acquisition.centre_fractions", len(centres) == len(accelerations), "one for each acceleration")
    for centre, acceleration in zip(centres, accelerations, strict=True):
        expect(
            "acquisition.centre_fractions",
            0 <= centre <= 1 / acceleration,
            f"0 to 1/acceleration, {1 / acceleration:g}",
        )


def check_image_size(config: ConfigDict, spatial: int) -> None:
    """Raises a `UserError` if config.data.image_size is too small for the network, or its rows cannot be split."""
    depths = {"levels", "sens_levels"} & set(attributes(config.model.name))
    field = max(sorted(depths), key=config.model.get)
    least = MODELS[config.model.name].smallest_side(config.model[field])
    if min(config.data.image_size) < least:
        raise UserError(
            f"config.data.image_size is {tuple(config.data.image_size)}, expected at least {least} a side for "
            f"config.model.{field} = {config.model[field]}; lower the levels or enlarge the images"
        )
    if config.data.image_size[0] % spatial:
        raise UserError(
            f"config.data.image_size is {tuple(config.data.image_size)}, expected a height that is a multiple of "
            f"{spatial}, over which config.mesh splits the rows"
        )


def check_sizes(config: ConfigDict, spatial: int, sizes: Collection[tuple[int, int]]) -> None:
    """Raises a `UserError` if slices cannot all keep their `sizes` because something needs one size for all."""
    network, levels = MODELS[config.model.name], config.model.levels
    least = max(network.smallest_side(levels), 7)  # pixels of the windows of SSIM
    for wrong, found, expected in (
        (network.needs != ("image",), f"config.model.name is {config.model.name!r}", "'unet'"),
        (config.data.cache == "device", "config.data.cache is 'device'", "'host' or 'none'"),
        (2**levels % spatial, f"config.mesh splits rows over {spatial} devices", f"a divisor of {2**levels}"),
        (min(map(min, sizes)) < least, f"config.model.levels is {levels}", f"at least {least} pixels a side"),
    ):
        if wrong:
            listed = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:5])
            differ = f"the files differ in size ({listed})"
            raise UserError(f"{found} and {differ}, expected {expected}, or config.data.image_size for all")


def mesh_shape(config: ConfigDict, devices: int) -> tuple[int, int, int]:
    """config.mesh with its 0 filled in.

    Raises:
      UserError: it does not multiply to the number of devices, or a batch does not split evenly.
    """
    mesh = list(config.mesh)
    rest = math.prod(n for n in mesh if n)
    if 0 in mesh and devices % rest == 0:
        mesh[mesh.index(0)] = devices // rest
    if math.prod(mesh) != devices:
        raise UserError(f"config.mesh is {tuple(config.mesh)}, expected numbers that multiply to the {devices} devices")
    data, model, spatial = mesh
    if config.batch_size % (data * model * config.accumulate):
        parts = f"the {data * model} devices it is split over" if data * model > 1 else ""
        turns = f"config.accumulate = {config.accumulate}" if config.accumulate > 1 else ""
        raise UserError(
            f"config.batch_size is {config.batch_size}, expected a multiple of "
            + " times ".join(filter(None, (parts, turns)))
        )
    return data, model, spatial


def dump(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def load(values: dict[str, Any]) -> ConfigDict:
    """A config from `dump`. Fields that are newer than it get their defaults; fields that are gone are an error."""
    config = defaults()
    known = dict(flat(config))
    for name, value in flat(ConfigDict(values)):
        if name not in known:
            raise UserError(f"config.{name} of the checkpoint is not a field of this version of mrjax")
        config.update_from_flattened_dict({name: tuple(value) if isinstance(known[name], tuple) else value})
    return config


def differences(old: ConfigDict, new: ConfigDict, *, of_network: bool = False) -> list[str]:
    """A phrase for each field in which a resumed run must not differ from the run it resumes, but does.

    `of_network`: only of the fields that parameters belong with.
    """
    before, after = dict(flat(old)), dict(flat(new))
    return [
        f"config.{name} was {before[name]!r} and is {after[name]!r}"
        for name in before
        if (name.startswith(NETWORK) if of_network else name not in FREE) and before[name] != after[name]
    ]
