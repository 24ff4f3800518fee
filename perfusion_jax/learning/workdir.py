"""What a run keeps in its workdir, checkpoints apart: its config, logs, pictures and concepts."""

import json
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from perfusion_jax.base_model import BaseModel
from perfusion_jax.config import check_same, parse_saved, to_json
from perfusion_jax.formats.concept_file import ConceptCard
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import entries, is_local, read_text, storage_errors, write_bytes

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
CHECKPOINTS = "checkpoints"
CONCEPTS = "concepts"
SAMPLES = "samples"
EXPORTS = "exports"
MASKS = "masks.png"  # of a run of one concept
FINISHED = "finished.json"  # likewise
REPORT = "report.jsonl"  # of a fleet
OPEN_ROUND = "round.json"  # likewise
ONE_BY_ONE = "prepare_one_by_one"  # likewise
COMPILED = "compiled"  # likewise
LOCK = "lock"
WRITTEN = (
    *(CONFIG, METRICS, TENSORBOARD, PROFILE, CHECKPOINTS, CONCEPTS, SAMPLES, EXPORTS, MASKS, FINISHED),
    *(REPORT, OPEN_ROUND, ONE_BY_ONE, COMPILED, LOCK),
)
"""All that a run writes in its workdir."""

# What a run would overwrite, cut short or delete.
_REPLACED = (METRICS, CHECKPOINTS, MASKS, FINISHED, REPORT, OPEN_ROUND)


def concept_file(workdir: epath.Path, name: str) -> epath.Path:
    """Where a run writes the concept of that name."""
    return workdir / CONCEPTS / f"{name}.safetensors"


def begin(config: ConfigDict, workdir: epath.Path) -> None:
    """Makes the workdir and saves the config in it; once there are results, sees that it is the same config.

    Raises:
        InputError: it is another config, or the workdir is of something else, or cannot be used.
        UnavailableError: storage fails.
    """
    file = workdir / CONFIG
    text = to_json(config)
    with storage_errors(workdir, "written"):
        workdir.mkdir(parents=True, exist_ok=True)
    before = read_text(file)
    if before:
        parse_saved(before, file)
    else:
        _check_unused(workdir, config.name)
    if before and has_results(workdir):
        check_same(config, before, file)
    if before != text:
        write_bytes(file, text.encode())


def _check_unused(workdir: epath.Path, name: str) -> None:
    """Sees that nothing in a folder without a config would be lost to a run.

    Raises:
        InputError: something would.
        UnavailableError: storage fails.
    """
    there = {entry.name for entry in entries(workdir) or ()}
    files = [workdir / place for place in _REPLACED if place in there]
    if concept_file(workdir, name) in (entries(workdir / CONCEPTS) or ()):
        files.append(concept_file(workdir, name))
    if files:
        raise InputError(
            f"{files[0]}: is there without the {CONFIG} of a run, and a run would replace it; take another --workdir"
        )


def saved_config(workdir: epath.Path) -> dict[str, Any]:
    """Returns the config of the run that has learnt something in a workdir; empty if there is none that can be read.

    Raises:
        InputError, UnavailableError: storage fails.
    """
    if not has_results(workdir):
        return {}
    try:
        before = json.loads(read_text(workdir / CONFIG))
    except json.JSONDecodeError:  # `begin` refuses it
        return {}
    return before if isinstance(before, dict) else {}


def has_results(workdir: epath.Path) -> bool:
    """Whether something was learnt in a workdir.

    Raises:
        InputError, UnavailableError: it cannot be read.
    """
    return any(read_text(workdir / name) for name in (METRICS, REPORT))


class Log:
    """metrics.jsonl and TensorBoard events of a run.

    Args:
        workdir: where.
        step: the step that the run goes on from: what was logged after it is dropped, and will be logged again.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self._file = workdir / METRICS
        # The whole file is written each time; a bucket takes it about once a second.
        self._pause = 1 if is_local(workdir) else 30
        self._flushed = 0.0
        lines = read_text(self._file).splitlines()
        self._lines = [line for line in lines if _step_of(line) <= step]
        self._write()
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and the run then waits for ever.
        with self._events_errors():
            (workdir / TENSORBOARD).mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(workdir / TENSORBOARD / "events"))
        # Tells TensorBoard to forget what an earlier run logged after this step.
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), step)

    def __call__(self, step: int, name: str = "", **metrics: float) -> None:
        """Logs the metrics of a step; `name` is of the concept that they are of, if they are not of all."""
        self._lines.append(json.dumps({"step": step, **({"name": name} if name else {}), **metrics}))
        for metric, value in metrics.items():
            self._add(Event(summary=summary.scalar(_tag(metric, name), value)), step)
        if time.monotonic() - self._flushed >= self._pause:
            self.flush()

    def picture(self, step: int, pixels: np.ndarray, name: str = "") -> None:
        """Logs a picture, uint8 [height, width, 3], of the concept of that name."""
        self._add(Event(summary=summary.image(_tag("samples", name), pixels, dataformats="HWC")), step)

    def close(self) -> None:
        """Writes what is left.

        Raises:
            InputError, UnavailableError: it cannot be written.
        """
        self.flush()
        with self._events_errors():
            self._events.close()

    def _add(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        with self._events_errors():
            self._events.write_event(event)

    def flush(self) -> None:
        """Writes what has been logged so far; in a bucket it would otherwise wait for half a minute.

        Raises:
            InputError, UnavailableError: it cannot be written.
        """
        self._write()
        with self._events_errors():
            self._events.flush()
        self._flushed = time.monotonic()

    def _events_errors(self) -> AbstractContextManager[None]:
        return storage_errors(self._file.parent / TENSORBOARD, "written")

    def _write(self) -> None:
        write_bytes(self._file, "".join(f"{line}\n" for line in self._lines).encode())


def _tag(what: str, name: str) -> str:
    return f"{what}/{name}" if name else what


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # cut off by a kill


def phrase(config: ConfigDict, placeholder: str) -> str:
    """What prompts call a concept: its placeholder, and its kind after it if the config says so."""
    return f"{placeholder} {config.super_category}" if config.class_noun else placeholder


def make_card(config: ConfigDict, base: BaseModel, step: int) -> ConceptCard:
    """What a concept's file says of it, learnt for a number of optimiser steps."""
    return ConceptCard(
        name=config.name,
        super_category=config.super_category,
        base_model=config.base,
        fingerprint=base.fingerprint,
        bias=config.sampling_bias,
        temperature=config.sampling_temperature,
        guidance_scale=config.guidance_scale,
        step=step,
        licence=config.licence,
        method=config.method,
        class_noun=config.class_noun,
        lock_keys=config.lock_keys,
    )
