"""The errors that end a program with their message alone, and what JAX's own are about."""

import re
import sys

_FAILED = re.compile("(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|ABORTED|INTERNAL|UNAVAILABLE): ")


class InputError(ValueError):
    """A file, setting or prompt cannot be used; the message names it, says what is wrong and what to do."""


class UnavailableError(InputError):
    """Storage, the hub or another process fails where nothing is known to be wrong: to try again may help."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The program was told to stop, and has saved what it had done."""


def is_jax_runtime_error(error: BaseException) -> bool:
    """Whether an error is JAX's own, of a device or of the compiler."""
    jax = sys.modules.get("jax")  # which takes a second to import: where it is not, it has raised nothing
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError)


def is_runtime_error(error: Exception) -> bool:
    """Whether an error is of the devices or of other processes; JAX raises a few of these as a plain ValueError."""
    return is_jax_runtime_error(error) or (
        # TensorStore's errors begin alike; they are of storage, and name their spec or driver.
        type(error) is ValueError
        and _FAILED.match(str(error)) is not None
        and not any(word in str(error) for word in ("tensorstore", " driver", "os_error_code"))
    )


def out_of_memory(error: Exception) -> str:
    """What a `jax.errors.JaxRuntimeError` says of memory that does not suffice; empty if that is not what it is about.

    The TPU's compiler raises it, and every device when it allocates.
    """
    lines = str(error).splitlines()
    if not lines or "RESOURCE_EXHAUSTED" not in lines[0]:
        return ""
    return next((line for line in lines if "out of memory" in line.lower()), lines[0])[:300]
