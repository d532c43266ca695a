"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence: the file or field, what was found, what was expected."""
