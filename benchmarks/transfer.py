"""Measure how networks that were trained on the demo data carry over to real heads that they have never seen.

    python -m benchmarks.transfer --train=250,250,2400 [--workdir=runs/a/unet,runs/b/varnet,...] [--json=FILE]

`--train` first trains each workdir by the config of its name, configs/unet.py or configs/varnet.py, on the demo data
for as many steps as its number in the list; without it, the workdirs are of runs that are there. On 2 cores 250 steps
take 2 minutes for the U-Net and 6 for the VarNet, and 2,400 an hour. The heads (benchmarks/heads.py) are of four
persons in the packages dipy, nibabel and matplotlib, and one in `--measured`, at 128 to 320 pixels, with 1 to 16 coils,
T1-, T2- and T2*-weighted. All methods reconstruct the same files, undersampled by random columns of 4x (centre 8 %) and
8x (4 %), as `mrjax.reconstruct` does, which keeps the measured samples. Metrics are over volumes, as fastMRI's.
"""

import logging
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tqdm
from absl import flags
from matplotlib.figure import Figure

from benchmarks import heads
from benchmarks.report import Table, page_section, publish, replace_section, require_packages
from mrjax import cli
from mrjax.config import defaults
from mrjax.errors import expect
from mrjax.inference import Inference
from mrjax.io.files import replacing
from mrjax.measures.evaluator import Images, score_volume

ZERO_FILLED, COMPRESSED_SENSING, TARGET = "zero-filled", "compressed sensing", "fully sampled"
PICTURED = (1, 9)  # of `heads.HEADS`
KINDS = ("target", "corrupted", "reconstruction")  # of what `Inference.reconstruct` returns
Metrics = dict[str, float]
Scores = dict[int, dict[str, dict[str, Metrics]]]  # by acceleration, head and method


def train(workdir: str, steps: int) -> None:
    """Train by the config of the workdir's name in a process of its own; a run that is finished stays as it is."""
    config = f"--config=configs/{Path(workdir).name}.py"
    command = [sys.executable, "-m", "mrjax.main", config, f"--workdir={workdir}", f"--config.steps={steps}"]
    subprocess.run(command, check=True)


