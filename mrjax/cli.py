"""What every command shares: flags parsed with a hint at the nearest known one, user errors as one sentence."""

import logging
import sys
from collections.abc import Callable

from absl import app, flags

from mrjax.errors import UserError


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(argv)` under absl; a `UserError` or a wrong flag ends it with one sentence and exit status 2."""

    def guarded(argv: list[str]) -> int | None:
        logging.getLogger().setLevel(logging.INFO)
        try:
            return main(argv)
        except UserError as error:
            _stop(error)

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError) as error:
            _stop(error)

    app.run(guarded, flags_parser=parse)


def _stop(error: Exception) -> None:
    print(f"mrjax: {error}", file=sys.stderr)
    sys.exit(2)
