"""What every command shares: flags parsed with a hint at the nearest known one, a plain log, errors as one sentence."""

import gc
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax
import tqdm
from absl import app, flags
from absl import logging as absl_logging

from mrjax.errors import UserError
from mrjax.ops.cpu import library

# Imports and tracing make objects that stay: to look for garbage every 700 of them is a fifth of the time they take.
gc.set_threshold(50_000, 20, 20)


class _AboveTheBar(logging.Handler):
    """Prints messages as they are, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)


def run(main: Callable[[list[str]], int | None], check_flags: Callable[[list[str]], None] | None = None) -> None:
    """Runs `main(argv)` under absl; a `UserError` or a wrong flag ends it with one sentence and exit status 2.

    Args:
      main: the command; what it returns is the exit status.
      check_flags: looks at the raw flags first, to say more than absl would.
    """

    def guarded(argv: list[str]) -> int | None:
        absl_logging.set_verbosity(absl_logging.ERROR)
        logger = logging.getLogger("mrjax")
        logger.addHandler(_AboveTheBar())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            keep_compiled_programs()
            return main(argv)
        except (UserError, OSError) as error:
            _stop(error)

    def parse(argv: list[str]) -> list[str]:
        try:
            if check_flags:
                check_flags(argv[1:])
            return flags.FLAGS(argv)
        except (flags.Error, UserError) as error:
            _stop(error)
        except Exception as error:  # a config is a program: whatever it raises is the user's to mend
            config = next((flag.partition("=")[2] for flag in argv if flag.startswith("--config=")), "the config")
            _stop(UserError(f"{config}: {type(error).__name__}: {error.args[0] if error.args else error}"))

    app.run(guarded, flags_parser=parse)


def expect_no_arguments(argv: list[str]) -> None:
    """Raises a `UserError` for a word on the command line that belongs to no flag."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} belongs to no flag, expected --NAME=VALUE")


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiled, so that a second start is fast; in a folder that is the user's alone.

    A compiled program is trusted code: nobody else may write there. JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false turns this off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = library.private_folder("compiled")
        except OSError as error:
            logging.getLogger(__name__).warning("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _stop(error: Exception) -> NoReturn:
    print(f"mrjax: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
