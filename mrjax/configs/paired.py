"""A U-Net from corrupted to clean images that were made elsewhere: files with `input` and `target`.

python -m mrjax.main --config=configs/paired.py --config.data.dir=FOLDER
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.task = "paired"
    config.model.residual = True
    return config
