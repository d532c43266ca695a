"""A run's parameters as a state_dict that fastMRI's own U-Net or VarNet loads.

    python -m mrjax.export_fastmri --workdir=runs/unet --output=unet.pt

The output ends in .pt (which takes PyTorch), .safetensors or .npz. In PyTorch, for a U-Net of 32 channels and 4 levels:
`fastmri.models.Unet(1, 1, chans=32, num_pool_layers=4).load_state_dict(torch.load("unet.pt"))`. The images must be
normalised there as config.normalise says; VarNet needs no normalisation.
"""

import logging

import jax
from absl import flags
from ml_collections import ConfigDict

from mrjax import cli, experiment
from mrjax.errors import UserError
from mrjax.interop import weight_files
from mrjax.interop.fastmri import to_fastmri
from mrjax.parallel import processes, sharding

logger = logging.getLogger("mrjax.export_fastmri")


def expect_fastmri(config: ConfigDict) -> None:
    """Raises a `UserError` where fastMRI has no network that computes the same."""
    expected = {"name": ("unet", "varnet"), "pool": ("avg",), "residual": (False,)}
    for field, values in expected.items():
        if config.model[field] not in values:
            raise UserError(
                f"config.model.{field} of the run is {config.model[field]!r}, expected "
                f"{' or '.join(map(repr, values))}: fastMRI has no network that would compute the same"
            )


def main(argv: list[str]) -> None:
    """Exports the best checkpoint."""
    cli.expect_no_arguments(argv)
    processes.require_one_process("mrjax.export_fastmri")
    inference = experiment.restore(flags.FLAGS.workdir, sharding.make_mesh())
    config = inference.config
    expect_fastmri(config)
    weights = to_fastmri(config.model.name, config.model, jax.device_get(inference.params))
    weight_files.write(flags.FLAGS.output, weights)
    logger.info(
        "written: %s, %s with %s, step %d, trained on images normalised by %r",
        flags.FLAGS.output,
        config.model.name,
        ", ".join(f"{field} {config.model[field]}" for field in ("channels", "levels")),
        inference.progress["step"],
        config.normalise,
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "of a run of mrjax.main or mrjax.import_fastmri", required=True)
    flags.DEFINE_string("output", None, "the file to write: .pt, .safetensors or .npz", required=True)
    cli.run(main)
