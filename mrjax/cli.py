"""What all commands share: flags, a plain log, the compilation cache, and errors as one sentence."""

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from tqdm.contrib.logging import logging_redirect_tqdm

from mrjax import config as configs
from mrjax.errors import UserError, printable
from mrjax.ops.cpu.native import private_folder
from mrjax.parallel import processes


def run(
    main: Callable[[list[str]], int | None],
    check_flags: Callable[[list[str]], None] | None = None,
    *,
    arguments: bool = False,
    one_process: bool = False,
) -> None:
    """Run `main(argv)` under absl; a `UserError` or a wrong flag ends it with one sentence and exit status 2.

    `main` returns the exit status. `check_flags` checks the raw flags first, to say more than absl would. A command may
    take `arguments` beside its flags, and may have to be `one_process`.
    """

    limit_malloc_arenas()

    def guarded_main(argv: list[str]) -> int | None:
        # Orbax and asyncio print tracebacks of a save that failed, of which a warning says all.
        absl_logging.set_verbosity(absl_logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        logger = logging.getLogger("mrjax")
        handler = logging.StreamHandler()
        handler.setFormatter(_PrintableFormatter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            if argv[1:] and not arguments:
                raise UserError(f"{argv[1]!r} belongs to no flag, expected --NAME=VALUE")
            if one_process:
                processes.require_one_process(f"mrjax.{Path(argv[0]).stem}")
            enable_compilation_cache()
            with logging_redirect_tqdm([logger]):
                return main(argv)
        except (UserError, OSError) as error:
            _exit_with(error)
        except MemoryError as error:
            _exit_with(UserError(f"this takes more memory than there is ({error})"))

    def parse(argv: list[str]) -> list[str]:
        try:
            argv = [argv[0], *configs.expand_flags(argv[1:])]
            if check_flags:
                check_flags(argv[1:])
            return flags.FLAGS(argv)
        except (flags.Error, UserError) as error:
            _exit_with(error)
        except Exception as error:  # a config is a program, and may raise anything
            config = next((flag.partition("=")[2] for flag in argv if flag.startswith("--config=")), "the config")
            _exit_with(UserError(f"{config}: {type(error).__name__}: {error.args[0] if error.args else error}"))

    app.run(guarded_main, flags_parser=parse)


def define_fields(argv: list[str]) -> None:
    """Define the flags of config fields; raises `UserError` for one that is unknown."""
    configs.check_fields(argv)
    config_flags.DEFINE_config_dict("config", configs.defaults())


def limit_malloc_arenas() -> None:
    """Let all threads of this process and of its workers allocate from one heap; MALLOC_ARENA_MAX names another number.

    Of glibc's 8 for each core, every one keeps what it once needed, so that memory would grow with every evaluation
    and every save, whose threads are new ones (benchmarks.soak).
    """
    arenas = os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # glibc reads it where a worker starts
    with contextlib.suppress(AttributeError, ValueError):  # not glibc, or not a number
        ctypes.CDLL(None).mallopt(-8, int(arenas))  # M_ARENA_MAX


def enable_compilation_cache() -> None:
    """Keep compiled programs for the next start, in a folder of this user alone: a compiled program is trusted code.

    JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=false turns this off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = private_folder("compiled")
        except OSError as error:
            logging.getLogger(__name__).warning("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def _exit_with(error: Exception) -> NoReturn:
    print(f"mrjax: {UserError(str(error))}", file=sys.stderr)
    sys.exit(2)
