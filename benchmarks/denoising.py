"""Measure what is lost by learning to remove noise without clean images.

    python -m benchmarks.denoising [--steps=1500] [--seeds=3] [--folder=runs/denoising] [--json=FILE]

Demo data of 128x128 pixels, 4 coils and 4 repetitions of every scan are made in the folder. One U-Net learns the mean
of the other repetitions (`denoise`), one another repetition (`noise2noise`), one the clean image (`paired`), with the
same steps, slices, parameters and learning rates. The clean image is the expected image of one scan: the mean of 32
scans simulated from the demo's noise-free images, which has the same noise floor of the magnitude as each repetition.
All networks are scored against it on unseen subjects.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import scoring
from benchmarks.report import Table, page_section, publish, replace_section
from mrjax import cli, demo, experiment
from mrjax.config import defaults
from mrjax.demo import acquisition, anatomy
from mrjax.inference import Inference
from mrjax.io import hdf5, readers
from mrjax.mri.fourier import magnitude_host
from mrjax.parallel import sharding
from mrjax.train import train

BATCH, CHANNELS, LEVELS, SIZE, COILS, REPETITIONS, SCANS = 8, 8, 3, 128, 4, 4, 32
SUBJECTS = {"train": 12, "val": 1, "test": 2}
NETWORKS = {
    "denoise": "U-Net, the mean of the other repetitions",
    "noise2noise": "U-Net, one other repetition",
    "paired": "U-Net, the clean image",
}
ONE_REPETITION = "one repetition"
MEAN_OF_OTHERS = "mean of the three others, which `denoise` learns from"


def make_data(folder: Path) -> None:
    """Write the repetitions, and pairs with the clean image: of each repetition, and of the mean of the others."""
    settings = demo.Settings(size=SIZE, coils=COILS, repetitions=REPETITIONS, **SUBJECTS)
    demo.make(folder / "scans", settings)
    template, slices = anatomy.load_template(), settings.slices
    for index, split in enumerate(demo.SPLITS):
        for number in range(SUBJECTS[split]):
            subject = anatomy.Subject(settings.seed, index, number)
            head = anatomy.make_anatomy(template, subject, size=SIZE, slices=slices)
            coils = acquisition.make_sensitivities(subject, size=SIZE, coils=COILS, slices=slices)
            for contrast in acquisition.PROTOCOLS:
                clean = simulate_expected_scan(acquisition.make_image(head, subject, contrast), coils, subject)
                paths = sorted((folder / "scans" / split).glob(f"*{number + 1:04d}_{contrast}*.t5"))
                write_pairs(folder, paths, clean, contrast)


def write_pairs(folder: Path, paths: list[Path], clean: np.ndarray, contrast: str) -> None:
    """Pair the clean image with each repetition, and with the mean of the others."""
    images = [readers.read_slices(str(path), "reconstruction_rss", demo.Settings().slices) for path in paths]
    for i, path in enumerate(paths):
        mean = np.mean([image for j, image in enumerate(images) if j != i], 0)
        attributes = {"acquisition": contrast, "max": float(clean.max())}
        for kind, image in (("single", images[i]), ("mean", mean)):
            hdf5.write(folder / kind / path.parent.name / path.name, {"input": image, "target": clean}, attributes)


def simulate_expected_scan(noise_free: np.ndarray, coils: np.ndarray, subject: anatomy.Subject) -> np.ndarray:
    """Average the root-sum-of-squares images of many scans with the demo's noise."""
    total = np.zeros(noise_free.shape, np.float64)
    for scan in range(SCANS):
        rng = subject.generator(9, scan)
        total += magnitude_host(acquisition.acquire_kspace(noise_free, coils, rng.uniform(24, 34), rng))
    return (total / SCANS).astype(np.float32)


def make_config(task: str, seed: int, data: Path) -> ConfigDict:
    """Return the config of a training, the same for every kind of target."""
    config = defaults()
    config.task, config.seed, config.steps, config.batch_size = task, seed, flags.FLAGS.steps, BATCH
    config.log_every = config.eval_every = config.checkpoint_every = config.steps
    config.data.dir = str(data / ("single" if task == "paired" else "scans"))
    config.data.cache = "device"
    config.learning_rate, config.ema = 2e-3, 0.99
    config.model.channels, config.model.levels, config.model.residual = CHANNELS, LEVELS, True
    config.acquisition.accelerations, config.acquisition.noise = (1.0,), (0.0, 0.0)
    scoring.use_flips_only(config)
    return config


def measure(folder: Path, seeds: int) -> dict[str, list[Any]]:
    """Train and score every network; returns the mean metrics of each kind of image by seed."""
    data = folder / "data"
    single, mean = (scoring.find_volumes(data / kind / "test", "paired") for kind in ("single", "mean"))
    scores: dict[str, list[Any]] = {}
    for task, name in NETWORKS.items():
        for seed in range(seeds):
            workdir = folder / f"{task}-{seed}"
            train(make_config(task, seed, data), str(workdir))
            # Every network is scored on pairs of a repetition and its clean image.
            recipe = experiment.make_recipe(make_config("paired", seed, data), sharding.make_mesh())
            predict = scoring.jit_predict(recipe, Inference.restore(str(workdir)).params)
            found, _ = scoring.score_volumes(predict, single, SIZE, BATCH)
            scores.setdefault(name, []).append(found["reconstruction"])
            scores[ONE_REPETITION] = [found["corrupted"]]
    found, _ = scoring.score_volumes(predict, mean, SIZE, BATCH)
    scores[MEAN_OF_OTHERS] = [found["corrupted"]]
    return scores


def main(_: list[str]) -> None:
    """Make the data, train, score and publish."""
    logging.getLogger("mrjax").setLevel(logging.WARNING)
    values = flags.FLAGS
    folder = Path(values.folder)
    if not (folder / "data").exists():
        part = folder / ".data.part"
        shutil.rmtree(part, ignore_errors=True)
        make_data(part)
        part.rename(folder / "data")
    scores = measure(folder, values.seeds)
    psnr = {name: float(np.mean([found["psnr"]["mean"] for found in seeds])) for name, seeds in scores.items()}
    ssim = {name: float(np.mean([found["ssim"]["mean"] for found in seeds])) for name, seeds in scores.items()}
    best = psnr[NETWORKS["paired"]]
    rows = []
    for name in sorted(scores, key=lambda name: psnr[name]):
        difference = f"{psnr[name] - best:+.2f}" if name in NETWORKS.values() else ""
        rows.append([name, f"{psnr[name]:.2f}", f"{ssim[name]:.4f}", difference])
    columns = ["image", "PSNR (dB)", "SSIM", "PSNR over learning from the clean image (dB)"]
    table = Table("Denoising of unseen subjects", columns, rows)
    command = {"steps": values.steps, "seeds": values.seeds}
    config_shown = command | {"batch": BATCH, "devices": jax.device_count()}
    publish("denoising", config_shown, [table], scores, values.json)
    replace_section(Path(values.readme), "denoising", page_section("denoising", command, [table]))


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 1500, "steps of every training")
    flags.DEFINE_integer("seeds", 3, "trainings of every network")
    flags.DEFINE_string("folder", "runs/denoising", "folder for the data and the trained networks")
    flags.DEFINE_string("readme", "benchmarks/README.md", "page whose section `denoising` is rewritten")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
