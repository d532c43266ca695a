"""fastMRI's U-Net for its multi-coil brain scans, four and eight times faster, sized for one GPU.

    python -m mrjax.main --config=configs/fastmri_brain.py --config.data.dir=FASTMRI

FASTMRI: the folder that holds multicoil_train/ and multicoil_val/. The published test files are undersampled and
have no truth: evaluate with --split=val, and reconstruct them with mrjax.reconstruct.
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.steps = 100_000
    config.batch_size = 16
    config.precision = "bfloat16"
    config.eval_every = 10_000
    config.checkpoint_every = 1_000
    config.loss.mse, config.loss.l1 = 0.0, 1.0
    config.model.pool = "avg"
    config.data.image_size = (320, 320)  # k-space is larger and of many sizes: the image is cropped, as fastMRI does
    config.data.resize = "image"
    config.data.check = "headers"  # reading it all would take hours
    config.data.on_bad_file = "skip"
    config.data.workers = 8
    config.acquisition.mask = "equispaced_fraction"
    config.acquisition.accelerations = (4.0, 8.0)
    config.acquisition.centre_fractions = (0.08, 0.04)
    config.acquisition.noise = (0.0, 0.0)
    return config
