"""The one exception that a user is meant to read, its usual form, and text of files made fit to be shown."""

import textwrap


class UserError(ValueError):
    """A mistake that the user can mend: one sentence: the file or field, what was found, what was expected."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(textwrap.shorten(sentence, 2000, placeholder=" ...")))


def expect(condition: object, found: str, expected: str) -> None:
    """Raise a `UserError` of what was found and what was expected instead, unless the condition holds."""
    if not condition:
        raise UserError(f"{found}, expected {expected}")


def printable(text: str) -> str:
    """Return a text in one line, with escapes for what would steer a terminal: names in files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
