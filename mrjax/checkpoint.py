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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mrjax import config as configs
from mrjax.errors import UserError, expect
from mrjax.io.files import CHECKSUMS, find_damage, lock, write_checksums, write_json
from mrjax.train_step import TrainState

logger = logging.getLogger(__name__)
BEST_METRIC = "ssim"  # on the validation split, by which the best checkpoint is chosen
CHECKPOINTS, INITIAL = "checkpoints", "initial"  # folders of a workdir
EXPORTED = "model.safetensors"  # a file in folders of `mrjax.export`, which are no workdirs to train in
_NO_BEST = {"step": -1, BEST_METRIC: -1.0, "files": "", "validated": -1}
_ITEMS = ("params", "ema", "optimizer", "progress", "config")
_MARGIN = 1 << 20  # bytes of a checkpoint beside its arrays, at most


class Run(contextlib.AbstractContextManager["Run"]):
    """The checkpoints of a training run in its workdir; a context manager, at whose end everything is written.

    `train_files` is a fingerprint of the training files, which must stay the same; `val_files` one of the validation
    files: the best checkpoint is the best on these.
    """

    def __init__(self, workdir: str, config: ConfigDict, train_files: str, val_files: str):
        self.workdir, self._config, self._train_files, self._val_files = workdir, config, train_files, val_files
        self._manager = open_checkpoints(workdir, kept=self._kept)
        self._best = read_best(workdir)
        if self._best["files"] != val_files:
            self._best |= {BEST_METRIC: -1.0, "validated": -1}
        self._unsaved = ""  # why the last save failed
        self._abandoned: list[int] = []  # damaged checkpoints, newer than the one that the run went on from

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._finish()
        self._manager.close()
        if self._unsaved and kind is None:
            raise UserError(f"{self._unsaved}; the last checkpoint is of step {self.saved_step}")

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        return max((step for step in self._manager.all_steps() if step not in self._abandoned), default=0)

    def restore_or_init(self, abstract: TrainState, init: Callable[[], TrainState]) -> tuple[TrainState, int]:
        """Restore the newest whole checkpoint; without any, draw a fresh state, or one of the imported parameters.

        `abstract` holds ShapeDtypeStructs with shardings, and `init` draws a state of these. Returns the state and the
        order of the examples that it was trained in, 0 unless it went back. Raises `UserError` if all checkpoints are
        damaged, or of another network, or trained on other files unless config.data.on_bad_file is 'skip'.
        """
        self._finish()
        self._warn_of_little_space(_size(abstract))
        step = find_whole(self.workdir)
        self._abandoned = [newer for newer in self._manager.all_steps() if newer > step]
        if self._best["step"] > step:  # it is about to be replaced by the steps that come again
            self._best = dict(_NO_BEST)
        if step < 0:
            state = init()
            if find_whole(self.workdir, INITIAL) < 0:
                return state, 0
            with open_checkpoints(self.workdir, INITIAL, read_only=True) as manager:
                params = _restore(manager, 0, params=ocp.args.StandardRestore(abstract.params)).params
            return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params)), 0
        items = {name: ocp.args.StandardRestore(shapes) for name, shapes in _arrays(abstract).items()}
        restored = _restore(self._manager, step, **items, progress=ocp.args.JsonRestore())
        files, order = restored.progress["files"], restored.progress["order"]
        if files != self._train_files:
            found = f"{self.workdir} was trained on {files}, found {self._train_files}"
            if self._config.data.on_bad_file != "skip":
                raise UserError(f"{found}; expected the same files")
            logger.warning("%s; going on with these, in another order", found)
        of_step = jax.device_put(jnp.int32(step), abstract.step.sharding)
        return TrainState(of_step, restored.params, restored.optimizer, restored.get("ema")), order

    def save(self, state: TrainState, step: int, order: int) -> None:
        """Start to write a checkpoint, unless it is there; warn if there is no room for it, or the last one failed."""
        self._finish()
        if step == self.saved_step:
            return
        self._unsaved, need, free = "", _size(state) + _MARGIN, _free(self.workdir)
        if need > free:
            self._unsaved = (
                f"step {step} is not saved: it takes {_megabytes(need)}, {self.workdir} has {_megabytes(free)} free"
            )
            logger.warning("%s; training goes on and tries again at the next checkpoint", self._unsaved)
            return
        for damaged in self._abandoned:
            self._manager.delete(damaged)
        self._abandoned = []
        with self._reopened_after_failure():
            save(self._manager, state, {"step": step, "files": self._train_files, "order": order}, self._config)

    def record_validation(self, step: int, value: float) -> None:
        """Note that the checkpoint of `step` is validated, and whether its `BEST_METRIC` is the best so far."""
        self._finish()
        if self.saved_step != step:
            return
        self._best["validated"] = step
        if value > self._best[BEST_METRIC]:
            self._best |= {"step": step, BEST_METRIC: value, "files": self._val_files}
        try:
            if jax.process_index() == 0:
                write_json(Path(self.workdir, CHECKPOINTS, "best.json"), self._best)
        except OSError as error:
            logger.warning("best.json is not written before the next validation: %s", error)

    def is_validated(self, step: int) -> bool:
        """Return whether the checkpoint of `step` was validated, on the validation files of this run."""
        return self._best["validated"] == step

    def _kept(self, steps: Sequence[int]) -> list[bool]:
        return [step in (*steps[-2:], self._best["step"]) for step in steps]

    def _finish(self) -> None:
        """Wait until the last save is written."""
        with self._reopened_after_failure():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _reopened_after_failure(self) -> Iterator[None]:
        """Warn if a save fails, and open the checkpoints anew, which takes away what it left."""
        try:
            yield
        except (OSError, ValueError) as error:
            free, reason = _megabytes(_free(self.workdir)), str(error).splitlines()[0]
            self._unsaved = f"a checkpoint could not be written, {self.workdir} has {free} free ({reason[-200:]})"
            logger.warning("%s; training goes on and tries again at the next checkpoint", self._unsaved)
            with contextlib.suppress(OSError, ValueError):  # Orbax may raise the same again
                self._manager.close()
            self._manager = open_checkpoints(self.workdir, kept=self._kept)

    def _warn_of_little_space(self, size: int) -> None:
        """Warn if the newest two, the best and one in the making do not fit on the disk."""
        missing = (4 - len(_steps(self.workdir))) * (size + _MARGIN)
        if missing > (free := _free(self.workdir)):
            logger.warning(
                "%s has %s free, the checkpoints take up to %s more",
                self.workdir,
                _megabytes(free),
                _megabytes(missing),
            )


