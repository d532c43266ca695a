"""What all tests share: which of them can run here, and small files of smooth objects seen through coils."""

import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

# Eight devices on one CPU: every test of the suite runs sharded, as on a node with eight accelerators. And compiled
# quickly rather than well: at LLVM's full effort, making the initial parameters takes longer than a tiny training, and
# the newer emitters of fused loops, the only ones from JAX 0.11 on, take half as long again as the older.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * metadata.version("jaxlib").startswith("0.10."),
)
# The tests, on all workers, and the commands they start share what they compile, the operations of eager JAX included,
# with later runs of the suite as well, and leave the user's own cache alone.
os.environ.setdefault("XDG_CACHE_HOME", str(Path(__file__).parents[1] / "build/tests"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build/tests/programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import h5py
import jax
import numpy as np
import pytest
from absl import flags
from absl import logging as absl_logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mrjax import config as configs
from mrjax import experiment, train_step
from mrjax.config import defaults
from mrjax.data.buffers import Batch
from mrjax.data.dataset import Dataset
from mrjax.io import hdf5, ismrmrd_header

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PEERS = ("torch", "fastmri", "sigpy", "dipy")
AOT_PYTHON = ROOT / os.environ.get("AOT_VENV", ".venv-aot") / "bin" / "python"


class Requirement(NamedTuple):
    """What tests with a marker need beyond the packages of `make test`.

    Attributes:
      is_met: whether it is here.
      what: its name.
      command: what runs the tests.
    """

    is_met: Callable[[], bool]
    what: str
    command: str


REQUIREMENTS = {
    "peer": Requirement(
        lambda: all(importlib.util.find_spec(name) for name in PEERS),
        "the packages we compare with",
        "make bench-packages && make test ARGS='-m peer'",
    ),
    "aot": Requirement(AOT_PYTHON.exists, "ahead-of-time compilers", "make aot-packages && make test ARGS='-m aot'"),
    "browser": Requirement(
        lambda: bool(importlib.util.find_spec("playwright") and CHROMIUM),
        "Chromium and playwright",
        "make browser-packages && make test ARGS='-m browser'",
    ),
    "watch": Requirement(
        lambda: all(importlib.util.find_spec(name) for name in ("wandb", "mlflow", "optuna")),
        "Weights & Biases, MLflow and Optuna",
        "make watch-packages && make test ARGS='-m watch'",
    ),
    "gpu": Requirement(
        lambda: jax.default_backend() == "gpu",
        "a GPU",
        "on a GPU machine, .venv/bin/pip install -e '.[cuda12]' && make test ARGS='-m gpu'",
    ),
}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage seldom, and none of what was imported: else it takes a fifteenth of the suite's time."""
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests whose requirement is not met."""
    for marker, requirement in REQUIREMENTS.items():
        if item.get_closest_marker(marker) and not requirement.is_met():
            pytest.skip(f"needs {requirement.what}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say in the last line how many tests were skipped for want of what, and which command runs them."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):  # xdist's workers leave it to their controller
        return
    skipped = Counter(m for report in reporter.stats.get("skipped", []) for m in REQUIREMENTS if m in report.keywords)
    reasons = [f"{n} need {REQUIREMENTS[m].what} ({REQUIREMENTS[m].command})" for m, n in skipped.items()]
    if reasons:
        reporter.write_line(f"Tests not run: {'; '.join(reasons)}")


def one_device_flags() -> str:
    """XLA_FLAGS of a process with one device."""
    return re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])


def run_command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m mrjax.MODULE ARGUMENTS` in this process, which saves the seconds of its imports.

    An exception that the command does not answer by a sentence and an exit status is the test's.
    """
    importlib.import_module("mrjax.cli")  # it defines absl's own flags, which stay
    known, verbosity, logger = set(flags.FLAGS), absl_logging.get_verbosity(), logging.getLogger("mrjax")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    out, err, status = io.StringIO(), io.StringIO(), None
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(action="ignore"),  # runpy's: the module is imported already
    ):
        patched.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(f"mrjax.{module}", run_name="__main__")
        except SystemExit as end:
            status = end.code
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            absl_logging.set_verbosity(verbosity)
            logger.handlers, logger.level, logger.propagate = handlers, level, propagate
    return subprocess.CompletedProcess(arguments, status or 0, out.getvalue(), err.getvalue())


def coil_images(slices: int, coils: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(slices, coils, height, width) complex64: overlapping ellipses with a phase, under smooth coil sensitivities."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    images = np.zeros((slices, coils, height, width), np.complex64)
    for s in range(slices):
        body = np.zeros((height, width))
        for _ in range(8):
            cy, cx, ry, rx = *rng.uniform(-0.4, 0.4, 2), *rng.uniform(0.1, 0.5, 2)
            body += rng.uniform(0.2, 1) * (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
        for c in range(coils):
            angle = 2 * np.pi * c / coils
            sensitivity = np.exp(-((y - np.sin(angle)) ** 2 + (x - np.cos(angle)) ** 2) / 2 + 1j * (angle + x))
            images[s, c] = body * sensitivity
    return images


def to_kspace(images: np.ndarray) -> np.ndarray:
    axes = (-2, -1)
    shifted = np.fft.fft2(np.fft.ifftshift(images.astype(np.complex128), axes), norm="ortho")
    return np.fft.fftshift(shifted, axes).astype(np.complex64)


def rss(images: np.ndarray) -> np.ndarray:
    return np.sqrt((np.abs(images) ** 2).sum(-3)).astype(np.float32)


def write_scan(path: Path, slices: int = 3, coils: int = 2, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    images = coil_images(slices, coils, *size, seed=seed)
    truth = rss(images)
    arrays = {"kspace": to_kspace(images), "reconstruction_rss": truth, "ismrmrd_header": ismrmrd_header.header(size)}
    hdf5.write(
        path,
        arrays,
        {
            "max": truth.max(),
            "norm": np.linalg.norm(truth),
            "acquisition": "T1",
            "patient_id": path.stem.partition("_")[0],
        },
    )
    return path


def write_repetitions(
    folder: Path,
    scan: str = "1_T1",
    count: int = 3,
    *,
    slices: int = 3,
    size: tuple[int, int] = (32, 32),
    noise: float = 0.05,
    moved: dict[int, int] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Repetitions 1, 2, ... of a scan, each with noise and a phase of its own, some moved by so many rows.

    Returns their noise-free k-space, complex64 (slices, coils, height, width).
    """
    clean, rng = coil_images(slices, 2, *size, seed=seed), np.random.default_rng(seed)
    for number in range(1, count + 1):
        images = np.roll(clean, (moved or {}).get(number, 0), -2) * np.exp(1j * rng.uniform(-3, 3))
        kspace = to_kspace(images)
        kspace += noise * (rng.normal(size=kspace.shape) + 1j * rng.normal(size=kspace.shape))
        kspace[..., :2] = 0  # columns that the scanner did not measure
        arrays = {"kspace": kspace, "reconstruction_rss": rss(images)}
        hdf5.write(folder / f"{scan}{number:02d}.h5", arrays, {"max": rss(images).max(), "patient_id": "1"})
    clean = to_kspace(clean)
    clean[..., :2] = 0
    return clean


def write_pair(path: Path, slices: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0, dtype: str = "f4") -> Path:
    truth = rss(coil_images(slices, 1, *size, seed=seed))
    noise = 0.2 * np.random.default_rng(seed).normal(size=truth.shape)
    hdf5.write(path, {"input": np.abs(truth + noise).astype(dtype), "target": truth.astype(dtype)})
    return path


def write_volume(path: Path, arrays: dict[str, np.ndarray], attributes: dict[str, object] | None = None) -> Path:
    hdf5.write(path, arrays, attributes)
    return path


def read_array(path: str | Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][()]


def read_example(dataset: Dataset, number: int) -> Batch:
    example = {name: np.empty(shape, dtype) for name, (shape, dtype) in dataset.spec.items()}
    dataset.read_into(number, example)
    return example


def write_splits(folder: Path) -> Path:
    for number, slices in enumerate((5, 3, 4)):
        write_scan(folder / "train" / f"{number}_T101.t5", slices, seed=number)
    write_scan(folder / "val" / "8_T201.h5", 3, seed=8)
    write_scan(folder / "test" / "9_FLAIR01.hdf5", 3, seed=9)
    return folder


def make_tiny_config(data: Path, **fields: object) -> ConfigDict:
    config = defaults()
    config.data.dir = str(data)
    config.steps, config.log_every, config.eval_every, config.checkpoint_every = 6, 2, 3, 2
    config.model.channels, config.model.levels = 4, 2
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


# Fields that no compiled program of a run depends on but by what is said of them in `computed`.
OF_THE_LOOP = (
    "data.",
    "batch_size",
    "mesh",
    "steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "max_skipped_steps",
)


def computed(config: ConfigDict) -> str:
    """What the programs of a run compute, but for shapes and mesh: two configs for which it is equal share them."""
    fields = {name: value for name, value in configs.flat(config).items() if not name.startswith(OF_THE_LOOP)}
    schedule = config.schedule if config.schedule == "constant" else (config.schedule, config.steps)
    return repr((fields, schedule, round(config.warmup * config.steps), config.data.adjacent_slices))


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[None]:
    """Trace and load programs once for all training runs of a worker that compute the same: half of a tiny run."""
    make_recipe, init_state = experiment.make_recipe, experiment.Experiment.init_state
    recipes: dict[tuple[str, Mesh], train_step.Recipe] = {}
    states: dict[train_step.Recipe, train_step.TrainState] = {}

    def shared_recipe(config: ConfigDict, mesh: Mesh) -> train_step.Recipe:
        key = computed(config), mesh
        if key not in recipes:
            recipes[key] = make_recipe(config, mesh)
        return recipes[key]

    def shared_init_state(self: experiment.Experiment) -> train_step.TrainState:
        if self.recipe not in states:
            states[self.recipe] = jax.device_get(init_state(self))
        return jax.device_put(states[self.recipe], jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiment, "make_recipe", shared_recipe)
        patched.setattr(experiment.Experiment, "init_state", shared_init_state)
        patched.setattr(experiment, "jit_train_step", functools.cache(train_step.jit_train_step))
        patched.setattr(experiment, "jit_predict", functools.cache(train_step.jit_predict))
        yield


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder with train/ (3 volumes of 5, 3 and 4 slices), val/ and test/."""
    return write_splits(tmp_path / "data")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., ConfigDict]:
    """A config that trains in seconds; keyword arguments override fields by their dotted names (with __ for a dot)."""
    return make_tiny_config


@pytest.fixture(scope="session")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ConfigDict]:
    """The config of `trained`, with fields overridden as in `tiny`."""
    data = write_splits(tmp_path_factory.mktemp("shared") / "data")

    def make(**fields: object) -> ConfigDict:
        return make_tiny_config(data, **({"schedule": "constant", "data__dir": str(data)} | fields))

    return make


@pytest.fixture(scope="session")
def trained(trained_on: Callable[..., ConfigDict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a whole run, shared: read it, or copy it."""
    from mrjax import train

    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.train(trained_on(), str(workdir))
    return workdir


@pytest.fixture
def small_config(tmp_path: Path) -> Path:
    """A config file for commands, whose compiled programs are those of `trained`."""
    file = tmp_path / "small.py"
    file.write_text(
        "from mrjax.config import defaults\n\n\ndef get_config():\n    config = defaults()\n"
        "    config.model.channels, config.model.levels = 4, 2\n"
        "    config.schedule, config.warmup = 'constant', 0.0\n"
        "    config.log_every, config.eval_every, config.checkpoint_every = 5, 20, 5\n    return config\n"
    )
    return file
