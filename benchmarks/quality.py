"""How good the reconstructions are: every method on the same unseen subjects, the same masks, the same budget.

    python -m benchmarks.quality [--steps=400] [--seeds=3] [--folder=runs/quality] [--json=FILE]

Demo data of 128x128 pixels and 4 coils are made in the folder, and each network is trained there, or found trained: a
run that was cut off goes on. All networks have about as many parameters, train for as many steps of as many slices, on
masks of 4x and 8x (random columns, centre 8 % and 4 %). PyTorch's is fastMRI's `Unet` with fastMRI's `SliceDataset`,
`RandomMaskFunc` and `UnetDataTransform`, L1 and Adam; "same recipe" is the same U-Net, loss and optimizer in mrjax;
"our recipe" adds a residual connection, warm-up and cosine, random flips, an average of the parameters, and minimises
the squared error with a little SSIM; so does VarNet. Every method
is scored by mrjax on the same zero-filled slices, over volumes as fastMRI's `evaluate.py` does. The real individuals
are the T1-weighted slice and the ten b = 0 slices that the package dipy carries: magnitudes, taken for a single coil's
image. Nothing was trained on them.
"""

import datetime
import functools
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fastmri.data
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from fastmri.data.subsample import RandomMaskFunc
from fastmri.data.transforms import UnetDataTransform
from fastmri.models import Unet
from ml_collections import ConfigDict

from benchmarks.report import Table, environment, markdown, publish
from benchmarks.tables import write
from mrjax import cli, demo, experiment, train_step
from mrjax.baselines.compressed_sensing import CompressedSensing
from mrjax.checkpoint import write_json
from mrjax.config import defaults
from mrjax.data import hdf5, loader, resize, splits
from mrjax.evaluate import evaluate, summarise
from mrjax.mri.augment import Augment
from mrjax.mri.fourier import centred_fft2_host
from mrjax.parallel import sharding
from mrjax.report import figures
from mrjax.train import train

BATCH, CHANNELS, LEVELS, SIZE = 8, 16, 4, 128
ACCELERATIONS = {4.0: 0.08, 8.0: 0.04}
ZERO_FILLED, PYTORCH = "zero-filled", "fastMRI's U-Net, PyTorch"
Predict = Callable[[Any, dict[str, jax.Array]], tuple[dict[str, jax.Array], jax.Array]]


class Method(NamedTuple):
    """A way to reconstruct, ready for use: what makes a prediction under an acceleration, and its parameters."""

    predict: Callable[[float], Predict]
    params: Any
    size: int
    seconds: float


def base(seed: int) -> ConfigDict:
    """What all trainings of mrjax share."""
    config = defaults()
    config.seed, config.batch_size, config.steps = seed, BATCH, flags.FLAGS.steps
    config.log_every = config.eval_every = config.checkpoint_every = config.steps
    config.data.dir, config.data.check, config.data.cache = str(folder() / "data"), "headers", "device"
    config.data.image_size = (SIZE, SIZE)
    config.acquisition.accelerations = tuple(ACCELERATIONS)
    config.acquisition.centre_fractions = tuple(ACCELERATIONS.values())
    config.acquisition.noise = (0.0, 0.0)
    return config


def same_recipe(config: ConfigDict) -> None:
    """fastMRI's U-Net, trained as PyTorch's is here."""
    config.model.channels, config.model.levels, config.model.pool = CHANNELS, LEVELS, "avg"
    config.schedule, config.warmup, config.normalise = "constant", 0.0, "standard"
    config.loss.mse, config.loss.l1 = 0.0, 1.0
    config.augment.update({name: 0.0 for name in vars(Augment()) if name.endswith("_p")})


def our_recipe(config: ConfigDict) -> None:
    """The same U-Net as we would train it."""
    config.model.channels, config.model.levels, config.model.pool = CHANNELS, LEVELS, "avg"
    ours(config)


