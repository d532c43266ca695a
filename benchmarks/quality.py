"""Score reconstructions: every method on the same unseen subjects, the same masks, the same budget of training.

    python -m benchmarks.quality [--steps=400] [--seeds=3] [--folder=runs/quality] [--json=FILE]

Demo data of 128x128 pixels and 4 coils are made in the folder, and the networks are trained there; a run that was
interrupted resumes. All networks have about as many parameters and train for as many steps of as many slices, on masks
of 4x and 8x (random columns, centre 8 % and 4 %). PyTorch's is fastMRI's `Unet` with fastMRI's `SliceDataset`,
`RandomMaskFunc` and `UnetDataTransform`, L1 and Adam; "same recipe" is the same U-Net, loss and optimizer in mrjax;
"our recipe" adds a residual connection, warm-up and cosine, random flips, an average of the parameters, and minimises
the squared error with a little SSIM; so does VarNet. mrjax scores every method on the same zero-filled slices, by
volume as fastMRI's `evaluate.py` does. The real individuals are the T1-weighted slice and the ten b = 0 slices that the
package dipy carries: magnitudes, taken for a single coil's image. Nothing was trained on them.
"""

import dataclasses
import functools
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import scoring
from benchmarks.programs import disable_augmentation
from benchmarks.report import Table, page_section, publish, replace_section, require_packages
from mrjax import cli, demo, experiment
from mrjax.baselines import CompressedSensing, ZeroFilling
from mrjax.config import defaults
from mrjax.data import resize
from mrjax.inference import Inference
from mrjax.io import hdf5
from mrjax.io.files import replacing, write_json
from mrjax.io.volume import Volume
from mrjax.mri.fourier import centred_fft2_host
from mrjax.mri.tasks import Task
from mrjax.parallel import sharding
from mrjax.train import train

BATCH, CHANNELS, LEVELS, SIZE = 8, 16, 4, 128
CENTRE_FRACTIONS = {4.0: 0.08, 8.0: 0.04}  # by acceleration
ZERO_FILLED, PYTORCH = "zero-filled", "fastMRI's U-Net, PyTorch"
UNSEEN = "unseen subjects"
# (set of volumes, method, acceleration) to the mean metrics of each seed.
Scores = dict[tuple[str, str, float], list[dict[str, Any]]]


class Method(NamedTuple):
    """A method ready for use.

    Attributes:
      predict: from an acceleration, makes the function that reconstructs a batch.
      parameters: number of parameters.
      seconds: that training took, 0 if nothing was trained.
    """

    predict: Callable[[float], scoring.Predict]
    parameters: int
    seconds: float


def base_config(seed: int) -> ConfigDict:
    """Return the fields that all trainings of mrjax share."""
    config = defaults()
    config.seed, config.batch_size, config.steps = seed, BATCH, flags.FLAGS.steps
    config.log_every = config.eval_every = config.checkpoint_every = config.steps
    config.data.dir, config.data.check, config.data.cache = str(root() / "data"), "headers", "device"
    config.data.image_size = (SIZE, SIZE)
    config.acquisition.accelerations = tuple(CENTRE_FRACTIONS)
    config.acquisition.centre_fractions = tuple(CENTRE_FRACTIONS.values())
    config.acquisition.noise = (0.0, 0.0)
    return config


def use_fastmri_unet(config: ConfigDict) -> None:
    """Set fastMRI's U-Net."""
    config.model.channels, config.model.levels, config.model.pool = CHANNELS, LEVELS, "avg"


def use_pytorch_recipe(config: ConfigDict) -> None:
    """Set fastMRI's U-Net, trained as PyTorch's is here."""
    use_fastmri_unet(config)
    config.schedule, config.warmup, config.normalise = "constant", 0.0, "standard"
    config.loss.mse, config.loss.l1 = 0.0, 1.0
    disable_augmentation(config)


def use_our_recipe(config: ConfigDict) -> None:
    """Set fastMRI's U-Net, trained as we recommend."""
    use_fastmri_unet(config)
    use_our_training(config)


def use_varnet(config: ConfigDict) -> None:
    """Set a VarNet with as many parameters, trained as we recommend."""
    config.model.name, config.model.levels = "varnet", LEVELS
    config.model.channels, config.model.cascades, config.model.sens_channels = 6, 7, 2
    config.clip_norm = 1.0
    use_our_training(config)


def use_our_training(config: ConfigDict) -> None:
    """Set the training that we recommend for any network."""
    config.model.residual = True
    config.learning_rate, config.ema, config.loss.ssim = 3e-3, 0.99, 0.02
    scoring.use_flips_only(config)


RECIPES = {
    "mrjax's U-Net, same recipe": use_pytorch_recipe,
    "mrjax's U-Net, our recipe": use_our_recipe,
    "mrjax's VarNet": use_varnet,
}


def root() -> Path:
    """Return the folder of the data and the trained networks."""
    return Path(flags.FLAGS.folder)


