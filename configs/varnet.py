"""The end-to-end variational network, sized for a laptop's CPU and the demo data.

    python -m mrjax.main --config=configs/varnet.py --workdir=runs/varnet

fastMRI's size, for a GPU: --config.model.channels=18 --config.model.cascades=12 --config.model.sens_channels=8
--config.remat=True
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.steps = 250
    config.learning_rate = 2e-3
    config.eval_every = 125
    config.model.name = "varnet"
    config.model.channels = 8
    config.model.cascades = 4
    config.model.sens_channels = 4
    return config
