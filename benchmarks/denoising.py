"""What is lost by learning to remove noise without ever seeing an image that has none.

    python -m benchmarks.denoising [--steps=1500] [--seeds=3] [--folder=runs/denoising] [--json=FILE]

Demo data of 128x128 pixels, 4 coils and 4 repetitions of every scan are made in the folder. One U-Net learns the mean
of the other repetitions (`denoise`), one another repetition (`noise2noise`), one the truth (`paired`), with the same
steps, slices, parameters and learning rates. The truth is the expected image of one scan: the mean of 32 simulated
ones, from the demo's own noise-free images, so that the floor which the magnitude of noise leaves is in it as it is in
every repetition. All are scored against it on subjects that none has seen.
"""

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.quality import evaluated, flips_alone, page_section, put
from benchmarks.report import Table, publish
from mrjax import cli, demo, experiment, train_step
from mrjax.config import defaults
from mrjax.data import hdf5, readers, splits
from mrjax.demo import acquisition
from mrjax.demo.anatomy import Subject, load_template, make_anatomy
from mrjax.parallel import sharding
from mrjax.train import train

BATCH, CHANNELS, LEVELS, SIZE, COILS, REPETITIONS, SCANS = 8, 8, 3, 128, 4, 4, 32
SUBJECTS = {"train": 12, "val": 1, "test": 2}
WAYS = {
    "denoise": "U-Net, the mean of the other repetitions",
    "noise2noise": "U-Net, one other repetition",
    "paired": "U-Net, the truth",
}


def make_data(folder: Path) -> None:
    """The repetitions; and pairs whose target is the truth: of a repetition, and of the mean of the others."""
    settings = demo.Settings(size=SIZE, coils=COILS, subjects=SUBJECTS, repetitions=REPETITIONS)
    demo.make(folder / "scans", settings)
    template = load_template()
    for index, (split, count) in enumerate(SUBJECTS.items()):
        for number in range(count):
            subject = Subject(0, index, number)
            anatomy = make_anatomy(template, subject, size=SIZE, slices=18)
            maps = acquisition.make_sensitivities(subject, size=SIZE, coils=COILS, slices=18)
            for contrast in acquisition.PROTOCOLS:
                truth = expected_scan(acquisition.make_image(anatomy, subject, contrast), maps, subject)
                paths = sorted((folder / "scans" / split).glob(f"*{number + 1:04d}_{contrast}*.t5"))
                images = [hdf5.read(str(path), "reconstruction_rss") for path in paths]
                for i, path in enumerate(paths):
                    others = np.mean([image for j, image in enumerate(images) if j != i], 0)
                    for kind, image in (("truth", images[i]), ("mean", others)):
                        hdf5.write(
                            folder / kind / split / path.name,
                            {"input": image, "target": truth},
                            {"acquisition": contrast, "max": float(truth.max())},
                        )


def expected_scan(clean: np.ndarray, maps: np.ndarray, subject: Subject) -> np.ndarray:
    """Mean root-sum-of-squares image of many scans with the noise that the demo's have."""
    total = np.zeros(clean.shape, np.float64)
    for scan in range(SCANS):
        rng = subject.generator(9, scan)
        kspace = acquisition.acquire_kspace(clean, maps, rng, noise=acquisition.draw_noise_level(rng))
        total += acquisition.root_sum_of_squares(kspace)
    return (total / SCANS).astype(np.float32)


def make_config(task: str, seed: int, data: Path) -> ConfigDict:
    """The same training for every kind of target."""
    config = defaults()
    config.task, config.seed, config.steps, config.batch_size = task, seed, flags.FLAGS.steps, BATCH
    config.log_every = config.eval_every = config.checkpoint_every = config.steps
    config.data.dir = str(data / ("truth" if task == "paired" else "scans"))
    config.data.cache = "device"
    config.learning_rate, config.ema = 2e-3, 0.99
    config.model.channels, config.model.levels, config.model.residual = CHANNELS, LEVELS, True
    config.acquisition.accelerations, config.acquisition.noise = (1.0,), (0.0, 0.0)
    flips_alone(config)
    return config


def main(argv: list[str]) -> None:
    """Makes the data, trains, scores and prints."""
    cli.expect_no_arguments(argv)
    logging.getLogger("mrjax").setLevel(logging.WARNING)
    values = flags.FLAGS
    folder, mesh = Path(values.folder), sharding.make_mesh()
    data = folder / "data"
    if not data.exists():
        part = folder / ".data.part"
        shutil.rmtree(part, ignore_errors=True)
        make_data(part)
        part.rename(data)
    read = functools.partial(splits.describe_split, task="paired", on_bad_file="error", read_samples=True)
    truth, mean = (read(readers.find(str(data / kind / "test"))) for kind in ("truth", "mean"))
    found: dict[str, list[Any]] = {}
    for task, name in WAYS.items():
        for seed in range(values.seeds):
            workdir = str(folder / f"{task}-{seed}")
            train(make_config(task, seed, data), workdir)
            restored = experiment.restore(workdir, mesh)
            # Whatever it learnt from, it is asked about the pairs of a repetition and its truth.
            config = make_config("paired", seed, data)
            fixed = {"model": experiment.model(config, mesh), "task": experiment.task(config), "normalise_by": "slice"}
            predict = functools.partial(train_step.compile_predict(mesh, **fixed), restored.params)
            scores, _ = evaluated(predict, truth, SIZE, BATCH)
            found.setdefault(name, []).append(scores["reconstruction"])
            found["one repetition"] = [scores["corrupted"]]
    scores, _ = evaluated(
        functools.partial(train_step.compile_predict(mesh, **fixed), restored.params), mean, SIZE, BATCH
    )
    found["mean of the three others, which `denoise` learns from"] = [scores["corrupted"]]
    psnr = {name: float(np.mean([one["psnr"]["mean"] for one in seeds])) for name, seeds in found.items()}
    ssim = {name: float(np.mean([one["ssim"]["mean"] for one in seeds])) for name, seeds in found.items()}
    best = psnr[WAYS["paired"]]
    order = sorted(found, key=lambda name: psnr[name])
    rows = [
        [name, f"{psnr[name]:.2f}", f"{ssim[name]:.4f}", f"{psnr[name] - best:+.2f}" if name in WAYS.values() else ""]
        for name in order
    ]
    table = Table(
        "Denoising of unseen subjects", ["image", "PSNR (dB)", "SSIM", "PSNR over learning from the truth (dB)"], rows
    )
    config_shown = {"steps": values.steps, "seeds": values.seeds, "batch": BATCH, "devices": jax.device_count()}
    publish("denoising", config_shown, [table], found, values.json)
    put(Path(values.readme), "denoising", page_section("denoising", config_shown, [table]))


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 1500, "of every training")
    flags.DEFINE_integer("seeds", 3, "trainings of every network")
    flags.DEFINE_string("folder", "runs/denoising", "for the data and the trained networks")
    flags.DEFINE_string("readme", "benchmarks/README.md", "page whose section of this is written anew")
    flags.DEFINE_string("json", None, "file to write everything measured to")
    cli.run(main)
