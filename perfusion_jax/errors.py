"""The errors that end a program with their message alone."""


class InputError(ValueError):
    """A file, setting or prompt cannot be used; the message names it, says what is wrong and what to do."""


class UnavailableError(InputError):
    """Storage, the hub or another process fails where nothing is known to be wrong: to try again may help."""


def out_of_memory(error: Exception) -> str:
    """What a `jax.errors.JaxRuntimeError` says of memory that does not suffice; empty if that is not what it is about.

    The TPU's compiler raises it, and every device when it allocates.
    """
    lines = str(error).splitlines()
    if not lines or "RESOURCE_EXHAUSTED" not in lines[0]:
        return ""
    return next((line for line in lines if "out of memory" in line.lower()), lines[0])[:300]