def claim(workdir: str, config: ConfigDict) -> contextlib.AbstractContextManager[Any]:
    """Make the workdir this run's, or check that it is. A run that saved nothing yet may be started anew.

    Process 0 goes first: the others find what it wrote. Returns the workdir's lock, a context manager. Raises
    `UserError` if another run holds it, or the workdir holds something else, or a run or imported parameters whose
    config differs where it must not.
    """
    started = os.path.isdir(workdir) and any(not name.startswith(".") for name in os.listdir(workdir))
    trained = bool(_steps(workdir))
    if started:
        before = _read_config(workdir)
        if before is None or os.path.exists(os.path.join(workdir, EXPORTED)):
            raise UserError(f"{workdir} holds files but no run of mrjax, expected an empty or new folder as --workdir")
        changed = configs.differences(before, config, parameters_only=not trained)
        if changed and (trained or _steps(workdir, INITIAL)):
            found = f"{workdir} holds another run: {'; '.join(changed)}"
            raise UserError(f"{found}; set them back, or give another --workdir")
    if jax.process_index():
        expect(started, f"{workdir} is not the folder that process 0 wrote to", "one that all processes share")
        return contextlib.nullcontext()
    held = lock(workdir)
    if not trained:
        write_json(Path(workdir, "config.json"), config.to_dict())
    return held


