"""Orbax: everything a run needs to go on, and everything inference needs, as one atomic unit.

A workdir holds
  config.json            the run it belongs to
  checkpoints/newest/N   after step N: parameters, their average if there is one, optimizer state, progress (step,
                         position in the data), config
  checkpoints/best/N     the same, of the step with the best validation SSIM
  checkpoints/initial/0  imported parameters that training starts from, and their config
Orbax writes a checkpoint beside its place and renames it when it is whole, so a kill at any moment leaves the last one.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mrjax import config as configs
from mrjax.errors import UserError
from mrjax.train_step import TrainState


def claim(workdir: str, config: ConfigDict) -> None:
    """Makes the workdir this run's, or checks that it is. A run that saved nothing yet may be started anew.

    One that imported parameters only shares the network's config with what comes of it.

    Process 0 goes first: the others find what it wrote.

    Raises:
      UserError: it holds something else, or a run whose config differs where a resumed run must not.
    """
    file = Path(workdir) / "config.json"
    started = os.path.isdir(workdir) and any(not name.startswith(".") for name in os.listdir(workdir))
    if started:
        try:
            before = configs.load(json.loads(file.read_text()))
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{workdir} holds files but no run of mrjax, expected an empty or new folder as --workdir"
            ) from error
    trained, imported = _holds(workdir, "newest") or _holds(workdir, "best"), _holds(workdir, "initial")
    if started and (trained or imported):
        changed = configs.differences(before, config, of_network=not trained)
        if changed:
            raise UserError(
                f"{workdir} holds another run: {'; '.join(changed)}; set them back, or give another --workdir"
            )
    if trained:
        return
    if jax.process_index() == 0:
        write_json(file, configs.dump(config))
    elif not started:
        raise UserError(f"{workdir} is not the folder that process 0 wrote to, expected one that all processes share")


def _holds(workdir: str, kind: str) -> bool:
    """Whether there is a checkpoint of that kind."""
    return any(path.name.isdigit() for path in Path(workdir, "checkpoints", kind).glob("*"))


def write_json(path: Path, values: Any) -> None:
    """Writes JSON beside its place, then renames it into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(part, path)


def open_checkpoints(workdir: str, kind: str, *, read_only: bool = False) -> ocp.CheckpointManager:
    """The 'newest', 'best' or 'initial' checkpoints of a run; one is kept, and the last until the next is whole.

    A reader must say `read_only`: a writer clears away what was half written, which may be the save of a live run.
    """
    if read_only:
        options = ocp.CheckpointManagerOptions(read_only=True)
    else:
        # Processes meet by name and step: the two kinds may be saving the same step at the same time.
        by_kind = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=kind)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, cleanup_tmp_directories=True, multiprocessing_options=by_kind
        )
    names = ("params", "ema", "optimizer", "progress", "config")
    return ocp.CheckpointManager(
        os.path.abspath(os.path.join(workdir, "checkpoints", kind)), options=options, item_names=names
    )


def save(manager: ocp.CheckpointManager, state: TrainState, progress: dict[str, Any], config: ConfigDict) -> None:
    """Starts writing a checkpoint; the state is copied before this returns, so it may be donated.

    Args:
      manager: from `open_checkpoints`.
      state: after `progress['step']` steps.
      progress: step, examples (how many were drawn from the data), files (their fingerprint); for the best one also
        ssim, and validated_on (the fingerprint of the validation files).
      config: of the run, image size included.
    """
    # Orbax passes over a step that is not newer than its newest, as after going back to an older checkpoint.
    for newer in (step for step in manager.all_steps() if step >= progress["step"]):
        manager.delete(newer)
    arrays = {"params": state.params, "optimizer": state.opt_state, "ema": state.ema}
    items = {name: ocp.args.StandardSave(values) for name, values in arrays.items() if values is not None}
    items |= {"progress": ocp.args.JsonSave(progress), "config": ocp.args.JsonSave(configs.dump(config))}
    manager.save(progress["step"], args=ocp.args.Composite(**items))


def _restore(manager: ocp.CheckpointManager, **items: Any) -> Any:
    """The items asked for, of the newest step."""
    step = manager.latest_step()
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{manager.directory}/{step}: this checkpoint is damaged or of another network "
            f"({str(error).splitlines()[0][:200]}); remove it, or start anew in another --workdir"
        ) from error


def best_ssim(manager: ocp.CheckpointManager, validated_on: str) -> float:
    """The SSIM of the 'best' checkpoint; -1 before the first, or if it was validated on other files.

    It is asked of the checkpoint itself, for a kill may have come after it was saved and before the newest was.
    """
    if manager.latest_step() is None:
        return -1.0
    progress = _restore(manager, progress=ocp.args.JsonRestore()).progress
    return progress["ssim"] if progress["validated_on"] == validated_on else -1.0


def restore(manager: ocp.CheckpointManager, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest state, laid out as `like` (ShapeDtypeStructs with shardings), and its progress; None if none."""
    if manager.latest_step() is None:
        return None
    arrays = {"params": like.params, "optimizer": like.opt_state, "ema": like.ema}
    items = {name: ocp.args.StandardRestore(shapes) for name, shapes in arrays.items() if shapes is not None}
    restored = _restore(manager, **items, progress=ocp.args.JsonRestore())
    state = TrainState(params=restored.params, opt_state=restored.optimizer, ema=restored.get("ema"))
    return state, restored.progress


def with_imported(workdir: str, state: TrainState, like: TrainState) -> TrainState:
    """The state, with the parameters that were imported into the workdir if any were."""
    if not _holds(workdir, "initial"):
        return state
    with contextlib.closing(open_checkpoints(workdir, "initial", read_only=True)) as manager:
        params = _restore(manager, params=ocp.args.StandardRestore(like.params)).params
    return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def best(workdir: str) -> tuple[ocp.CheckpointManager, ConfigDict, dict[str, Any]]:
    """The best checkpoint of a run, or the newest, or what it imported: its manager, config and progress.

    Raises:
      UserError: no checkpoint there.
    """
    for kind in ("best", "newest", "initial"):
        if os.path.isdir(os.path.join(workdir, "checkpoints", kind)):
            manager = open_checkpoints(workdir, kind, read_only=True)
            if manager.latest_step() is not None:
                restored = _restore(manager, config=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore())
                return manager, configs.load(restored.config), restored.progress
            manager.close()
    raise UserError(f"{workdir}: holds no checkpoint, expected the workdir of a run of mrjax.main")


def restore_params(manager: ocp.CheckpointManager, like: TrainState) -> Any:
    """The parameters to reconstruct with, alone, laid out as in `like` (ShapeDtypeStructs with shardings)."""
    name = "params" if like.ema is None else "ema"
    return _restore(manager, **{name: ocp.args.StandardRestore(like.best_params)})[name]
