"""The workdir of a run: everything it needs to go on, and everything inference needs, as atomic Orbax checkpoints.

A workdir holds
  config.json            the run it belongs to
  checkpoints/N          after step N: parameters, their average if there is one, optimizer state, progress (step,
                         fingerprint of the files, order of the examples), config, and SHA-256 of all its files; the
                         newest two and the best
  checkpoints/best.json  which step has the best validation SSIM, and the last step that was validated
  initial/0              imported parameters that training starts from, and their config
Orbax writes a checkpoint beside its place and renames it when it is whole, so a kill at any moment leaves the last one.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mrjax import config as configs
from mrjax.errors import UserError, expect
from mrjax.io.files import CHECKSUMS, find_damage, write_checksums
from mrjax.train_step import TrainState

logger = logging.getLogger(__name__)
BEST_METRIC = "ssim"  # on the validation split, by which the best checkpoint is chosen
CHECKPOINTS, INITIAL = "checkpoints", "initial"  # folders of a workdir
EXPORTED = "model.safetensors"  # a file in folders of `mrjax.export`, which are no workdirs to train in
NO_BEST = {"step": -1, BEST_METRIC: -1.0, "files": "", "validated": -1}
_ITEMS = ("params", "ema", "optimizer", "progress", "config")


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for its question whether to stop, which JAX answers to one who counts its calls: the loop."""

    def reached_preemption(self, step: int) -> bool:
        return False


class _Preservation:
    """Orbax's policy by a function of the steps, in order."""

    def __init__(self, kept: Callable[[Sequence[int]], list[bool]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return self._kept([checkpoint.step for checkpoint in checkpoints])


def open_checkpoints(
    workdir: str,
    folder: str = CHECKPOINTS,
    *,
    read_only: bool = False,
    kept: Callable[[Sequence[int]], list[bool]] | None = None,
) -> ocp.CheckpointManager:
    """Open the checkpoints of a run; `kept` says of each step whether it stays once a newer one is whole, all without.

    A reader must be `read_only`: a writer clears away what is half written, which may be the save of a live run.
    """
    path = os.path.abspath(os.path.join(workdir, folder))
    if not read_only and jax.process_index() == 0:
        # Orbax does this in a thread, which may outlive its manager and meet that of the next one.
        for part in Path(path).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(part, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(
        read_only=read_only,
        preservation_policy=_Preservation(kept) if kept else None,
        # Orbax calls this before it renames a checkpoint into its place, so none is without.
        async_options=ocp.AsyncOptions(post_finalization_callback=functools.partial(_seal, Path(path))),
    )
    return _Manager(path, options=options, item_names=_ITEMS)


def save(manager: ocp.CheckpointManager, state: TrainState, progress: dict[str, Any], config: ConfigDict) -> None:
    """Start to write a checkpoint after `progress['step']` steps; the state is copied at once, so it may be donated."""
    items = {name: ocp.args.StandardSave(values) for name, values in named_arrays(state).items()}
    items |= {"progress": ocp.args.JsonSave(progress), "config": ocp.args.JsonSave(config.to_dict())}
    manager.save(progress["step"], args=ocp.args.Composite(**items))


def find_whole(workdir: str, folder: str = CHECKPOINTS, first: int = -1) -> int:
    """Find the newest checkpoint all of whose files have their checksums, or `first` if that has; -1 if there is none.

    A damaged one is passed over with a warning. Raises `UserError` if all are damaged.
    """
    steps = sorted(find_steps(workdir, folder), key=lambda step: (step == first, step), reverse=True)
    whole = -1
    if jax.process_index() == 0:
        for step in steps:
            path = Path(workdir, folder, str(step))
            if damage := find_damage(path):
                logger.warning("%s is damaged (%s), passed over", path, damage)
            else:
                whole = step
                break
    whole = int(multihost_utils.broadcast_one_to_all(np.int32(whole)))
    if steps and whole < 0:
        raise UserError(f"{workdir}: all its checkpoints are damaged, expected a whole one; start in a new --workdir")
    return whole


def restore_best(workdir: str, abstract: Callable[[ConfigDict], TrainState]) -> tuple[ConfigDict, dict[str, Any], Any]:
    """Restore config, progress and `eval_params` of the best checkpoint, else of the newest, or what was imported.

    `abstract` makes the ShapeDtypeStructs of a config's state, with shardings. Raises `UserError` for no checkpoint.
    """
    folder = CHECKPOINTS if find_steps(workdir) else INITIAL
    expect(find_steps(workdir, folder), f"{workdir}: holds no checkpoint", "the workdir of a run of mrjax.main")
    step = find_whole(workdir, folder, read_best(workdir)["step"])
    with open_checkpoints(workdir, folder, read_only=True) as manager:
        restored = restore(manager, step, config=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore())
        config = configs.load(restored.config)
        state = abstract(config)
        name = "params" if state.ema is None else "ema"
        params = restore(manager, step, **{name: ocp.args.StandardRestore(state.eval_params)})[name]
    return config, restored.progress, params


def restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    """Restore items of a checkpoint, each by Orbax's arguments; `UserError` if it is damaged, or of another network."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{manager.directory}/{step}: this checkpoint is damaged or of another network "
            f"({str(error).splitlines()[0][:200]}); remove it, or start anew in another --workdir"
        ) from error


def named_arrays(state: TrainState) -> dict[str, Any]:
    """Return the arrays of a state by the names of a checkpoint's items."""
    arrays = {"params": state.params, "optimizer": state.opt_state, "ema": state.ema}
    return {name: values for name, values in arrays.items() if values is not None}


def find_steps(workdir: str, folder: str = CHECKPOINTS) -> list[int]:
    """Find the steps of the checkpoints in a workdir, damaged or not."""
    return [int(path.name) for path in Path(workdir, folder).glob("*") if path.name.isdigit()]


def read_best(workdir: str) -> dict[str, Any]:
    """Read best.json; `NO_BEST` where it is missing or damaged."""
    found = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(Path(workdir, CHECKPOINTS, "best.json").read_text())
    if isinstance(found, dict) and all(type(found.get(name)) is type(x) for name, x in NO_BEST.items()):
        return found
    return dict(NO_BEST)


def _seal(folder: Path) -> None:
    """Write the checksums of every checkpoint in a folder that has none yet."""
    for step in folder.iterdir() if jax.process_index() == 0 else ():
        if step.is_dir() and not (step / CHECKSUMS).exists():
            write_checksums(step)