def _read_config(workdir: str) -> ConfigDict | None:
    """Read the config of a run, from its newest checkpoint where config.json is damaged; None if there is none."""
    steps = sorted(_steps(workdir), reverse=True)
    copies = [Path(workdir, CHECKPOINTS, str(step), "config", "metadata") for step in steps]
    for file in (Path(workdir, "config.json"), *copies):
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            return configs.load(json.loads(file.read_text()))
    return None


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
    options = ocp.CheckpointManagerOptions(
        read_only=read_only,
        preservation_policy=_Preservation(kept) if kept else None,
        cleanup_tmp_directories=not read_only,
        # Orbax calls this before it renames a checkpoint into its place, so none is without.
        async_options=ocp.AsyncOptions(post_finalization_callback=functools.partial(_seal, Path(path))),
    )
    return _Manager(path, options=options, item_names=_ITEMS)


def save(manager: ocp.CheckpointManager, state: TrainState, progress: dict[str, Any], config: ConfigDict) -> None:
    """Start to write a checkpoint after `progress['step']` steps; the state is copied at once, so it may be donated."""
    items = {name: ocp.args.StandardSave(values) for name, values in _arrays(state).items()}
    items |= {"progress": ocp.args.JsonSave(progress), "config": ocp.args.JsonSave(config.to_dict())}
    manager.save(progress["step"], args=ocp.args.Composite(**items))


def find_whole(workdir: str, folder: str = CHECKPOINTS, first: int = -1) -> int:
    """Find the newest checkpoint all of whose files have their checksums, or `first` if that has; -1 if there is none.

    A damaged one is passed over with a warning. Raises `UserError` if all are damaged.
    """
    steps = sorted(_steps(workdir, folder), key=lambda step: (step == first, step), reverse=True)
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
    folder = CHECKPOINTS if _steps(workdir) else INITIAL
    expect(_steps(workdir, folder), f"{workdir}: holds no checkpoint", "the workdir of a run of mrjax.main")
    step = find_whole(workdir, folder, read_best(workdir)["step"])
    with open_checkpoints(workdir, folder, read_only=True) as manager:
        restored = _restore(manager, step, config=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore())
        config = configs.load(restored.config)
        state = abstract(config)
        name = "params" if state.ema is None else "ema"
        params = _restore(manager, step, **{name: ocp.args.StandardRestore(state.eval_params)})[name]
    return config, restored.progress, params


def _arrays(state: TrainState) -> dict[str, Any]:
    arrays = {"params": state.params, "optimizer": state.opt_state, "ema": state.ema}
    return {name: values for name, values in arrays.items() if values is not None}


def _size(state: TrainState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _steps(workdir: str, folder: str = CHECKPOINTS) -> list[int]:
    return [int(path.name) for path in Path(workdir, folder).glob("*") if path.name.isdigit()]


def _free(workdir: str) -> int:
    """Return the bytes free on the workdir's disk, as process 0 sees it."""
    kilobytes = shutil.disk_usage(workdir).free >> 10
    return int(multihost_utils.broadcast_one_to_all(np.int32(min(kilobytes, 2**31 - 1)))) << 10


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def read_best(workdir: str) -> dict[str, Any]:
    """Read best.json; `_NO_BEST` where it is missing or damaged."""
    found = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(Path(workdir, CHECKPOINTS, "best.json").read_text())
    if isinstance(found, dict) and all(type(found.get(name)) is type(x) for name, x in _NO_BEST.items()):
        return found
    return dict(_NO_BEST)


def _seal(folder: Path) -> None:
    """Write the checksums of every checkpoint in a folder that has none yet."""
    for step in folder.iterdir() if jax.process_index() == 0 else ():
        if step.is_dir() and not (step / CHECKSUMS).exists():
            write_checksums(step)


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{manager.directory}/{step}: this checkpoint is damaged or of another network "
            f"({str(error).splitlines()[0][:200]}); remove it, or start anew in another --workdir"
        ) from error
