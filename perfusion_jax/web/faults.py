"""What the page says of errors."""

import re
import traceback

from absl import logging

from perfusion_jax.runtime.errors import InputError, is_jax_runtime_error, out_of_memory

# Advice of the command line, and what it is on the page, in this order.
_ON_PAGE = (
    (r"in a new --workdir, ", "by another name, "),
    (r"; with a new --workdir, .*", "; the command perfusion_jax.train can name others"),
    (r", with a new --workdir, does without", ", under Settings and by another name, does without"),
    (r"take another --workdir(, or another --shard of it)?", "take another name"),
    (r"give one another name, as in --concept \S+", "rename one in the library"),
    (r"--spacing (\w+)", r"the spacing of steps '\1'"),
    (r"The same command tries the failed ones again", "Try again tries the failed ones"),
    (r"; the same command (goes on|does one)", r"; Try again \1"),
    (r"the flag --config\.", "under Settings, "),
    (r"--config\.", ""),
)


def for_page(words: str) -> str:
    """A message of the commands, its advice as the page's."""
    for pattern, there in _ON_PAGE:
        words = re.sub(pattern, there, words)
    return words


def message_of(error: Exception, memory_advice: str = "take fewer or smaller pictures at once") -> str:
    """What the page says of an error; a fault of the program leaves its traceback on the terminal."""
    if isinstance(error, InputError):
        return for_page(str(error))
    reason = out_of_memory(error) if is_jax_runtime_error(error) else ""
    if reason:
        return f"the memory of a device does not suffice ({reason}): {memory_advice}"
    logging.error("%s", "".join(traceback.format_exception(error)))
    return f"a fault of the program (see the terminal): {type(error).__name__}: {error}"