def measure(volumes: heads.Volumes, workdirs: list[str]) -> tuple[Scores, dict[str, Images]]:
    """Score every method on every head; also returns the images of each head's middle slice at 4x, by method."""
    methods = {workdir: Inference.restore(workdir) for workdir in workdirs}
    methods[COMPRESSED_SENSING] = Inference.from_method("cs", defaults())
    scores: Scores = {}
    shown: dict[str, Images] = {}
    for acceleration, of_heads in volumes.items():
        for head, volume in tqdm.tqdm(of_heads.items(), f"{acceleration}x", unit="head", disable=None):
            of_head = scores.setdefault(acceleration, {}).setdefault(head, {})
            for name, method in methods.items():
                method.config.batch_size = volume.slices  # no slice is added to fill a batch
                images = method.reconstruct(volume)
                found = score_volume(images, volume)
                of_head |= {ZERO_FILLED: found["corrupted"], name: found["reconstruction"]}
                if acceleration == 4:
                    target, corrupted, image = (images[kind][volume.slices // 2] for kind in KINDS)
                    shown.setdefault(head, {}).update({TARGET: target, ZERO_FILLED: corrupted, name: image})
    return scores, shown


def score_table(acceleration: int, scores: dict[str, dict[str, Metrics]]) -> Table:
    """Return PSNR and SSIM of every method on every head, and their means over the heads."""
    methods = list(next(iter(scores.values())))
    rows = [
        [head, *(f"{of[name]['psnr']:.2f} / {of[name]['ssim']:.4f}" for name in methods)] for head, of in scores.items()
    ]
    psnr, ssim = (
        [statistics.fmean(of[name][metric] for of in scores.values()) for name in methods]
        for metric in ("psnr", "ssim")
    )
    rows.append(["mean", *(f"{x:.2f} / {y:.4f}" for x, y in zip(psnr, ssim, strict=True))])
    return Table(f"{acceleration}x: PSNR (dB) / SSIM", ["head", *methods], rows)


def difference_table(scores: Scores, workdirs: list[str]) -> Table:
    """Return what each network gains over zero-filling and over compressed sensing, and on how many heads it loses."""
    rows, columns = [], ["network", "acceleration"]
    for workdir in workdirs:
        for acceleration, of_heads in scores.items():
            row = [workdir, f"{acceleration}x"]
            for other in (ZERO_FILLED, COMPRESSED_SENSING):
                gains = [of[workdir]["psnr"] - of[other]["psnr"] for of in of_heads.values()]
                worse = sum(gain < 0 for gain in gains)
                row += [f"{statistics.fmean(gains):+.2f}", f"{min(gains):+.2f}", f"{worse} of {len(gains)}"]
            rows.append(row)
    for other in (ZERO_FILLED, COMPRESSED_SENSING):
        columns += [f"mean over {other}", "least", "heads worse"]
    return Table("PSNR of each network minus that of methods without training (dB)", columns, rows)


def draw(path: str, shown: dict[str, Images], scores: Scores) -> None:
    """Draw a slice of two heads at 4x by every method, a row each, as a PNG."""
    pictured = [heads.HEADS[number].name for number in PICTURED]
    columns = len(shown[pictured[0]])
    figure = Figure(figsize=(3 * columns, 7), dpi=144, facecolor="black", layout="constrained")
    axes = figure.subplots(2, columns, subplot_kw={"frame_on": False, "xticks": (), "yticks": ()})
    for row, head in zip(axes, pictured, strict=True):
        white = np.percentile(shown[head][TARGET], 99.5)
        for cell, (name, image) in zip(row, shown[head].items(), strict=True):
            below = head if name == TARGET else f"{scores[4][head][name]['psnr']:.2f} dB"
            cell.set_title(f"{name}\n{below}", color="white", size=10)
            cell.imshow(image, "gray", vmin=0, vmax=white, interpolation="nearest")
    with replacing(path) as part:
        figure.savefig(part, format="png")


def main(_: list[str]) -> None:
    """Train if asked, make the heads, score, draw and publish."""
    require_packages("dipy", "nibabel")
    logging.getLogger("mrjax").setLevel(logging.WARNING)
    values = flags.FLAGS
    if values.train:
        steps = list(map(int, values.train))
        found = f"--train has {len(steps)} numbers and --workdir {len(values.workdir)} folders"
        expect(len(steps) == len(values.workdir), found, "as many")
        for workdir, number in zip(values.workdir, steps, strict=True):
            train(workdir, number)
    measured = Path(values.measured)
    command = {"train": ",".join(values.train), "workdir": ",".join(values.workdir)}
    if measured.exists():
        command["measured"] = measured.name
    else:
        print(f"left out: {measured}, no such file", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        scores, shown = measure(heads.write(Path(folder), measured), values.workdir)
    tables = [score_table(acceleration, of_heads) for acceleration, of_heads in scores.items()]
    tables.append(difference_table(scores, values.workdir))
    publish("transfer", command, tables, scores, values.json)
    replace_section(Path(values.readme), "transfer", page_section("transfer", command, tables))
    if values.picture:
        draw(values.picture, shown, scores)


if __name__ == "__main__":
    flags.DEFINE_list("train", [], "steps to train each workdir for first; by default they are trained")
    default = "runs/transfer/unet,runs/transfer/varnet,runs/transfer/hour/varnet"
    flags.DEFINE_list("workdir", default, "runs of mrjax.main to score")
    flags.DEFINE_string("measured", "shared/data/sagittal_head_t1.mat", "a head's k-space in a MATLAB file")
    flags.DEFINE_string("picture", None, "picture of two heads by every method to draw")
    flags.DEFINE_string("readme", "benchmarks/README.md", "page whose section `transfer` is rewritten")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
