"""Import the weights of fastMRI's U-Net or VarNet into a workdir that evaluates, reconstructs and trains on.

    python -m mrjax.import_fastmri unet.pt --output=runs/imported [--image_size=320,320]

The file is a state_dict or a checkpoint of Lightning: PyTorch's (.pt, .pth, .ckpt), .safetensors or .npz (see
`interop.weight_files`). fastMRI also clips images at 6 standard deviations; mrjax does not.
"""

import logging
import os

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from mrjax import cli
from mrjax import config as configs
from mrjax.checkpoint import store
from mrjax.checkpoint.run import claim
from mrjax.config.fields import PARAMETER_FIELDS
from mrjax.errors import UserError, expect
from mrjax.experiment import check_sizes
from mrjax.interop import weight_files
from mrjax.interop.fastmri import Network, from_fastmri
from mrjax.train_step import TrainState

logger = logging.getLogger("mrjax.import_fastmri")


def make_config(network: Network, image_size: tuple[int, int]) -> ConfigDict:
    """Make the config of a network: how fastMRI trains it, at fourfold acceleration, exact and without added noise."""
    config = configs.defaults()
    config.model.update(network.fields, name=network.name, pool="avg")
    config.data.image_size, config.data.resize = image_size, "image"
    config.acquisition.noise = (0.0, 0.0)
    config.precision = "float32_exact"  # as PyTorch convolves on a CPU: TF32 would differ by 1e-3
    if network.name == "unet":
        config.normalise = "standard"
    configs.check(config)
    check_sizes(config, [image_size])
    return config


def import_weights(path: str, workdir: str, image_size: tuple[int, int]) -> ConfigDict:
    """Write a file's parameters to a workdir and return its config; `UserError` for a faulty file, size or folder."""
    if os.path.isdir(workdir) and os.listdir(workdir):
        raise UserError(f"--output is {workdir}, which holds files, expected an empty or new folder")
    try:
        network = from_fastmri(weight_files.read(path))
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    config = make_config(network, image_size)
    state = TrainState(step=jnp.int32(0), params=jax.device_put(network.params), opt_state=None)
    with claim(workdir, config), store.open_checkpoints(workdir, store.INITIAL) as manager:
        store.save(manager, state, {"step": 0}, config)
    return config


def main(argv: list[str]) -> None:
    """Import one file, and log the commands that use it."""
    expect(len(argv) == 2, f"{len(argv) - 1} files given", "one: python -m mrjax.import_fastmri unet.pt --output=W")
    size, workdir = flags.FLAGS.image_size, flags.FLAGS.output
    whole = len(size) == 2 and all(side.isdigit() for side in size)
    expect(whole, f"--image_size is {','.join(size)!r}", "height,width as in 320,320")
    config = import_weights(argv[1], workdir, (int(size[0]), int(size[1])))
    values = configs.flat(config).items()
    fields = [f"--config.{name}={value}" for name, value in values if name.startswith(PARAMETER_FIELDS)]
    logger.info("written: %s, %s", workdir, ", ".join(f"{name} {value}" for name, value in config.model.items()))
    logger.info("reconstruct: python -m mrjax.reconstruct --workdir=%s --input=scan.h5 --output=out", workdir)
    logger.info("train on: python -m mrjax.main --config=configs/unet.py --workdir=%s %s", workdir, " ".join(fields))


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "workdir to make: an empty or new folder", required=True)
    flags.DEFINE_list("image_size", ["320", "320"], "height,width of the images the network sees")
    cli.run(main, arguments=True, one_process=True)