def make_task(config: ConfigDict, acceleration: float) -> Task:
    """Return the task of a config at one acceleration."""
    config = config.copy_and_resolve_references()
    config.acquisition.accelerations = (acceleration,)
    config.acquisition.centre_fractions = (CENTRE_FRACTIONS[acceleration],)
    return experiment.make_recipe(config, sharding.make_mesh()).task


def make_method(config: ConfigDict, params: Any, seconds: float = 0.0, model: nn.Module | None = None) -> Method:
    """Return the method that applies a model with its parameters, by default the config's network."""
    recipe = experiment.make_recipe(config, sharding.make_mesh())
    recipe = dataclasses.replace(recipe, model=model or recipe.model)

    def predict(acceleration: float) -> scoring.Predict:
        return scoring.jit_predict(dataclasses.replace(recipe, task=make_task(config, acceleration)), params)

    return Method(predict, sum(leaf.size for leaf in jax.tree.leaves(params)), seconds)


def mrjax_network(name: str, seed: int) -> Method:
    """Train a network of mrjax with its own program."""
    config = base_config(seed)
    RECIPES[name](config)
    workdir = root() / f"{name.partition(' ')[2].replace(' ', '-').replace(',', '')}-{seed}"
    start = time.perf_counter()
    train(config, str(workdir))
    seconds = keep_first(workdir / "seconds.json", time.perf_counter() - start)
    return make_method(config, Inference.restore(str(workdir)).params, seconds)


def keep_first(file: Path, value: float) -> float:
    """Write the value unless the file exists; return the file's: a training found finished took no time now."""
    if not file.exists():
        write_json(file, value)
    return float(json.loads(file.read_text()))


