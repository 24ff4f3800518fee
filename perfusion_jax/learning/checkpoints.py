"""Training state on disk: Orbax checkpoints, asynchronous, the last few kept."""

import asyncio
import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import LogRecord
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from etils.epath.gpath import PosixGPath

from perfusion_jax.pod import distributed
from perfusion_jax.runtime.errors import InputError, UnavailableError, is_runtime_error
from perfusion_jax.runtime.files import entries, is_lasting, is_local, is_storage_error, storage_errors

# How TensorStore's errors begin that are of storage; those of broken bytes are DATA_LOSS, OUT_OF_RANGE, and others.
_PASSING = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN): "
)
_LASTING = "PERMISSION_DENIED: "


def _cause_of(error: Exception, folder: epath.Path) -> str:
    """Why a checkpoint cannot be read: its `content`, `storage`, or storage `for now`."""
    for one in (error, error.__cause__):
        if one is None:
            continue
        if _PASSING.match(str(one)):
            return "for now"
        if str(one).startswith(_LASTING):
            return "storage"
        if is_storage_error(one) and not isinstance(one, FileNotFoundError):
            return "storage" if is_lasting(one) else "for now"
    if isinstance(error, FileNotFoundError):  # or so it is said of what cannot be looked at
        try:
            entries(folder)
        except InputError as other:
            return "for now" if isinstance(other, UnavailableError) else "storage"
    return "content"


class _Manager(ocp.CheckpointManager):
    """Orbax's, that does not ask JAX whether a preempted job is to stop: `distributed.stopping` does.

    JAX says yes to one call alone, the same on all hosts; a question of Orbax's in between, with a count of its own,
    would take that answer.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _Folder(PosixGPath):
    """A path whose own name is no pattern.

    Orbax finds the parts of a checkpoint by `glob`, and epath takes the brackets in the names of all folders above for
    some of the pattern's.
    """

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return epath.Path(glob.escape(os.fspath(self))).glob(pattern)


def _check_name(folder: epath.Path) -> None:
    """Makes sure that TensorStore can write to a folder.

    Raises:
        InputError: it would write to another one, or to none.
    """
    name = os.path.abspath(folder)
    if is_local(folder) and ("\\" in name or any("\ud800" <= letter <= "\udfff" for letter in name)):
        raise InputError(f"{name}: with a backslash or broken UTF-8 in its name nothing can be kept in it: rename it")


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that lets its tasks end before it closes.

    Where one array of a checkpoint cannot be read, Orbax closes the loop at once. TensorStore's threads then come back
    with the others, and print a traceback for each: "Event loop is closed".
    """

    def close(self) -> None:
        if not self.is_closed() and (left := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


def _not_of_orbax(record: LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it Orbax prints nothing of what it cannot read: whoever asked says so in one line."""
    policy, logger = asyncio.get_event_loop_policy(), logging.get_absl_logger()
    asyncio.set_event_loop_policy(_PatientLoops())
    logger.addFilter(_not_of_orbax)  # and not by the verbosity, which is of other threads as well
    try:
        yield
    finally:
        logger.removeFilter(_not_of_orbax)
        asyncio.set_event_loop_policy(policy)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: local or in a bucket; made if it is not there.
        keep: how many of the newest are kept.

    Raises:
        InputError, UnavailableError: the folder cannot be written to.
    """

    def __init__(self, folder: str | epath.Path, keep: int):
        self.folder = epath.Path(folder)
        _check_name(self.folder)
        with storage_errors(self.folder, "written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            # `resolve` takes the name of a bucket for a folder's.
            self.folder = _Folder(self.folder.resolve() if is_local(self.folder) else self.folder)
            with _quiet():
                self._manager = _Manager(self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def save(self, step: int, state: Any) -> None:
        """Begins to write `state`, a tree of arrays; returns as soon as it has been copied from the devices.

        Raises:
            UnavailableError: it, or the one before it, cannot be written.
        """
        with self._write_errors():
            if not self._manager.save(step, args=ocp.args.StandardSave(state)):
                raise ValueError(f"Orbax left step {step} out, after step {self._manager.latest_step()}")

    def restore(self, like: Any, warn: Callable[[str], None]) -> tuple[Any, int] | None:
        """Reads the newest checkpoint that is whole; newer ones that are not are renamed to `STEP.unreadable`.

        Args:
            like: a tree of arrays of the shapes and dtypes to expect.
            warn: called with a line about each checkpoint that cannot be read.

        Returns:
            (state, step), or None if there is no checkpoint.

        Raises:
            InputError: there are checkpoints, and none of them can be read.
            InputError, UnavailableError: storage fails, or tells processes different things; nothing is renamed.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = sorted(self._manager.all_steps(), reverse=True)
        if any(seen != steps for seen in distributed.gather(steps)):
            raise UnavailableError(f"{self.folder}: not all processes see the same checkpoints in it")
        broken = []
        for step in steps:
            folder = self.folder / str(step) / "default"
            problem = cause = ""
            try:
                # Not by the manager, which ends with a barrier: a process that cannot read would not come to it.
                with _quiet():
                    state = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(shapes))
            except Exception as error:  # Orbax raises whatever the broken bytes lead it and its backends to
                if is_runtime_error(error):
                    raise
                problem = type(error).__name__
                cause = _cause_of(error, folder)
            # What one process cannot read, none takes.
            if problems := dict(pair for pair in distributed.gather([cause, problem]) if pair[0]):
                for cause, kind in (("for now", UnavailableError), ("storage", InputError)):
                    if cause in problems:
                        raise kind(f"{self.folder / str(step)}: cannot be read ({problems[cause]})")
                if distributed.is_first():
                    warn(f"{self.folder / str(step)}: cannot be read ({problems['content']}); taking the one before")
                broken.append(step)
                continue
            if distributed.is_first():
                for newer in broken:
                    (self.folder / str(newer)).rename(self.folder / f"{newer}.unreadable")
            distributed.wait_for_all("broken checkpoints are out of the way")
            self._manager.reload()
            return state, step
        if steps:
            raise InputError(
                f"{self.folder}: none of the checkpoints {steps} can be read; delete the folder to start anew"
            )
        return None

    def close(self) -> None:
        """Waits until all that was saved is on disk, then lets go of the folder.

        Raises:
            UnavailableError: it could not be written, now or since the last call.
        """
        with self._write_errors():
            self._manager.close()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax hands on whatever its threads and backends met
            if is_runtime_error(error):
                raise
            raise UnavailableError(
                f"{self.folder}: a checkpoint cannot be written ({error}); older ones are kept"
            ) from error
