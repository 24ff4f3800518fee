"""Many processes as one job: finding each other, telling each other small things, and stopping together."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError, UnavailableError, is_runtime_error, out_of_memory

# A process that says nothing for so long counts as dead, and the others end: seconds.
HEARTBEAT = 60
# A process that ends waits so long for the others to end as well; then it counts as dead to them: seconds.
SHUTDOWN = 30


@contextmanager
def job(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Joins this process to a job, before anything is computed; within it, the loss of another process ends this one.

    Args:
        coordinator_address: HOST:PORT of process 0; left out, JAX asks the cluster (TPU pods, Slurm, Kubernetes, MPI).
        num_processes, process_id: likewise.

    Raises:
        UnavailableError: the processes do not find each other.
        InputError: it is not said where they are.
        SystemExit: they did, and another one is lost; as after an interruption, the same command goes on.
    """
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (RuntimeError, ValueError) as error:
        # Of a slice that is started again, one host may be late.
        kind = InputError if isinstance(error, ValueError) else UnavailableError
        raise kind(
            f"--distributed: this process cannot join the others ({error}): start all of them at about the same time, "
            "and where JAX cannot tell by itself give --coordinator_address, --num_processes and --process_id"
        ) from error
    if jax.process_count() == 1:
        # Nobody would ask for the SIGTERM that JAX has begun to catch.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not is_runtime_error(error) or jax.process_count() == 1 or out_of_memory(error):
            raise
        raise SystemExit(
            f"error: process {jax.process_index()} cannot go on with the other {jax.process_count() - 1} ({error}); if "
            "one of them has ended, its output says why. The same command goes on where they were"
        ) from error


def is_first() -> bool:
    """Whether this is the process that prints and writes what the job has in common."""
    return jax.process_index() == 0


def gather(mine: Any) -> list[Any]:
    """What each process gives, in their order, on all of them: anything that JSON takes. All must call it."""
    if jax.process_count() == 1:
        return [mine]
    data = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, on all of them: anything that JSON takes. All must call it.

    Files that all go by are read like this: others may see them later, or not, and would do other things.

    Raises:
        InputError, UnavailableError: on all of them, what `make` raises on the first.
    """
    if jax.process_count() == 1:
        return make()
    made, problem, passing = None, "", False
    if is_first():
        try:
            made = make()
        except InputError as error:
            problem, passing = str(error), isinstance(error, UnavailableError)
    data = np.frombuffer(json.dumps([made, problem, passing]).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    received = multihost_utils.broadcast_one_to_all(data if is_first() else np.zeros(length, np.uint8))
    made, problem, passing = json.loads(bytes(received))
    if problem:
        raise (UnavailableError if passing else InputError)(problem)
    return made


def array_of_first(array: jax.Array) -> jax.Array:
    """The array that the first process gives, on all of them; the others give one of its shape. All must call it."""
    if jax.process_count() == 1:
        return array
    return jnp.asarray(multihost_utils.broadcast_one_to_all(array))


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM interrupts nothing; the function it gives says whether it is time to save and stop.

    With many processes a SIGTERM to one of them stops all, at the same call: each must call it as often as the others.
    """
    if jax.process_count() == 1:
        with command_line.stopping() as asked:
            yield asked
        return
    calls = 0
    asked_before = False

    def reached() -> bool:
        nonlocal calls, asked_before
        calls += 1
        asked_before = asked_before or multihost_utils.reached_preemption_sync_point(calls)
        return asked_before

    yield reached
