"""An end-to-end VarNet for randomly undersampled brain k-space, sized for a laptop's CPU and the demo data.

    python -m mrjax.main --config=configs/varnet.py

fastMRI's size, for a GPU: --config.model.channels=18 --config.model.levels=4 --config.model.cascades=12, and
--config.remat=True for less memory.
Every field and its default is in docs/config.md.
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.steps = 250
    config.eval_every = 125
    config.clip_norm = 1.0
    config.model.name = "varnet"
    config.model.pool = "avg"
    config.model.residual = True  # starts at compressed sensing; False: fastMRI's own function
    config.model.channels, config.model.levels = 12, 3
    config.model.cascades = 2
    config.acquisition.noise = (0.0, 0.005)
    # For heads of any orientation, resolution, contrast and coils, not only those of the demo data.
    config.augment.rotation = 180.0
    config.augment.scale, config.augment.scale_p = (0.5, 1.4), 0.8
    config.augment.flip_vertical_p = config.augment.contrast_p = config.augment.coils_p = 0.5
    return config
