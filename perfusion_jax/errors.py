"""The one kind of error that bad input raises."""


class InputError(ValueError):
    """A file, setting or prompt cannot be used; the message names it, says what is wrong and what to do."""
