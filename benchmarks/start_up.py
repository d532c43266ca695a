"""Time a run up to its first step, with a cold and a warm compilation cache.

    python -m benchmarks.start_up [--channels=32] [--size=256] [--rounds=3] [--json=FILE]

Each start is `python -m mrjax.main` in its own process, timed from its launch to the log line of the first finished
step. A round is a cold start with an empty compilation cache and a warm start with the cache that it left.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from benchmarks.files import make_files
from benchmarks.report import Table, publish, spread
from mrjax import cli
from mrjax.report.run_log import FIRST_STEP


def seconds_to_first_step(command: list[str], cache: Path) -> float:
    """Start the command, kill it after its first step and return the seconds to it."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if FIRST_STEP in line:
                    return time.perf_counter() - start
        finally:
            process.kill()
    raise RuntimeError(f"{' '.join(command)} ended before its first step: {''.join(lines[-5:])}")


def main(argv: list[str]) -> None:
    """Time cold and warm starts in turn."""
    values = flags.FLAGS
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split in ("train", "val"):
            make_files(root / "data" / split, values.size, volumes=1, slices=4)
        command = [sys.executable, "-m", "mrjax.main", "--config=configs/unet.py", f"--workdir={root / 'run'}"]
        fields = {"data.dir": root / "data", "batch_size": values.batch, "steps": 1000}
        fields |= {"model.channels": values.channels, "model.levels": values.levels}
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        for _ in range(values.rounds):
            shutil.rmtree(root / "cache", ignore_errors=True)
            for start in times:
                times[start].append(seconds_to_first_step(command, root / "cache"))
                shutil.rmtree(root / "run")
    ratio = statistics.median(warm / cold for cold, warm in zip(*times.values(), strict=True))
    rows = [[start, spread(seconds), ratio if start == "warm" else 1.0] for start, seconds in times.items()]
    columns = ["compilation cache", "s to the end of the first step (quartiles)", "over cold"]
    config = {name: values[name].value for name in ("size", "channels", "levels", "batch", "rounds")}
    raw = {"seconds": times, "ratio": ratio}
    publish("start_up", config, [Table("From launch to the end of the first step", columns, rows)], raw, values.json)


if __name__ == "__main__":
    flags.DEFINE_integer("size", 256, "height and width of the images")
    flags.DEFINE_integer("channels", 32, "channels of the U-Net's first level")
    flags.DEFINE_integer("levels", 4, "levels of the U-Net")
    flags.DEFINE_integer("batch", 4, "slices in a step")
    flags.DEFINE_integer("rounds", 3, "how often a cold and a warm start are timed")
    flags.DEFINE_string("json", None, "file to write all measurements to")
    cli.run(main)
