"""fastMRI's U-Net for its single-coil knee scans, four times faster, sized for one GPU.

    python -m mrjax.main --config=configs/fastmri_knee_singlecoil.py --config.data.dir=FASTMRI

FASTMRI: the folder that holds singlecoil_train/ and singlecoil_val/. The published test files are undersampled and
have no truth: evaluate with --split=val, and reconstruct them with mrjax.reconstruct.
"""

from ml_collections import ConfigDict

from mrjax.config import defaults


def get_config() -> ConfigDict:
    """The experiment: what differs from the defaults."""
    config = defaults()
    config.steps = 50_000
    config.batch_size = 32
    config.precision = "bfloat16"
    config.eval_every = 5_000
    config.checkpoint_every = 1_000
    config.loss.mse, config.loss.l1 = 0.0, 1.0
    config.model.pool = "avg"
    config.data.image_size = (320, 320)  # k-space is larger and of many sizes: the image is cropped, as fastMRI does
    config.data.resize = "image"
    config.data.on_bad_file = "skip"
    config.data.workers = 8
    config.acquisition.noise = (0.0, 0.0)
    return config
