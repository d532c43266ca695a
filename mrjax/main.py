"""Train a reconstruction network.

    python -m mrjax.main --config=configs/unet.py [--workdir=runs/unet] [--config.FIELD=VALUE ...]

The same command resumes a run that was stopped. Fields and their defaults are in docs/config.md.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mrjax import cli
from mrjax.config import check_flags
from mrjax.parallel import processes
from mrjax.train import train


def main(_: list[str]) -> None:
    """Join the other processes, if any, and train."""
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    with processes.process_group():
        train(flags.FLAGS.config, flags.FLAGS.workdir or str(Path("runs") / Path(file).stem))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "file of the experiment, e.g. configs/unet.py")
    flags.DEFINE_string("workdir", None, "folder of the run; runs/<name of the config> by default")
    cli.run(main, check_flags)
