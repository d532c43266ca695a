"""A checkpoint applied to files: a .t5 with the reconstruction and a picture of it, for each.

    python -m mrjax.reconstruct --workdir=runs/unet --input=scan.t5 --output=out

A file that holds all of its k-space is undersampled as in training first, to show what would have come of a shorter
scan; k-space that is undersampled already (a stored `mask`, or columns left out) is taken as it is. A true image is
used for the metrics and the picture where there is one, and is not needed. For the tasks on repeated scans that is the
mean of the other repetitions in the file's folder; a scan without others is taken as it is.
"""

import collections
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mrjax import cli, experiment
from mrjax.data import hdf5, loader, repetitions, resize, splits
from mrjax.errors import UserError
from mrjax.measures import metrics
from mrjax.mri.fourier import centred_ifft2_host
from mrjax.parallel import processes, sharding

logger = logging.getLogger("mrjax.reconstruct")
METHODS = ("corrupted", "reconstruction")
_slice_values = jax.jit(metrics.slice_values)


def reconstruct(inference: experiment.Inference, volume: hdf5.Volume) -> dict[str, np.ndarray]:
    """Reconstructs all slices of a volume.

    Returns:
      corrupted, reconstruction and, where the truth is known, target: (slices, height, width) float32 on the file's
      own grid and in its units.
    """
    config, mesh = inference.config, inference.mesh
    size, rule = tuple(config.data.image_size) or volume.data_shape, config.data.resize
    simulate = volume.layout == "kspace" and not volume.undersampled
    if repeated := config.task in splits.REPEATED:
        simulate = bool(volume.others)
    predict = inference.predict if simulate else inference.reconstruct
    # One batch size for files of any length: the network is compiled once.
    batch_size = -(-min(config.batch_size, 8) // mesh.size) * mesh.size
    source = loader.Slices([dataclasses.replace(volume, empty=())], size, rule, config.data.neighbours)
    at_size = {name: np.zeros((volume.slices, *size), np.float32) for name in METHODS}
    with loader.evaluation_batches(source, batch_size=batch_size, workers=0, prefetch=2) as batches:
        for batch in sharding.to_devices(batches, mesh):
            images, _ = predict(inference.params, batch)
            number = sharding.on_host(batch["slice"], mesh)
            for name, image in at_size.items():
                image[number] = sharding.on_host(images[name], mesh)
    whole = {}
    for name, image in at_size.items():
        if volume.layout == "paired":
            whole[name] = resize.scale_from(image, volume.image_shape)
        else:
            whole[name] = resize.fit(resize.image_from(image, volume.data_shape, rule), volume.image_shape)
    # The truth is the file's own, not what is left of it at the network's size.
    if simulate:
        scans = [_root_sum_of_squares(hdf5.read(path, "kspace")) for path in volume.others or [volume.path]]
        whole["target"] = resize.fit(np.mean(scans, 0), volume.image_shape)
    elif volume.target and not repeated:  # an image of this very scan would be one of its noise, too
        whole["target"] = np.abs(hdf5.read(volume.path, volume.target)).astype(np.float32)
    return whole


def _root_sum_of_squares(kspace: np.ndarray) -> np.ndarray:
    coils = centred_ifft2_host(kspace.reshape(kspace.shape[0], -1, *kspace.shape[-2:]))
    return np.sqrt((coils.real**2 + coils.imag**2).sum(1)).astype(np.float32)


def scores(images: dict[str, np.ndarray], volume: hdf5.Volume) -> dict[str, dict[str, float]]:
    """NMSE, PSNR and SSIM of the corrupted input and of the reconstruction; nothing without a truth.

    Over all slices but those that are empty in the file, on the file's own grid.
    """
    if "target" not in images:
        return {}
    kept = [i for i in range(volume.slices) if i not in volume.empty]
    peak = float(images["target"][kept].max())
    return {
        method: metrics.volume_values(_slice_values(images["target"][kept], images[method][kept], peak), peak)
        for method in METHODS
    }


def write(volume: hdf5.Volume, images: dict[str, np.ndarray], found: dict[str, Any], output: Path, step: int) -> None:
    """Writes <name>.t5, with the attributes of the file it came from, and <name>.png of the middle slice."""
    from mrjax.report import figures  # late, as in train.py: this module is a part of training

    with hdf5.open_file(volume.path) as file:
        attributes = dict(file.attrs)
        header = {"ismrmrd_header": file["ismrmrd_header"][()]} if "ismrmrd_header" in file else {}
    result = images["reconstruction"]
    attributes |= {"max": result.max(), "norm": np.linalg.norm(result), "mrjax_step": step}
    attributes |= {f"mrjax_{name.lower()}": value for name, value in found.get("reconstruction", {}).items()}
    hdf5.write(output / f"{volume.name}.t5", {"reconstruction": result} | header, attributes)
    middle = volume.slices // 2
    figures.draw_panel(
        output / f"{volume.name}.png",
        {name: image[middle] for name, image in images.items()},
        title=f"{volume.name}, {volume.contrast}, slice {middle + 1} of {volume.slices}"
        + (", metrics of the volume" if found else ""),
        metrics=found,
    )


def main(argv: list[str]) -> int:
    """Reconstructs every file of --input; 1 if one could not be."""
    cli.expect_no_arguments(argv)
    processes.require_one_process("mrjax.reconstruct")
    inference = experiment.restore(flags.FLAGS.workdir, sharding.make_mesh())
    config, step = inference.config, inference.progress["step"]
    paths, output = hdf5.find(flags.FLAGS.input), Path(flags.FLAGS.output)
    size = "x".join(map(str, config.data.image_size)) or "each file's own number of"
    logger.info("%s: step %d, trained at %s pixels", flags.FLAGS.workdir, step, size)
    for name, count in collections.Counter(Path(path).stem for path in paths).items():
        if count > 1:
            raise UserError(f"--input holds {count} files named {name}, expected names that differ: results go by them")
    for path in paths:
        if (output / f"{Path(path).stem}.t5").resolve() in {Path(other).resolve() for other in paths}:
            raise UserError(f"--output is {output}, where a result would replace {path}, expected another folder")
    failed = 0
    for path in paths:
        try:
            volume, faults = hdf5.check(hdf5.describe(path, splits.layout(config.task)))
            if faults:
                raise UserError(faults[0])
            if config.normalise == "volume":
                splits.needs_maximum([volume])
            if config.task in splits.REPEATED:
                volume = repetitions.beside(volume)
            images = reconstruct(inference, volume)
            found = scores(images, volume)
            write(volume, images, found, output, step)
        except UserError as error:
            logger.error("%s", error)
            failed += 1
            continue
        text = "".join(
            f"  {name.upper()} {value:.4g} ({found['corrupted'][name]:.4g} before)"
            for name, value in found.get("reconstruction", {}).items()
        )
        print(f"{output / volume.name}.t5 and .png{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "of a run of mrjax.main", required=True)
    flags.DEFINE_string("input", None, "a .t5, .h5 or .hdf5 file, a folder or a glob of them", required=True)
    flags.DEFINE_string("output", None, "folder for the results", required=True)
    cli.run(main)