def ours(config: ConfigDict) -> None:
    """How we would train any network here."""
    config.model.residual = True
    config.learning_rate, config.ema, config.loss.ssim = 3e-3, 0.99, 0.02
    flips_alone(config)


def flips_alone(config: ConfigDict) -> None:
    """Augments by flips and nothing else: a few hundred steps are too few to learn from images that are resampled."""
    for name in ("rotation_p", "scale_p", "anisotropy_p", "translation_p"):
        config.augment[name] = 0.0


def variational(config: ConfigDict) -> None:
    """A VarNet with as many parameters, as we would train it."""
    config.model.name, config.model.levels = "varnet", LEVELS
    config.model.channels, config.model.cascades, config.model.sens_channels = 6, 7, 2
    config.clip_norm = 1.0
    ours(config)


RECIPES = {
    "mrjax's U-Net, same recipe": same_recipe,
    "mrjax's U-Net, our recipe": our_recipe,
    "mrjax's VarNet": variational,
}


def folder() -> Path:
    """Where everything is kept."""
    return Path(flags.FLAGS.folder)


def conditions(config: ConfigDict, acceleration: float) -> train_step.Task:
    """The task of a config at one acceleration."""
    config = config.copy_and_resolve_references()
    config.acquisition.accelerations = (acceleration,)
    config.acquisition.centre_fractions = (ACCELERATIONS[acceleration],)
    return experiment.task(config)


def network(name: str, seed: int) -> Method:
    """A network of mrjax, trained by its own program."""
    config = base(seed)
    RECIPES[name](config)
    workdir = folder() / f"{name.partition(' ')[2].replace(' ', '-').replace(',', '')}-{seed}"
    started = time.perf_counter()
    train(config, str(workdir))
    seconds = once(workdir / "seconds.json", time.perf_counter() - started)
    mesh = sharding.make_mesh()
    restored = experiment.restore(str(workdir), mesh)
    return of_model(experiment.model(config, mesh), restored.params, config, seconds)


def of_model(model: Any, params: Any, config: ConfigDict, seconds: float) -> Method:
    """A method of mrjax's: its model applied inside the compiled step of inference."""

    def predict(acceleration: float) -> Predict:
        task = conditions(config, acceleration)
        return train_step.compile_predict(sharding.make_mesh(), model=model, task=task, normalise_by=config.normalise)

    return Method(predict, params, sum(leaf.size for leaf in jax.tree.leaves(params)), seconds)


def once(file: Path, value: float) -> float:
    """The value that was written first: a training found finished took no time now."""
    if not file.exists():
        write_json(file, value)
    return float(json.loads(file.read_text()))


