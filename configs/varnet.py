"""An end-to-end VarNet for randomly undersampled brain k-space, sized for a laptop's CPU and the demo data.

    python -m mrjax.main --config=configs/varnet.py

fastMRI's size, for a GPU: --config.model.channels=18 --config.model.levels=4 --config.model.cascades=12
--config.model.sens_channels=8 --config.model.sens_levels=4, and --config.remat for less memory.
Every field and its default is in mrjax/config.py.
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
    config.model.residual = True  # False: fastMRI's own function
    config.model.channels, config.model.levels = 8, 3
    config.model.cascades = 4
    config.model.sens_channels, config.model.sens_levels = 4, 3
    return config
