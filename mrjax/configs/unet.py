"""A U-Net for randomly undersampled brain k-space, sized for a laptop's CPU and the demo data.

    python -m mrjax.main --config=configs/unet.py

Your own files: --config.data.dir=FOLDER (with train/, val/ and test/); on a GPU also --config.model.channels=32.
Every field and its default is in docs/config.md.
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.steps = 250
    config.learning_rate = 2e-3
    config.eval_every = 125
    config.model.channels = 16
    config.model.residual = True
    # For heads of any orientation, resolution, contrast and coils, not only those of the demo data.
    config.augment.rotation = 180.0
    config.augment.scale, config.augment.scale_p = (0.5, 1.4), 0.8
    config.augment.flip_vertical_p = config.augment.contrast_p = config.augment.coils_p = 0.5
    return config
