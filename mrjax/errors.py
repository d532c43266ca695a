"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence naming the file or config field, what was found, what was expected."""
