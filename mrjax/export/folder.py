"""The folder that a model is handed on in: written complete or not at all, and read back as data, never executed.

It holds
  model.safetensors, config.json   parameters by their names, and the config without the paths of the run
  model.json                       task, inputs and outputs, metrics, versions, config, SHA-256 of the other files
  model.stablehlo                  the computation with its parameters, see `stablehlo`
  model.onnx                       of a U-Net, where `onnx` is installed, see `onnx_graph`
  README.md                        the model card
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from mrjax import config as configs
from mrjax.checkpoint.store import EXPORTED, read_best
from mrjax.config.fields import fields
from mrjax.errors import UserError, expect
from mrjax.experiment import check_sizes
from mrjax.export import card, stablehlo
from mrjax.interop import weight_files
from mrjax.io.files import replacing_folder, sha256, write_json
from mrjax.train_step import Recipe, TrainState

logger = logging.getLogger("mrjax.export")
WEIGHTS, CONFIG, DESCRIPTION = EXPORTED, "config.json", "model.json"
COILS = 4  # of an exported program by default: those of M4Raw's and of the demo's data


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained network, to be handed on."""

    config: ConfigDict
    step: int
    metrics: dict[str, Any]  # see `read_metrics`
    recipe: Recipe
    params: Any


def write(path: str | os.PathLike[str], model: Model, size: tuple[int, int] | None, coils: int) -> None:
    """Write a model to a new folder; `size` and `coils` are those of the k-space or images of the StableHLO program.

    Raises `UserError` if `path` holds files, for a size that the network cannot take, and for a missing package.
    """
    size = size or tuple(model.config.data.image_size)
    expect(size, "config.data.image_size is empty: the network works at any size", "that of the program: --size=H,W")
    fixed = tuple(model.config.data.image_size) if model.config.task == "paired" else ()
    expect(fixed in ((), size), f"--size is {size}", f"{fixed}, config.data.image_size, at which this network works")
    check_sizes(model.config, [size])
    expect(coils > 0, f"--coils is {coils}", "at least 1")
    config, params = _without_paths(model.config), jax.device_get(model.params)
    weights = {name: np.asarray(value) for name, value in flatten_dict(params, sep=".").items()}
    with replacing_folder(_require_new(path)) as part:
        weight_files.write(str(part / WEIGHTS), weights)
        write_json(part / CONFIG, config)
        shutil.copymode(part / CONFIG, part / WEIGHTS)  # safetensors lets nobody else read its files
        program = stablehlo.write(part / "model.stablehlo", model.recipe, params, model.config, size, coils)
        description = {
            "task": model.config.task,
            "network": model.config.model.name,
            "parameters": sum(x.size for x in weights.values()),
            "step": model.step,
            "metrics": model.metrics,
            "stablehlo": program,
            "onnx": _write_onnx(part / "model.onnx", model.config, params),
            "config": config,
            "versions": {name: metadata.version(name) for name in ("mrjax", "jax", "flax", "numpy")},
        }
        (part / "README.md").write_text(card.text(description), "utf-8")
        description["sha256"] = {file.name: sha256(file) for file in sorted(part.iterdir())}
        write_json(part / DESCRIPTION, description)


def _require_new(path: str | os.PathLike[str]) -> Path:
    path = Path(os.path.abspath(path))
    empty = path.is_dir() and not any(path.iterdir())
    expect(empty or not os.path.lexists(path), f"{path} is there already", "an empty or new folder")
    return path


def _write_onnx(path: Path, config: ConfigDict, params: Any) -> dict[str, Any] | None:
    if config.model.name != "unet":  # ONNX has no complex numbers
        return None
    if not importlib.util.find_spec("onnx"):
        logger.warning("%s is not written: onnx is not installed, pip install 'mrjax[onnx]'", path.name)
        return None
    from mrjax.export import onnx_graph

    return onnx_graph.write(path, config, params)


def _without_paths(config: ConfigDict) -> dict[str, Any]:
    """Return the config without the places of the run's data, which are nobody else's business."""
    config = config.copy_and_resolve_references()
    config.data.update({name: fields()[f"data.{name}"].default for name in ("dir", "train", "val", "test")})
    return config.to_dict()


