"""Export the parameters of a run as a state_dict that fastMRI's own U-Net or VarNet loads.

    python -m mrjax.export_fastmri --workdir=runs/unet --output=unet.pt

The output ends in .pt (which needs PyTorch), .safetensors or .npz. In PyTorch, for a U-Net of 32 channels and 4 levels:
`fastmri.models.Unet(1, 1, chans=32, num_pool_layers=4).load_state_dict(torch.load("unet.pt"))`. The images must be
normalised there as config.normalise says; VarNet needs no normalisation.
"""

import logging

import jax
from absl import flags
from ml_collections import ConfigDict

from mrjax import cli
from mrjax.errors import expect
from mrjax.inference import Inference
from mrjax.interop import weight_files
from mrjax.interop.fastmri import to_fastmri

logger = logging.getLogger("mrjax.export_fastmri")


def require_fastmri_network(config: ConfigDict) -> None:
    """Raise a `UserError` where fastMRI has no network that computes the same."""
    for field, values in (("name", ("unet", "varnet")), ("pool", ("avg",)), ("residual", (False,))):
        found = f"config.model.{field} of the run is {config.model[field]!r}"
        expected = f"{' or '.join(map(repr, values))}: fastMRI has no network that would compute the same"
        expect(config.model[field] in values, found, expected)


def main(_: list[str]) -> None:
    """Export the best checkpoint."""
    inference = Inference.restore(flags.FLAGS.workdir)
    config = inference.config
    require_fastmri_network(config)
    weights = to_fastmri(config.model.name, config.model, jax.device_get(inference.params))
    weight_files.write(flags.FLAGS.output, weights)
    size = f"{config.model.name} of {config.model.channels} channels and {config.model.levels} levels"
    logger.info("written: %s, %s, step %d", flags.FLAGS.output, size, inference.source["step"])
    logger.info("its images are normalised by config.normalise = %r", config.normalise)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "workdir of mrjax.main or mrjax.import_fastmri", required=True)
    flags.DEFINE_string("output", None, "file to write: .pt, .safetensors or .npz", required=True)
    cli.run(main, one_process=True)
