"""A U-Net for M4Raw's brain scans measured two and three times faster, as its authors set the task.

    python -m mrjax.main --config=configs/m4raw_acceleration.py --config.data.dir=M4RAW

M4RAW: the folder that holds multicoil_train/ and multicoil_val/. Without it, the demo data; there --config.steps=250
--config.model.channels=16 are enough.
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.steps = 20_000
    config.eval_every = 2_000
    config.acquisition.mask = "equispaced_fraction"
    config.acquisition.accelerations = (2.0, 3.0)
    config.acquisition.centre_fractions = (30 / 196, 30 / 196)  # of M4Raw's 256 columns 196 are sampled
    config.acquisition.noise = (0.0, 0.0)  # a scan at 0.3 T has its own
    config.model.residual = True
    return config
