"""A U-Net that takes the noise out of one scan, trained towards another scan as noisy: no clean image, no mean.

    python -m mrjax.main --config=configs/noise2noise.py

Lehtinen et al., arXiv:1803.04189. Data and flags are those of configs/m4raw_denoise.py; two repetitions are enough.
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.task = "noise2noise"
    config.steps = 250
    config.learning_rate = 2e-3
    config.eval_every = 125
    config.model.channels = 16
    config.model.residual = True
    config.acquisition.accelerations = (1.0,)  # all that was measured, with no noise but its own
    config.acquisition.noise = (0.0, 0.0)
    for name in ("rotation_p", "scale_p", "anisotropy_p", "translation_p"):
        config.augment[name] = 0.0  # they interpolate, which smooths the noise; flips do not
    return config
