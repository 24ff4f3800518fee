"""The errors that end a program with their message alone."""


class InputError(ValueError):
    """A file, setting or prompt cannot be used; the message names it, says what is wrong and what to do."""


class UnavailableError(InputError):
    """Storage, the hub or another process fails where nothing is known to be wrong: to try again may help."""
