"""A training run and its checkpoints: claimed, gone on from, saved, and which of them are kept."""

import contextlib
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
from mrjax.checkpoint import store
from mrjax.checkpoint.store import BEST_METRIC, CHECKPOINTS, INITIAL
from mrjax.errors import UserError, expect
from mrjax.io.files import lock, write_json
from mrjax.train_step import TrainState

logger = logging.getLogger(__name__)
_MARGIN = 1 << 20  # bytes of a checkpoint beside its arrays, at most


class Run(contextlib.AbstractContextManager["Run"]):
    """The checkpoints of a training run in its workdir; a context manager, at whose end everything is written.

    `train_files` is a fingerprint of the training files, which must stay the same; `val_files` one of the validation
    files: the best checkpoint is the best on these.
    """

    def __init__(self, workdir: str, config: ConfigDict, train_files: str, val_files: str):
        self.workdir, self._config, self._train_files, self._val_files = workdir, config, train_files, val_files
        self._manager = store.open_checkpoints(workdir, kept=self._kept)
        self._best = store.read_best(workdir)
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
        sentence, fits = describe_space(self.workdir, abstract)
        logger.log(logging.INFO if fits else logging.WARNING, sentence)
        step = store.find_whole(self.workdir)
        self._abandoned = [newer for newer in self._manager.all_steps() if newer > step]
        if self._best["step"] > step:  # it is about to be replaced by the steps that come again
            self._best = dict(store.NO_BEST)
        if step < 0:
            state = init()
            if store.find_whole(self.workdir, INITIAL) < 0:
                return state, 0
            with store.open_checkpoints(self.workdir, INITIAL, read_only=True) as manager:
                params = store.restore(manager, 0, params=ocp.args.StandardRestore(abstract.params)).params
            return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params)), 0
        items = {name: ocp.args.StandardRestore(shapes) for name, shapes in store.named_arrays(abstract).items()}
        restored = store.restore(self._manager, step, **items, progress=ocp.args.JsonRestore())
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
            store.save(self._manager, state, {"step": step, "files": self._train_files, "order": order}, self._config)

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
            self._manager = store.open_checkpoints(self.workdir, kept=self._kept)


def describe_space(workdir: str, state: TrainState) -> tuple[str, bool]:
    """Compare what is free on the disk with the newest two checkpoints, the best and one in the making.

    Returns a sentence, and whether they fit.
    """
    size, free = _size(state) + _MARGIN, _free(workdir)
    missing = max(4 - len(store.find_steps(workdir)), 1) * size
    sizes = f"checkpoints of {_megabytes(size)} each take up to {_megabytes(missing)} more"
    return f"{workdir} has {_megabytes(free)} free, {sizes}", missing <= free


def claim(workdir: str, config: ConfigDict) -> contextlib.AbstractContextManager[Any]:
    """Make the workdir this run's, or check that it is. A run that saved nothing yet may be started anew.

    Process 0 goes first: the others find what it wrote. Returns the workdir's lock, a context manager. Raises
    `UserError` if another run holds it, or the workdir holds something else, or a run or imported parameters whose
    config differs where it must not.
    """
    started, trained = require_own(workdir, config), bool(store.find_steps(workdir))
    if jax.process_index():
        expect(started, f"{workdir} is not the folder that process 0 wrote to", "one that all processes share")
        return contextlib.nullcontext()
    held = lock(workdir)
    if not trained:
        write_json(Path(workdir, "config.json"), config.to_dict())
    return held


def require_own(workdir: str, config: ConfigDict) -> bool:
    """Return whether the workdir holds a run with this config, or is new; raises `UserError` for one of another."""
    started = os.path.isdir(workdir) and any(not name.startswith(".") for name in os.listdir(workdir))
    trained = bool(store.find_steps(workdir))
    if started:
        before = _read_config(workdir)
        if before is None or os.path.exists(os.path.join(workdir, store.EXPORTED)):
            raise UserError(f"{workdir} holds files but no run of mrjax, expected an empty or new folder as --workdir")
        changed = configs.differences(before, config, parameters_only=not trained)
        if changed and (trained or store.find_steps(workdir, INITIAL)):
            found = f"{workdir} holds another run: {'; '.join(changed)}"
            raise UserError(f"{found}; set them back, or give another --workdir")
    return started


def _read_config(workdir: str) -> ConfigDict | None:
    """Read the config of a run, from its newest checkpoint where config.json is damaged; None if there is none."""
    steps = sorted(store.find_steps(workdir), reverse=True)
    copies = [Path(workdir, CHECKPOINTS, str(step), "config", "metadata") for step in steps]
    for file in (Path(workdir, "config.json"), *copies):
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            return configs.load(json.loads(file.read_text()))
    return None


def read_trained_files(workdir: str) -> str:
    """Read the fingerprint of the files that the newest checkpoint was trained on; '' if none can be read."""
    newest = max(store.find_steps(workdir), default=-1)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads(Path(workdir, CHECKPOINTS, str(newest), "progress", "metadata").read_text())["files"])
    return ""


def _size(state: TrainState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _free(workdir: str) -> int:
    """Return the bytes free on the disk of the workdir, which may be yet to be made, as process 0 sees it."""
    folder = next(folder for folder in (Path(workdir), *Path(workdir).absolute().parents) if folder.exists())
    kilobytes = shutil.disk_usage(folder).free >> 10
    return int(multihost_utils.broadcast_one_to_all(np.int32(min(kilobytes, 2**31 - 1)))) << 10


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
