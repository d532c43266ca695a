"""The workdir of a run: everything it needs to go on, and everything inference needs, as atomic Orbax checkpoints.

A workdir holds
  config.json            the run it belongs to
  checkpoints/newest/N   after step N: parameters, their average if there is one, optimizer state, progress (step,
                         fingerprint of the files), config
  checkpoints/best/N     the same, of the step with the best validation SSIM
  checkpoints/initial/0  imported parameters that training starts from, and their config
Orbax writes a checkpoint beside its place and renames it when it is whole, so a kill at any moment leaves the last one.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mrjax import config as configs
from mrjax.data.files import write_json
from mrjax.errors import UserError, expect
from mrjax.train_step import TrainState

BEST_METRIC = "ssim"  # on the validation split, by which the best checkpoint is chosen
_ITEMS = ("params", "ema", "optimizer", "progress", "config")


class Run(contextlib.AbstractContextManager["Run"]):
    """The checkpoints of a training run in its workdir; a context manager, at whose end everything is written.

    `train_files` is a fingerprint of the training files, which must stay the same; `val_files` one of the validation
    files: the best checkpoint is the best on these.
    """

    def __init__(self, workdir: str, config: ConfigDict, train_files: str, val_files: str):
        self._workdir, self._config, self._train_files, self._val_files = workdir, config, train_files, val_files
        self._newest, self._best = (open_checkpoints(workdir, kind) for kind in ("newest", "best"))
        # The best checkpoint itself says how good it is: a kill may come between its save and that of the newest.
        self._best_value = -1.0
        if self._best.latest_step() is not None:
            progress = _restore(self._best, progress=ocp.args.JsonRestore()).progress
            if progress["validated_on"] == val_files:
                self._best_value = progress[BEST_METRIC]

    def __exit__(self, *exception: Any) -> None:
        self._newest.close()
        self._best.close()

    def restore_or_init(self, abstract: TrainState, init: Callable[[], TrainState]) -> TrainState:
        """Restore the newest state; without one, draw a fresh state, with the imported parameters if there are any.

        `abstract` holds ShapeDtypeStructs with shardings, and `init` draws a state of these. Raises `UserError` if the
        checkpoint is damaged, of another network or trained on other files.
        """
        if self._newest.latest_step() is None:
            state = init()
            if not _has_checkpoint(self._workdir, "initial"):
                return state
            with open_checkpoints(self._workdir, "initial", read_only=True) as manager:
                params = _restore(manager, params=ocp.args.StandardRestore(abstract.params)).params
            return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))
        items = {name: ocp.args.StandardRestore(shapes) for name, shapes in _arrays(abstract).items()}
        restored = _restore(self._newest, **items, progress=ocp.args.JsonRestore())
        files = restored.progress["files"]
        if files != self._train_files:
            found = f"{self._workdir} was trained on {files}, found {self._train_files}"
            raise UserError(f"{found}; expected the same files")
        step = jax.device_put(jnp.int32(restored.progress["step"]), abstract.step.sharding)
        return TrainState(step, restored.params, restored.optimizer, restored.get("ema"))

    def save(self, state: TrainState, step: int) -> None:
        """Start to write the newest checkpoint."""
        save(self._newest, state, {"step": step, "files": self._train_files}, self._config)

    def save_if_best(self, state: TrainState, step: int, value: float) -> None:
        """Start to write the best checkpoint if `value`, the `BEST_METRIC` of the validation, is the best so far."""
        if value > self._best_value:
            self._best_value = value
            progress = {"step": step, "files": self._train_files, BEST_METRIC: value, "validated_on": self._val_files}
            save(self._best, state, progress, self._config)


def claim(workdir: str, config: ConfigDict) -> None:
    """Make the workdir this run's, or check that it is. A run that saved nothing yet may be started anew.

    Process 0 goes first: the others find what it wrote. Raises `UserError` if the workdir holds something else, or a
    run or imported parameters whose config differs where it must not.
    """
    file = Path(workdir) / "config.json"
    started = os.path.isdir(workdir) and any(not name.startswith(".") for name in os.listdir(workdir))
    trained = _has_checkpoint(workdir, "newest") or _has_checkpoint(workdir, "best")
    if started:
        try:
            before = configs.load(json.loads(file.read_text()))
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            found = f"{workdir} holds files but no run of mrjax"
            raise UserError(f"{found}, expected an empty or new folder as --workdir") from error
        changed = configs.differences(before, config, parameters_only=not trained)
        if changed and (trained or _has_checkpoint(workdir, "initial")):
            found = f"{workdir} holds another run: {'; '.join(changed)}"
            raise UserError(f"{found}; set them back, or give another --workdir")
    if trained:
        return
    if jax.process_index() == 0:
        write_json(file, config.to_dict())
    elif not started:
        raise UserError(f"{workdir} is not the folder that process 0 wrote to, expected one that all processes share")


def open_checkpoints(workdir: str, kind: str, *, read_only: bool = False) -> ocp.CheckpointManager:
    """Open the 'newest', 'best' or 'initial' checkpoints of a run; one is kept, and the last until the next is whole.

    A reader must be `read_only`: a writer clears away what is half written, which may be the save of a live run.
    """
    options = ocp.CheckpointManagerOptions(
        read_only=read_only,
        max_to_keep=None if read_only else 1,
        cleanup_tmp_directories=not read_only,
        # Processes meet by name and step: the two kinds may be saving the same step at the same time.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=kind),
    )
    folder = os.path.abspath(os.path.join(workdir, "checkpoints", kind))
    return ocp.CheckpointManager(folder, options=options, item_names=_ITEMS)


def save(manager: ocp.CheckpointManager, state: TrainState, progress: dict[str, Any], config: ConfigDict) -> None:
    """Start to write a checkpoint after `progress['step']` steps; the state is copied at once, so it may be donated."""
    # Orbax passes over a step that is not newer than its newest, as after going back to an older checkpoint.
    for newer in (step for step in manager.all_steps() if step >= progress["step"]):
        manager.delete(newer)
    items = {name: ocp.args.StandardSave(values) for name, values in _arrays(state).items()}
    items |= {"progress": ocp.args.JsonSave(progress), "config": ocp.args.JsonSave(config.to_dict())}
    manager.save(progress["step"], args=ocp.args.Composite(**items))


def restore_best(workdir: str, abstract: Callable[[ConfigDict], TrainState]) -> tuple[ConfigDict, dict[str, Any], Any]:
    """Restore config, progress and `eval_params` of the best checkpoint, else of the newest, or what was imported.

    `abstract` makes the ShapeDtypeStructs of a config's state, with shardings. Raises `UserError` for no checkpoint.
    """
    kinds = [kind for kind in ("best", "newest", "initial") if _has_checkpoint(workdir, kind)]
    expect(kinds, f"{workdir}: holds no checkpoint", "the workdir of a run of mrjax.main")
    with open_checkpoints(workdir, kinds[0], read_only=True) as manager:
        restored = _restore(manager, config=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore())
        config = configs.load(restored.config)
        state = abstract(config)
        name = "params" if state.ema is None else "ema"
        params = _restore(manager, **{name: ocp.args.StandardRestore(state.eval_params)})[name]
    return config, restored.progress, params


def _arrays(state: TrainState) -> dict[str, Any]:
    arrays = {"params": state.params, "optimizer": state.opt_state, "ema": state.ema}
    return {name: values for name, values in arrays.items() if values is not None}


def _has_checkpoint(workdir: str, kind: str) -> bool:
    return any(path.name.isdigit() for path in Path(workdir, "checkpoints", kind).glob("*"))


def _restore(manager: ocp.CheckpointManager, **items: Any) -> Any:
    step = manager.latest_step()
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{manager.directory}/{step}: this checkpoint is damaged or of another network "
            f"({str(error).splitlines()[0][:200]}); remove it, or start anew in another --workdir"
        ) from error
