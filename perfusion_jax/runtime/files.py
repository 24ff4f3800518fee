"""Files: written so that a kill leaves the old one or the new one, never a part; what failures mean; locks."""

import errno
import fcntl
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from perfusion_jax.runtime.errors import InputError, UnavailableError, is_runtime_error

# What would be the same the next time; gcsfs calls a bad request a ValueError, and where it is missing, that is an
# ImportError.
_LASTING = (
    FileExistsError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ImportError,
    ValueError,
)
_LASTING_NUMBERS = (errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS)
# Mistakes of ours, and no memory: nothing that storage does.
_NOT_OF_STORAGE = (AttributeError, TypeError, AssertionError, MemoryError)
# What reaches a bucket raises errors of its own kinds.
_BACKENDS = ("aiohttp.", "fsspec.", "gcsfs.", "google.auth.")
_COPIED_AT_ONCE = 16 * 2**20
# Some network file systems have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of this machine's file system, and not of a bucket (`gs://...`)."""
    return "://" not in os.fspath(path)


def at_home(path: str | os.PathLike[str]) -> str:
    """A path with the user's home folder in place of the `~/` that it begins with.

    A shell does not see to it in `--workdir=~/runs`, nor does anything in a table. Other `~` stay: files may have them
    in their names.
    """
    text = os.fspath(path)
    return os.path.expanduser(text) if text.startswith("~/") else text


def to_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path as people give it, local or in a bucket; `~/` is the home folder.

    Raises:
        InputError: it is an address of something else.
    """
    try:
        return epath.Path(at_home(path))
    except KeyError as error:  # of no scheme that epath knows
        raise InputError(f"{path}: {error.args[0]} is no storage known here: give a local path or gs://...") from error


def write_bytes(file: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all, local or in a bucket (where a write is whole by itself).

    Raises:
        InputError, UnavailableError: it cannot be written.
    """
    path = to_path(file)
    if is_local(path):
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(data)
        return
    with storage_errors(path, "written"):
        path.write_bytes(data)


def read_text(file: epath.Path) -> str:
    """Reads what an earlier run may have written; empty if it has not.

    Raises:
        InputError, UnavailableError: it is there and cannot be read.
    """
    with storage_errors(file, "read"):
        try:
            return file.read_text()
        except FileNotFoundError:  # and not by `exists`, for which what storage fails to tell of is not there
            return ""


def cache_folder() -> Path:
    """Where commands keep for the next ones what takes long to make: `~/.cache/perfusion_jax`, or of XDG_CACHE_HOME.

    Raises:
        InputError: there is neither.
    """
    folder = at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if folder.startswith("~/"):  # as in a container whose user has no name
        raise InputError("this user has no home folder to keep files in: name a folder in XDG_CACHE_HOME")
    return Path(folder) / "perfusion_jax"


def entries(folder: epath.Path) -> list[epath.Path] | None:
    """What is in a folder, sorted; None if there is no such folder.

    Raises:
        InputError, UnavailableError: it cannot be read.
    """
    with storage_errors(folder, "read"):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):  # and not by `is_dir`, as in `read_text`
            return None


def subfolders(folder: epath.Path) -> list[epath.Path] | None:
    """What is in a folder but hidden ones and files, sorted; None if there is no such folder.

    Where storage does not say what something is, it is among them: what is read of it then tells.

    Raises:
        InputError, UnavailableError: it cannot be read.
    """
    inside = entries(folder)
    if inside is None:
        return None
    with storage_errors(folder, "read"):
        return [entry for entry in inside if not entry.name.startswith(".") and not entry.is_file()]


@contextmanager
def storage_errors(path: str | os.PathLike[str], done: str) -> Iterator[None]:
    """Within it, whatever storage raises becomes an error that says what could not be done, and whether it may later.

    Args:
        path: of a file or folder.
        done: `read`, `written` or `deleted`.

    Raises:
        InputError: it would be the same the next time.
        UnavailableError: it need not.
    """
    try:
        yield
    except (InputError, *_NOT_OF_STORAGE):
        raise
    except Exception as error:  # gcsfs raises what its backends meet
        if is_runtime_error(error):
            raise
        kind = InputError if is_lasting(error) else UnavailableError
        raise kind(f"{os.fspath(path)}: cannot be {done} ({error})") from error


def is_storage_error(error: BaseException) -> bool:
    """Whether an error is of storage, and not of what is in a file."""
    return isinstance(error, OSError) or f"{type(error).__module__}.".startswith(_BACKENDS)


def is_lasting(error: BaseException) -> bool:
    """Whether what storage raises would be the same the next time."""
    if isinstance(error, _LASTING) or getattr(error, "errno", None) in _LASTING_NUMBERS:
        return True
    return str(error).startswith("Forbidden")  # gcsfs says by its text alone that somebody has no right to something


def check_writable(folder: Path | epath.Path) -> None:
    """Makes a folder and sees that a file can be written in it, before work is done whose result goes there.

    A bucket has no folders to make, and may allow no file to be deleted again: it is only looked at.

    Raises:
        InputError, UnavailableError: it cannot.
    """
    with storage_errors(folder, "written"):
        if not is_local(folder):
            folder.exists()
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def writing(file: epath.Path) -> Iterator[Path]:
    """Gives a local path to write a large file to; it is whole, at `file`, when the context ends without an error.

    Raises:
        InputError, UnavailableError: it cannot be written.
    """
    if is_local(file):
        with replacing(Path(file)) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / file.name
        yield temporary
        with storage_errors(file, "written"), temporary.open("rb") as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, _COPIED_AT_ONCE)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives a temporary path beside `file`, and renames it to `file` when the context ends without an error.

    Raises:
        InputError, UnavailableError: it cannot be written.
    """
    with storage_errors(file, "written"):
        file.parent.mkdir(parents=True, exist_ok=True)
        # A name of any length that the file system allows leaves no room for more; and not by `tempfile`, whose files
        # nobody else can read: the system takes the umask off the mode, which no thread can then change in between.
        temporary = file.with_name(f".{file.name[:40]}.{secrets.token_hex(8)}")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file; none of them can be pickled.

    Raises:
        ValueError, EOFError, zipfile.BadZipFile: it is broken.
    """
    with io.BytesIO(data) as stream, np.load(stream, allow_pickle=False) as archive:
        return dict(archive)


def write_arrays(file: Path, **arrays: Any) -> None:
    """Writes arrays to a local .npz file, whole or not at all.

    Raises:
        InputError, UnavailableError: it cannot be written.
    """
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


@contextmanager
def locked(file: epath.Path, advice: str) -> Iterator[None]:
    """Holds a lock that no other process can take; the system lets go of it when this process ends, however it ends.

    A bucket has no locks, nor have some network file systems: there nothing is held, and whatever starts the jobs must
    not start two of them. (If it does, both compute the same concepts, and write the same files whole.)

    Args:
        file: is made with its folder, and stays.
        advice: what to do if another process holds it, for the message.

    Raises:
        InputError: another process holds it, or the folder cannot be written to.
        UnavailableError: storage fails.
    """
    if not is_local(file):
        yield
        return
    with ExitStack() as stack:
        with storage_errors(file, "written"):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(Path(file).open("a"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{file}: another job is at work here; wait for it, or {advice}") from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logging.warning("%s: no locks here (%s): see to it that no other job is at work", file, error.strerror)
        yield
