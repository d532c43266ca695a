"""Train a reconstruction network.

    python -m mrjax.main --config=configs/unet.py [--workdir=runs/unet] [--config.FIELD=VALUE ...]

The same command resumes a run that was stopped; with --preflight it only looks for what would end or spoil the run
(docs/preflight.md). Fields and their defaults are in docs/config.md.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mrjax import cli
from mrjax.config import check_flags
from mrjax.parallel import processes
from mrjax.preflight import preflight
from mrjax.train import train


def main(_: list[str]) -> int | None:
    """Join the other processes, if any, and train, or look whether that would go well."""
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    start = preflight if flags.FLAGS.preflight else train
    with processes.process_group():
        return start(flags.FLAGS.config, flags.FLAGS.workdir or str(Path("runs") / Path(file).stem))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "file of the experiment, e.g. configs/unet.py")
    flags.DEFINE_string("workdir", None, "folder of the run; runs/<name of the config> by default")
    flags.DEFINE_bool("preflight", False, "check files, memory, time and disk, and write nothing; status 1: a problem")
    cli.run(main, check_flags)
