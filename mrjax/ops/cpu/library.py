"""Operations that XLA's CPU backend is slow at, written in C++ and compiled on first use for the CPU at hand.

Where there is no C++ compiler, XLA's own operations are used.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

_SOURCES = Path(__file__).parent
_FLAGS = ("-march=native", "-O3", "-std=c++17", "-fPIC", "-shared")
_TARGETS = {"mrjax_convolution": "Convolution", "mrjax_filter_gradient": "FilterGradient"}


def private_folder(name: str) -> Path:
    """A folder for what is compiled: such files are trusted code, so nobody else may write there.

    Raises:
      OSError: there is none, as for a user without a home, or somebody else may write there.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mrjax" / name
    except RuntimeError as error:
        raise OSError(str(error)) from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is a folder that others may write to, expected one of this user alone (chmod 700)")
    return folder


@functools.cache
def available() -> bool:
    """Whether the operations are there for `jax.ffi.ffi_call` on CPUs; compiles them (ten seconds) the first time."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("c++", "g++", "clang++")))[:1]
        if not compiler:
            raise OSError("no C++ compiler found")
        library = ctypes.cdll.LoadLibrary(str(_built(compiler)))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "").strip().splitlines()
        reason = next((line for line in said if "error" in line), error)
        logging.getLogger(__name__).warning("convolutions are XLA's own, slower ones on this CPU: %s", reason)
        return False
    for target, symbol in _TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return True


def _built(compiler: list[str]) -> Path:
    """The library for this compiler, this CPU and this jaxlib."""
    sources = sorted([*_SOURCES.glob("*.cc"), *_SOURCES.glob("*.h")])
    # What the compiler defines tells its version and the instructions of the CPU.
    defined = _run(*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    parts = [jaxlib.__version__, *compiler, *_FLAGS, defined, *(path.read_text() for path in sources)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = private_folder("native") / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            _run(*compiler, *_FLAGS, "-I", jax.ffi.include_dir(), str(_SOURCES / "convolution.cc"), "-o", str(made))
            # Never in place of one that another machine of the same home has loaded.
            with contextlib.suppress(FileExistsError):
                os.link(made, library)
    return library


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
