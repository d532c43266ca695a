"""Compile and load C++, on first use and for the CPU at hand; without a compiler its callers do without."""

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

_FLAGS = ("-march=native", "-O3", "-std=c++17", "-fPIC", "-shared")


def private_folder(name: str) -> Path:
    """Make a cache folder for compiled files: they are trusted code, so no other user may write there.

    Raise OSError if it cannot be made, as for a user without a home, or if others may write there.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mrjax" / name
    except RuntimeError as error:
        raise OSError(str(error)) from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} is a folder that others may write to, expected one of this user alone (chmod 700)")
    return folder


@functools.cache
def available() -> bool:
    """Register the operations for `jax.ffi.ffi_call`, compiled if need be (ten seconds); return whether that worked."""
    try:
        library = load(Path(__file__).with_name("convolution.cc"), "-I", jax.ffi.include_dir())
    except OSError as error:
        logging.getLogger(__name__).warning("convolutions are XLA's own, slower ones on this CPU: %s", error)
        return False
    for target, symbol in (("mrjax_convolution", "Convolution"), ("mrjax_filter_gradient", "FilterGradient")):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return True


def load(source: Path, *flags: str) -> ctypes.CDLL:
    """Load a C++ file as a library, compiled if need be; raises OSError if that fails, as without a compiler."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ("c++", "g++", "clang++")))[:1]
        if not compiler:
            raise OSError("no C++ compiler found")
        return ctypes.cdll.LoadLibrary(str(_compiled(compiler, source, flags)))
    except (ValueError, subprocess.CalledProcessError) as error:
        messages = getattr(error, "stderr", "").strip().splitlines()
        raise OSError(next((line for line in messages if "error" in line), str(error))) from error


def _compiled(compiler: list[str], source: Path, flags: tuple[str, ...]) -> Path:
    """Compile the library for this compiler, this CPU and this jaxlib, unless the cache has it."""
    sources = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    # The predefined macros name the compiler's version and the instruction sets of the CPU.
    macros = _run(*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    parts = [jaxlib.__version__, *compiler, *_FLAGS, macros, *sources]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = private_folder("native") / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            temporary = f"{folder}/{library.name}"
            _run(*compiler, *_FLAGS, *flags, str(source), "-o", temporary)
            # A file that another machine with the same home has loaded is never overwritten.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, library)
    return library


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
