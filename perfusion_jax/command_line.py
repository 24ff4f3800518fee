"""What all command lines share."""

import signal
import sys
from collections.abc import Callable

from absl import app

from perfusion_jax.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; bad input ends the program with its message alone, without a traceback.

    SIGTERM, by which schedulers stop a job, interrupts `main` as Ctrl-C does: with a KeyboardInterrupt.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            sys.exit(f"error: {arguments[1]!r} is not a flag; see --help")
        try:
            main()
        except InputError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command goes on where it was")

    app.run(guarded)
