"""A U-Net that takes the noise out of one scan, trained towards the mean of the other repetitions of it.

    python -m mrjax.main --config=configs/m4raw_denoise.py

That makes demo data with three repetitions and trains at a laptop's size. M4Raw: --config.data.dir=M4RAW (the folder
with multicoil_train/ and multicoil_val/) and, on a GPU, --config.model.channels=32 --config.steps=20000. Files are
named <study>_<contrast><NN>, NN the repetition; repetitions between which the head moved are left out and listed.
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.task = "denoise"
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
