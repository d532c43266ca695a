"""Export the best checkpoint of a run to a folder that others load, with mrjax or without it.

    python -m mrjax.export --workdir=runs/unet --output=model [--size=320,320] [--coils=16]

The folder holds weights (model.safetensors, config.json) that `mrjax.load`, `mrjax.evaluate` and `mrjax.reconstruct`
take for a workdir; the computation as a StableHLO program, which needs JAX alone, and that of a U-Net as ONNX, from
image to image; what they take and give, in model.json; and a model card. None holds a path or the name of a file.

The StableHLO program takes any number of slices of one size, --size=height,width, by default config.data.image_size;
and of one number of coils, --coils: scans of fewer are filled up with coils of zeros, which change next to nothing.
"""

import logging
import os

from absl import flags

from mrjax import cli
from mrjax.errors import expect
from mrjax.export.folder import COILS
from mrjax.inference import Inference

logger = logging.getLogger("mrjax.export")


def main(_: list[str]) -> None:
    """Restore, export, list what is written."""
    size, output = flags.FLAGS.size or [], flags.FLAGS.output
    whole = len(size) in (0, 2) and all(side.isdigit() for side in size)
    expect(whole, f"--size is {','.join(size)!r}", "height,width as in 320,320")
    inference = Inference.restore(flags.FLAGS.workdir)
    inference.export(output, (int(size[0]), int(size[1])) if size else None, flags.FLAGS.coils)
    for name in sorted(os.listdir(output)):
        logger.info(
            "written: %s, %.1f MB", os.path.join(output, name), os.path.getsize(os.path.join(output, name)) / 1e6
        )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "of a run of mrjax.main or mrjax.import_fastmri", required=True)
    flags.DEFINE_string("output", None, "folder to make: an empty or new one", required=True)
    flags.DEFINE_list("size", None, "height,width of the k-space or images that the StableHLO program takes")
    flags.DEFINE_integer("coils", COILS, "that it takes")
    cli.run(main, one_process=True)
