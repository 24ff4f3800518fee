"""What all command lines share."""

import hashlib
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType

from absl import app, flags, logging

from perfusion_jax.runtime.errors import InputError, Stopped, UnavailableError, is_jax_runtime_error, out_of_memory
from perfusion_jax.runtime.files import cache_folder

# Exit status where the same command would fail again.
BAD_INPUT = 2
# What ml_collections calls the module that the file of --config is.
_CONFIG_FILE = "config_config"
# Compiled programs that the cache keeps; those used longest ago go first.
CACHE_BYTES = 2 * 2**30


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C and SIGTERM interrupt nothing; the function it gives says whether one has come.

    A second one interrupts at once.
    """
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _WithoutPyTorch(PathFinder):
    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


def hide_pytorch() -> None:
    """Has this process find no PyTorch, if it has none yet.

    No command needs it. diffusers imports it wherever it is installed, whatever is asked of it, and that takes longer
    than all other imports together.
    """
    if "torch" not in sys.modules and PathFinder in sys.meta_path:
        sys.meta_path[sys.meta_path.index(PathFinder)] = _WithoutPyTorch


def parse_shard(text: str) -> tuple[int, int]:
    """Reads `I/N`, the I-th (from 0) of N jobs: it takes every N-th concept from the I-th on.

    Raises:
        InputError: it is not of that form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard is {text!r}; it must be I/N, with I from 0 to N - 1")
    return int(match[1]), int(match[2])


def share_compiled_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, so that the next command need not compile it again.

    JAX_COMPILATION_CACHE_DIR names another folder. Programs for a CPU are for one kind of it, so each kind of machine
    has a folder of its own, where several share a home.
    """
    import jax  # here, so that a flag that is wrong is told at once

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    try:
        folder = cache_folder()
    except InputError as error:
        logging.warning("%s; without it, what is compiled is compiled anew by each command", error)
        return
    try:
        cpu = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        cpu = platform.processor()
    machine = f"{platform.machine()}-{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled" / machine))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def run(
    main: Callable[[], None], resumes: bool = False, memory_advice: str = "take fewer or smaller pictures at once"
) -> None:
    """Parses the flags and runs `main`; bad input ends the program with its message alone, without a traceback.

    SIGTERM, by which schedulers stop a job, interrupts `main` as Ctrl-C does: with a KeyboardInterrupt. The program
    then ends with status 1, as it does where to try again may help; after bad input with BAD_INPUT.

    Args:
        main: the program.
        resumes: whether the same command goes on with what an interrupted one has done.
        memory_advice: what to do if the memory of a device does not suffice.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            print(f"error: {arguments[1]!r} is not a flag; see --help", file=sys.stderr)
            sys.exit(BAD_INPUT)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax and others tell every step they take
        hide_pytorch()
        share_compiled_programs()
        try:
            main()
        except (KeyboardInterrupt, Stopped):
            sys.exit("interrupted; the same command goes on where it was" if resumes else "interrupted")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1 if isinstance(error, UnavailableError) else BAD_INPUT)
        except Exception as error:
            reason = out_of_memory(error) if is_jax_runtime_error(error) else ""
            if not reason:
                raise
            print(f"error: the memory of a device does not suffice ({reason}): {memory_advice}", file=sys.stderr)
            sys.exit(BAD_INPUT)

    def parse(arguments: list[str]) -> list[str]:
        try:
            left = flags.FLAGS(arguments)
            if "config" in flags.FLAGS:
                flags.FLAGS.config.to_dict()  # a config file that cannot be read says so when looked at
            return left
        except Exception as error:  # a config file may raise anything
            problem = _fault_in_config(error, arguments) or _mistake_in_flags(error)
            if not problem:
                raise
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(BAD_INPUT)

    app.run(guarded, flags_parser=parse)


def _fault_in_config(error: BaseException, arguments: Sequence[str]) -> str:
    """Where the user's config file is wrong, as `rex.py:7: NameError: ...`; empty if an error is of something else."""
    causes = [error]
    while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None:  # ml_collections and absl hand it on
        causes.append(inner)
    for cause in causes:
        if isinstance(cause, SyntaxError) and str(cause.filename).endswith(".py"):  # and not of a flag's value
            return f"{cause.filename}:{cause.lineno}: {type(cause).__name__}: {cause.msg}"
        own = [at for at in traceback.walk_tb(cause.__traceback__) if at[0].f_globals.get("__name__") == _CONFIG_FILE]
        if own:
            frame, line = own[-1]
            words = " ".join(str(cause).splitlines())
            return f"{frame.f_code.co_filename}:{line}: {type(cause).__name__}: {words}"
    # It has no such function, one that cannot be called so, or one that returns something else.
    cause = causes[-1]
    if isinstance(cause, (AttributeError, TypeError)) and re.search("get_config|'to_dict'", str(cause)):
        file = re.search(r"^--?config[=\n]([^:\n]*)", "\n".join(arguments), re.MULTILINE)
        name = file[1] if file else "--config"
        return f"{name}: it needs a function get_config(base) that returns make_config(...) ({cause})"
    return ""


def _mistake_in_flags(error: Exception) -> str:
    """What is wrong with the flags, in a line; empty if an error is of something else."""
    if isinstance(error, flags.Error):
        return f"{error}; see --help"
    if isinstance(error, OSError):
        return f"--config: {str(error).splitlines()[-1].strip()}"
    # ml_collections hands a KeyError on inside another one; its text is the quoted form of what it was given.
    cause = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    if isinstance(cause, KeyError):
        return f"--config: no such key: {cause.args[0]}".replace("\n", ". ")
    return str(error) if isinstance(error, (AttributeError, TypeError, ValueError)) else ""
