"""The one exception that a user is meant to read, and its usual form."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence: the file or field, what was found, what was expected."""


def expect(condition: object, found: str, expected: str) -> None:
    """Raise a `UserError` of what was found and what was expected instead, unless the condition holds."""
    if not condition:
        raise UserError(f"{found}, expected {expected}")