def find(source: str) -> str:
    """Return the folder of a model: `source` if it is one, else what it names on the Hugging Face hub."""
    if os.path.isdir(source):
        return source
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not os.path.exists(source)
    wanted = "the workdir of a run, or a folder of mrjax.export"
    expect(is_name, f"{source}: no such folder", wanted)
    hub = f"{wanted}; a model of the Hugging Face hub needs huggingface_hub, which is not installed"
    expect(importlib.util.find_spec("huggingface_hub"), f"{source}: no such folder", hub)
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(source, allow_patterns=[WEIGHTS, CONFIG, DESCRIPTION])
    except Exception as error:  # whatever its HTTP client raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source}: no such folder, nor can it be had from the hub ({reason}), expected {wanted}"
        ) from error


def is_model(folder: str) -> bool:
    """Tell whether a folder holds an exported model."""
    return Path(folder, WEIGHTS).is_file()


def read(folder: str, abstract: Callable[[ConfigDict], TrainState]) -> tuple[ConfigDict, dict[str, Any], Any]:
    """Read config, progress (`step`) and parameters of an exported model, as `store.restore_best` those of a run.

    `abstract` makes the ShapeDtypeStructs of a config's state. Raises `UserError` for what is missing or damaged.
    """
    file, description = Path(folder, WEIGHTS), _read_description(folder)
    for path in (file, Path(folder, CONFIG)):
        expect(path.is_file(), f"{folder} holds no {path.name}", "the files that mrjax.export has written")
        known = description["sha256"].get(path.name)
        expect(known in (None, sha256(path)), f"{path} has changed", "the file that was exported")
    try:
        values = json.loads(Path(folder, CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/{CONFIG}: cannot be read ({error}), expected the JSON of a config") from error
    expect(isinstance(values, dict), f"{folder}/{CONFIG} is {type(values).__name__}", "the JSON of a config")
    config = configs.load(values)
    configs.check(config)
    shapes = flatten_dict(abstract(config).params, sep=".")
    arrays = weight_files.read(str(file))
    for verb, names in (("lacks", shapes.keys() - arrays.keys()), ("also holds", arrays.keys() - shapes.keys())):
        expect(
            not names, f"{file} {verb} {min(names, default='')}", f"the parameters of {CONFIG}'s {config.model.name}"
        )
    for name, leaf in shapes.items():
        array = arrays[name]
        found = f"{file}: {name} is {array.dtype} of shape {array.shape}"
        expect((array.shape, array.dtype) == (leaf.shape, leaf.dtype), found, f"{leaf.dtype} of shape {leaf.shape}")
        expect(np.isfinite(array).all(), f"{file}: {name} holds NaN or Inf", "finite numbers")
    placed = {name: jax.device_put(arrays[name], leaf.sharding) for name, leaf in shapes.items()}
    return config, {"step": description["step"]}, unflatten_dict(placed, sep=".")


def _read_description(folder: str) -> dict[str, Any]:
    """Read model.json; what is missing in it, or of another type, is as if it was never written."""
    found: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(Path(folder, DESCRIPTION).read_text())
    blank: dict[str, Any] = {"step": 0, "metrics": {}, "sha256": {}}
    found = found if isinstance(found, dict) else {}
    return {name: found[name] if isinstance(found.get(name), type(x)) else x for name, x in blank.items()}


def read_metrics(workdir: str, step: int) -> dict[str, Any]:
    """Read what was measured of the parameters after `step`, of a run or an exported model; {} if nothing was.

    `validation` holds the SSIM by which the step was chosen, `test` the summary that `mrjax.evaluate` wrote into
    metrics.json: mean and standard deviation over volumes by contrast, method ('corrupted' and 'reconstruction') and
    metric. No name of a file is in it.
    """
    if is_model(workdir):
        return _read_description(workdir)["metrics"]
    metrics: dict[str, Any] = {}
    best = read_best(workdir)
    if best["step"] == step:
        metrics["validation"] = {"ssim": best["ssim"]}
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        evaluated = json.loads(Path(workdir, "metrics.json").read_text())
        if evaluated["step"] == step:
            metrics["test"] = evaluated["summary"]
    return metrics