def pytorch_network(seed: int) -> Method:
    """Train fastMRI's U-Net with fastMRI's data path."""
    from benchmarks import pytorch

    file = root() / f"pytorch-{seed}.pt"
    start = time.perf_counter()
    unet = pytorch.TrainedUnet(CHANNELS, LEVELS, seed)
    unet.train_or_load(file, root() / "data" / "train", CENTRE_FRACTIONS, BATCH, flags.FLAGS.steps)
    seconds = keep_first(file.with_suffix(".json"), time.perf_counter() - start)
    zero_filled = make_method(base_config(seed), {}, model=ZeroFilling())

    def predict(acceleration: float) -> scoring.Predict:
        zero_fill = zero_filled.predict(acceleration)

        def reconstruct(batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
            images, peaks = zero_fill(batch)
            return images | {"reconstruction": jnp.asarray(unet(np.array(images["corrupted"])))}, peaks

        return reconstruct

    return Method(predict, unet.parameters, seconds)


def compressed_sensing(seed: int) -> Method:
    """Return FISTA, which has nothing to train."""
    return make_method(base_config(seed), {}, model=CompressedSensing())


def write_real_individuals(folder: Path) -> None:
    """Write dipy's T1-weighted slice and its ten b = 0 slices as single-coil k-space files."""
    import dipy
    import nibabel

    files = Path(dipy.__file__).parent / "data" / "files"
    volumes = {
        "real_T1": np.load(files / "t1_coronal_slice.npy")[None],
        "real_b0": np.moveaxis(nibabel.nifti1.load(files / "S0_10slices.nii.gz").get_fdata()[..., 0], 2, 0),
    }
    for name, images in volumes.items():
        images = images.astype(np.float32) / images.max()
        square = max(images.shape[1:])
        fitted = resize.resize_image(resize.crop_or_pad(images, (square, square)), (SIZE, SIZE))
        kspace = centred_fft2_host(fitted).astype(np.complex64)[:, None]
        attributes = {"max": float(fitted.max()), "norm": float(np.linalg.norm(fitted)), "acquisition": name}
        hdf5.write(folder / f"{name}.t5", {"kspace": kspace, "reconstruction_rss": fitted}, attributes)


# Below the tables, where a reader meets other figures of the same kind in the section `transfer`.
NOTE = """Both tables score the networks' own images, without the last data-consistency step of `mrjax.reconstruct`;
the networks were trained without noise, and with flips at most as augmentation. [transfer](#transfer) scores what
`mrjax.reconstruct` returns, on more heads, for `configs/unet.py` and `configs/varnet.py`, which are trained with noise
and wide augmentation: figures of the two sections cannot be compared.
"""
METHODS: dict[str, Callable[[int], Method]] = {
    "compressed sensing (total variation)": compressed_sensing,
    PYTORCH: pytorch_network,
    **{name: functools.partial(mrjax_network, name) for name in RECIPES},
}


def measure(sets: dict[str, list[Volume]], seeds: int) -> tuple[Scores, dict[str, Method], dict[str, np.ndarray]]:
    """Train and score all methods; also returns the methods, and each one's image of the same slice at 4x."""
    scores: Scores = {}
    methods: dict[str, Method] = {}
    shown: dict[str, np.ndarray] = {}
    for name, make in METHODS.items():
        for seed in range(1 if make is compressed_sensing else seeds):
            method = methods[name] = make(seed)
            for set_name, volumes in sets.items():
                for acceleration in CENTRE_FRACTIONS:
                    predict = method.predict(acceleration)
                    found, previews = scoring.score_volumes(predict, volumes, SIZE, BATCH)
                    scores.setdefault((set_name, name, acceleration), []).append(found["reconstruction"])
                    scores[set_name, ZERO_FILLED, acceleration] = [found["corrupted"]]
                    if set_name == UNSEEN and acceleration == 4 and seed == 0:
                        images = next(iter(previews.values()))
                        shown |= {"target": images["target"], ZERO_FILLED: images["corrupted"]}
                        shown[name] = images["reconstruction"]
    return scores, methods, shown


def main(_: list[str]) -> None:
    """Make the data, train, score, draw and publish."""
    require_packages("torch", "fastmri", "dipy")
    logging.getLogger("mrjax").setLevel(logging.WARNING)
    values = flags.FLAGS
    if not (root() / "data").exists():
        demo.make(root() / "data", demo.Settings(size=SIZE, coils=4))
    write_real_individuals(root() / "real")
    sets = {
        UNSEEN: scoring.find_volumes(root() / "data" / "test", "kspace"),
        "real individuals": scoring.find_volumes(root() / "real", "kspace"),
    }
    scores, methods, shown = measure(sets, values.seeds)
    tables = [quality_table(name, scores, methods) for name in sets]
    draw_gallery(values.figure, shown, title=f"4x, an unseen subject, {values.steps} steps")
    raw = [{"of": of, "method": name, "acceleration": a, "seeds": found} for (of, name, a), found in scores.items()]
    command = {"steps": values.steps, "seeds": values.seeds}
    publish("quality", command | {"batch": BATCH, "size": SIZE}, tables, raw, values.json)
    picture = f"![Every method on the same slice]({os.path.relpath(values.figure, Path(values.readme).parent)})\n"
    section = f"{page_section('quality', command, tables)}\n{NOTE}\n{picture}"
    replace_section(Path(values.readme), "quality", section)


def draw_gallery(path: str | Path, images: dict[str, np.ndarray], title: str) -> None:
    """Draw the reconstructions of one slice by several methods, and below each its absolute error, as a PNG.

    Images are real (height, width) in one unit, by name; the first is the target. All share the grey scale from 0 to
    its 99.5th percentile, and the errors a scale up to the largest of theirs.
    """
    target, *reconstructions = images.values()
    white = np.percentile(target, 99.5)
    errors = [100 / white * np.abs(image - target) for image in reconstructions]
    limit = max(np.percentile(error, 99.5) for error in errors) or 1.0
    figure = Figure(figsize=(3 * len(images), 7), dpi=144, facecolor="black", layout="constrained")
    figure.suptitle(title, color="white", weight="bold")
    axes = figure.subplots(2, len(images), subplot_kw={"frame_on": False, "xticks": (), "yticks": ()})
    for cell, (name, image) in zip(axes[0], images.items(), strict=True):
        cell.set_title(name, color="white", size=10)
        cell.imshow(image, "gray", vmin=0, vmax=white, interpolation="nearest")
    axes[1, 0].set_title(f"absolute error: 0 to {limit:.1f} % of white", color="white", size=10)
    for cell, error in zip(axes[1, 1:], errors, strict=True):
        cell.imshow(error, "inferno", vmin=0, vmax=limit, interpolation="nearest")
    with replacing(path) as part:
        figure.savefig(part, format="png")


def quality_table(set_name: str, scores: Scores, methods: dict[str, Method]) -> Table:
    """Return PSNR and SSIM of every method: the mean over seeds, with the lowest and the highest."""
    rows = []
    for name in [ZERO_FILLED, *METHODS]:
        row: list[Any] = [name]
        for acceleration in CENTRE_FRACTIONS:
            for metric, digits in (("psnr", 2), ("ssim", 4)):
                means = [found[metric]["mean"] for found in scores[set_name, name, acceleration]]
                limits = f" ({min(means):.{digits}f} to {max(means):.{digits}f})" if len(means) > 1 else ""
                row.append(f"{statistics.fmean(means):.{digits}f}{limits}")
        method = methods.get(name)
        row.append(f"{method.parameters:,}" if method else "")
        row.append(f"{method.seconds:.0f}" if method and method.seconds else "")
        rows.append(row)
    columns = ["method", *(f"{metric}, {a:g}x" for a in CENTRE_FRACTIONS for metric in ("PSNR (dB)", "SSIM"))]
    return Table(f"Quality on {set_name}", [*columns, "parameters", "seconds to train"], rows)


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 400, "steps of every training")
    flags.DEFINE_integer("seeds", 3, "trainings of every network")
    flags.DEFINE_string("folder", "runs/quality", "folder for the data and the trained networks")
    flags.DEFINE_string("figure", "docs/models.png", "picture of every method on the same slice")
    flags.DEFINE_string("readme", "benchmarks/README.md", "page whose section `quality` is rewritten")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