def pytorch(seed: int) -> Method:
    """fastMRI's U-Net, trained with fastMRI's data path."""
    torch.manual_seed(seed)
    unet = Unet(1, 1, chans=CHANNELS, num_pool_layers=LEVELS)
    file = folder() / f"pytorch-{seed}.pt"
    started = time.perf_counter()
    if file.exists():
        unet.load_state_dict(torch.load(file, weights_only=True))
    else:
        train_pytorch(unet, seed)
        torch.save(unet.state_dict(), file)
    seconds = once(file.with_suffix(".json"), time.perf_counter() - started)
    zero_filled = of_model(AsItIs(), {}, base(seed), 0.0)

    def predict(acceleration: float) -> Predict:
        given = zero_filled.predict(acceleration)

        def run(params: Any, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
            images, peaks = given(params, batch)
            corrupted = torch.from_numpy(np.array(images["corrupted"]))
            mean, std = (f(corrupted, dim=(1, 2), keepdim=True) for f in (torch.mean, torch.std))
            with torch.inference_mode():
                output = unet(((corrupted - mean) / (std + 1e-11)).clamp(-6, 6)[:, None])[:, 0] * std + mean
            return images | {"reconstruction": jnp.asarray(output.numpy())}, peaks

        return run

    return Method(predict, {}, sum(p.numel() for p in unet.parameters()), seconds)


def train_pytorch(unet: Unet, seed: int) -> None:
    """L1 and Adam, on what fastMRI's classes read, mask and normalise."""
    mask = RandomMaskFunc(list(ACCELERATIONS.values()), [int(a) for a in ACCELERATIONS])
    slices = fastmri.data.SliceDataset(
        folder() / "data" / "train",
        challenge="multicoil",
        transform=UnetDataTransform("multicoil", mask, use_seed=False),
    )
    loader = torch.utils.data.DataLoader(slices, batch_size=BATCH, shuffle=True, drop_last=True)
    mask.rng.seed(seed)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    done = 0
    while done < flags.FLAGS.steps:
        for batch in loader:
            loss = torch.nn.functional.l1_loss(unet(batch.image[:, None])[:, 0], batch.target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done += 1
            if done == flags.FLAGS.steps:
                return


class AsItIs:
    """A network that gives back what it is given."""

    needs = ("image",)

    def apply(self, variables: Any, image: jax.Array) -> jax.Array:
        """(batch, height, width, 1) to the same."""
        return image


def compressed_sensing(seed: int) -> Method:
    """FISTA, which has nothing to train."""
    return of_model(CompressedSensing(), {}, base(seed), 0.0)


def real_individuals(where: Path) -> None:
    """The T1-weighted slice and the ten b = 0 slices of dipy as single-coil k-space files."""
    import dipy
    import nibabel

    files = Path(dipy.__file__).parent / "data" / "files"
    found = {
        "real_T1": np.load(files / "t1_coronal_slice.npy")[None],
        "real_b0": np.moveaxis(nibabel.nifti1.load(files / "S0_10slices.nii.gz").get_fdata()[..., 0], 2, 0),
    }
    for name, images in found.items():
        images = images.astype(np.float32) / images.max()
        square = max(images.shape[1:])
        fitted = np.stack([resize.scale_to(resize.fit(image, (square, square)), (SIZE, SIZE)) for image in images])
        kspace = centred_fft2_host(fitted).astype(np.complex64)[:, None]
        attributes = {"max": float(fitted.max()), "norm": float(np.linalg.norm(fitted)), "acquisition": name}
        hdf5.write(where / f"{name}.t5", {"kspace": kspace, "reconstruction_rss": fitted}, attributes)


def evaluated(
    predict: Callable[..., Any], volumes: list[hdf5.Volume], size: int, batch_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean PSNR and SSIM over volumes, before and after `predict(batch)`; images of the first ones' middle slices."""
    mesh = sharding.make_mesh()
    source = loader.Slices(volumes, (size, size), "kspace")

    def of_batch(params: Any, batch: dict[str, jax.Array]) -> Any:
        return predict(batch)

    with loader.evaluation_batches(source, batch_size=batch_size, workers=0, prefetch=2) as batches:
        rows, previews = evaluate(of_batch, train_step.compile_score(mesh), {}, batches, volumes, mesh)  # type: ignore[arg-type]
    return summarise(rows)["all"], previews


def main(argv: list[str]) -> None:
    """Makes the data, trains, scores, draws and prints."""
    cli.expect_no_arguments(argv)
    logging.getLogger("mrjax").setLevel(logging.WARNING)
    values = flags.FLAGS
    if not (folder() / "data").exists():
        demo.make(folder() / "data", demo.Settings(size=SIZE, coils=4))
    real_individuals(folder() / "real")
    described = functools.partial(splits.volumes, task="kspace", on_bad_file="error", read_all=True)
    sets = {"unseen subjects": described(hdf5.find(str(folder() / "data" / "test")))}
    sets["real individuals"] = described(hdf5.find(str(folder() / "real")))
    ways: dict[str, Callable[[int], Method]] = {
        "compressed sensing (total variation)": compressed_sensing,
        PYTORCH: pytorch,
    }
    ways |= {name: functools.partial(network, name) for name in RECIPES}
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    shown: dict[str, np.ndarray] = {}
    costs: dict[str, Method] = {}
    for name, make in ways.items():
        for seed in range(values.seeds if name in RECIPES or name == PYTORCH else 1):
            method = costs[name] = make(seed)
            for of, volumes in sets.items():
                for acceleration in ACCELERATIONS:
                    predict = functools.partial(method.predict(acceleration), method.params)
                    scores, previews = evaluated(predict, volumes, SIZE, BATCH)
                    found.setdefault((of, name, acceleration), []).append(scores["reconstruction"])
                    found[of, ZERO_FILLED, acceleration] = [scores["corrupted"]]
                    if of == "unseen subjects" and acceleration == 4 and seed == 0:
                        images = next(iter(previews.values()))
                        shown |= {"ground truth": images["target"], ZERO_FILLED: images["corrupted"]}
                        shown[name] = images["reconstruction"]
    tables = [table(of, [ZERO_FILLED, *ways], found, costs) for of in sets]
    figures.draw_gallery(values.figure, shown, title=f"4x, an unseen subject, {values.steps} steps")
    raw = [{"of": of, "method": name, "acceleration": a, "seeds": rows} for (of, name, a), rows in found.items()]
    config = {"steps": values.steps, "seeds": values.seeds, "batch": BATCH, "size": SIZE}
    publish("quality", config, tables, raw, values.json)
    picture = f"![Every method on the same slice]({os.path.relpath(values.figure, Path(values.readme).parent)})\n"
    put(Path(values.readme), "quality", page_section("quality", config, tables) + f"\n{picture}")


def page_section(name: str, config: dict[str, Any], tables: list[Table]) -> str:
    """A section of benchmarks/README.md: the command, where and when it ran, its tables."""
    given = " ".join(f"--{flag}={config[flag]}" for flag in ("steps", "seeds"))
    where = environment()
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    heading = f"## {name}\n\n    python -m benchmarks.{name} {given}\n"
    place = f"{where['device']} ({where['processor']}); {versions}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d}\n"
    return "\n".join([heading, place, *(f"{markdown(table)}\n" for table in tables)])


def put(page: Path, name: str, section: str) -> None:
    """Replaces the section of this name, the last but for others like it, or adds it."""
    before, found, after = (page.read_text() if page.exists() else "").partition(f"## {name}\n")
    _, others, rest = after.partition("\n## ") if found else ("", "", "")
    write(f"{before.rstrip()}\n\n{section.rstrip()}\n" + (f"\n## {rest}" if others else ""), page)


def table(of: str, names: list[str], found: dict[Any, list[dict[str, Any]]], costs: dict[str, Method]) -> Table:
    """PSNR and SSIM of every method, mean over seeds, with the lowest and the highest."""
    rows = []
    for name in names:
        row: list[Any] = [name]
        for acceleration in ACCELERATIONS:
            for metric, digits in (("psnr", 2), ("ssim", 4)):
                means = [scores[metric]["mean"] for scores in found[of, name, acceleration]]
                spread = f" ({min(means):.{digits}f} to {max(means):.{digits}f})" if len(means) > 1 else ""
                row.append(f"{statistics.fmean(means):.{digits}f}{spread}")
        cost = costs.get(name)
        row += [f"{cost.size:,}" if cost else "", f"{cost.seconds:.0f}" if cost and cost.seconds else ""]
        rows.append(row)
    columns = ["method", *(f"{metric}, {a:g}x" for a in ACCELERATIONS for metric in ("PSNR (dB)", "SSIM"))]
    return Table(f"Quality on {of}", [*columns, "parameters", "seconds to train"], rows)


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 400, "of every training")
    flags.DEFINE_integer("seeds", 3, "trainings of every network")
    flags.DEFINE_string("folder", "runs/quality", "for the data and the trained networks")
    flags.DEFINE_string("figure", "docs/models.png", "picture of every method on the same slice")
    flags.DEFINE_string("readme", "benchmarks/README.md", "page whose section of this is written anew")
    flags.DEFINE_string("json", None, "file to write everything measured to")
    cli.run(main)
