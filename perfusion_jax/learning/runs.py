"""Runs: one concept, or a table of them, from a config to finished concepts.

Concepts of a table are learnt in rounds of as many as fit; the pictures of the next round are prepared while one is
learnt. A finished concept is written at once, and a line of `report.jsonl` says so:

    {"name": "rex", "state": "done", "steps": 400, "seconds": 61.2, "chip_seconds": 7.7, "error": "",
     "row": "0f3a...", "exports": [], "image_similarity": ..., "text_similarity": ..., "prompt_precision": ...,
     "score": ...}

`state` is `done`, `diverged` (its loss was no longer finite) or `failed` (its folder or pictures cannot be used).
`seconds` is how long its round had taken by then, `chip_seconds` its share of the chips' time, at any moment that of
one among those that are not finished yet; both from the round's first step. `row` is a digest of what its line of the
table says.

The same command goes on inside a round that was interrupted (or begins it anew, on chips that it does not go with, or
does not fit any more), to the same concepts; does what is missing; tries failed concepts again; and leaves done and
diverged ones alone, and says so if their lines in the table are others now.
"""

import dataclasses
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, nullcontext
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from perfusion_jax.config import OVERRIDES, check, member_config
from perfusion_jax.data.table import PER_CONCEPT, Row, read_table
from perfusion_jax.learning.diagnostics import Diagnostics, Profiler
from perfusion_jax.learning.judges import name_judges
from perfusion_jax.learning.loop import Watch, learn_round
from perfusion_jax.learning.preparation import Prepared, prepare
from perfusion_jax.learning.progress import Bar
from perfusion_jax.learning.records import Records, report_line
from perfusion_jax.learning.report import Report
from perfusion_jax.learning.resources import Resources, load_resources
from perfusion_jax.learning.rounds import Member, Round, plan
from perfusion_jax.learning.scoring import check_validation, show_masks
from perfusion_jax.learning.workdir import CONCEPTS, LOCK, MASKS, ONE_BY_ONE, PROFILE, REPORT, begin, has_results
from perfusion_jax.pod import distributed
from perfusion_jax.pod.slots import slot_owners
from perfusion_jax.runtime.errors import InputError, Stopped, UnavailableError, out_of_memory
from perfusion_jax.runtime.files import entries, locked, storage_errors, write_bytes


class Session(NamedTuple):
    """How a run is watched, and told to stop.

    Attributes:
        diagnostics: what is asked for of them.
        stop: whether it is time to save and stop; None: when the process gets SIGTERM or Ctrl-C.
        bar: makes what shows the progress, with the arguments of `Bar`.
    """

    diagnostics: Diagnostics = Diagnostics()
    stop: Callable[[], bool] | None = None
    bar: Callable[..., Bar] = Bar


AT_A_TERMINAL = Session()
"""Nothing is asked for, and signals stop it."""


def train_one(config: ConfigDict, workdir: epath.Path, session: Session = AT_A_TERMINAL) -> epath.Path:
    """Learns the concept of a config, or goes on with it.

    Args:
        config: of one concept.
        workdir: where results go.
        session: how it is watched, and told to stop.

    Returns:
        The concept's file.

    Raises:
        InputError: the config or something it names cannot be used, another job is at work in the workdir, or the loss
            is no longer finite.
        UnavailableError: storage or the hub fails.
        Stopped: it was told to stop, and has saved.
    """
    check(config)
    row = Row(**{name: config[name] for name in PER_CONCEPT}, masks="", captions="", overrides={}, cells={}, where="")
    records = Records(workdir, workdir, report=None)
    with locked(workdir / LOCK, "take another --workdir"):
        config = name_judges(config, workdir)
        begin(config, workdir)
        member = Member(row, config)
        result = records.concept(member)
        if records.is_finished(member):
            print(f"finished already: {result}")
        else:
            _learn(config, records, [member], [member], session)
    return result


def train_fleet(
    config: ConfigDict,
    workdir: epath.Path,
    shard: tuple[int, int] = (0, 1),
    session: Session = AT_A_TERMINAL,
) -> None:
    """Learns what is missing of a table.

    Args:
        config: one that names `concepts` (`configs/fleet.py`).
        workdir: shared by all processes, and by all jobs that have a part of the table.
        shard: (I, N): every N-th concept from the I-th on. Each job keeps its report in `shard_I_of_N/`.
        session: how it is watched, and told to stop.

    Raises:
        InputError: the config, table or workdir cannot be used, or not one concept was learnt and there are no other
            shards.
        UnavailableError: storage fails.
        Stopped: it was told to stop, and has saved.
    """
    check(config)
    index, count = shard
    table = distributed.from_first(lambda: read_table(config.concepts, OVERRIDES)[index::count])
    rows = [Row(*fields) for fields in table]
    members = [Member(row, member_config(config, row)) for row in rows if not row.problem]
    folder = workdir / f"shard_{index}_of_{count}" if count > 1 else workdir
    with ExitStack() as stack:

        def take() -> None:
            _check_split(workdir, count)
            stack.enter_context(locked(folder / LOCK, "take another --workdir, or another --shard of it"))

        distributed.from_first(take)
        config = name_judges(config, folder)
        distributed.from_first(lambda: begin(config, folder))
        report = Report(folder / REPORT)
        broken = [row for row in rows if row.problem and not report.is_over(row.name)]
        report.add([report_line(row, "failed", error=row.problem) for row in broken])
        todo = [member for member in members if not report.is_over(member.name)]
        _warn_of_changed_rows(rows, report)
        if todo:
            _learn(config, Records(workdir, folder, report), members, todo, session)
    _summarise(rows, report, workdir, is_part=count > 1)


def _summarise(rows: Sequence[Row], report: Report, workdir: epath.Path, is_part: bool) -> None:
    """Says what has become of a fleet.

    Raises:
        InputError: not one concept was learnt, and the table was not split.
    """
    lines = [report.lines[row.name] for row in rows]
    counts = {state: sum(line["state"] == state for line in lines) for state in ("done", "diverged", "failed")}
    summary = ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "none in this shard"
    if distributed.is_first():
        print(f"{len(lines)} concept{'' if len(lines) == 1 else 's'}: {summary}; {workdir / CONCEPTS}, {report.file}")
    if counts["done"] == len(lines):
        return
    wrong = next(line for line in lines if line["state"] != "done")
    message = (
        f"{len(lines) - counts['done']} of {len(lines)} concepts were not learnt, such as {wrong['name']}: "
        f"{wrong['error']}; all are in {report.file}. The same command tries the failed ones again"
    )
    # What starts jobs again when they fail could not mend a concept; and one shard must not stop the others.
    if not counts["done"] and not is_part:
        raise InputError(message)
    if distributed.is_first():
        print(f"warning: {message}", file=sys.stderr)


def _warn_of_changed_rows(rows: Sequence[Row], report: Report) -> None:
    over = [row for row in rows if report.is_over(row.name) and not row.problem]
    changed = [row for row in over if report.lines[row.name].get("row", row.digest) != row.digest]
    if changed and distributed.is_first():
        print(
            f"warning: {changed[0].where}: {len(changed)} of the concepts that are over, such as "
            f"{changed[0].name}, were learnt by other lines of the table and stay as they are; delete their lines of "
            f"{report.file} to learn them anew",
            file=sys.stderr,
        )


def _check_split(workdir: epath.Path, count: int) -> None:
    """Makes sure that the table was not split into another number of shards before: they would overlap.

    Raises:
        InputError: it was.
        UnavailableError: storage fails.
    """
    found = [(folder, re.fullmatch(r"shard_\d+_of_(\d+)", folder.name)) for folder in entries(workdir) or ()]
    others = [folder for folder, match in found if match and int(match[1]) != count]
    if count > 1:
        others.append(workdir)
    others = [folder for folder in others if has_results(folder)]
    if others:
        raise InputError(
            f"--shard: {others[0]} is of another split of the table; keep the number of shards, or take another "
            "--workdir"
        )


def _learn(
    config: ConfigDict,
    records: Records,
    members: list[Member],
    todo: list[Member],
    session: Session,
) -> None:
    """Learns members round by round.

    Raises:
        Stopped: it was told to stop, and has saved.
        InputError, UnavailableError: something cannot be written, or the only concept cannot be learnt.
        jax.errors.JaxRuntimeError: a device fails, or its memory does not suffice.
    """
    resources = load_resources(config)
    if config.validation_prompts:
        check_validation(config, resources.base.model)
    rounds = plan(resources, members, todo, records.read_open_round())
    steps = sum(member.config.steps for member in todo)
    name = config.name if records.alone else "fleet"
    with (
        distributed.stopping() if session.stop is None else nullcontext(session.stop) as stop,
        ThreadPoolExecutor(1, "prepare") as executor,
        closing(Profiler(str(records.folder / PROFILE), session.diagnostics.profile)) as profiler,
        closing(session.bar(steps, len(todo), name, shown=distributed.is_first())) as bar,
    ):
        watch = Watch(bar=bar, profiler=profiler, debug_nans=session.diagnostics.debug_nans)
        job = _Job(resources=resources, records=records, watch=watch, stop=stop, executor=executor)
        try:
            job.learn(rounds)
        finally:
            job.cancelled.set()


@dataclasses.dataclass(kw_only=True)
class _Job:
    """Learns rounds one after the other, while a thread prepares the next one.

    Attributes:
        resources, records, watch, stop: as for `loop.learn_round`.
        executor: its one thread prepares.
        cancelled: set when what it prepares is not needed any more.
    """

    resources: Resources
    records: Records
    watch: Watch
    stop: Callable[[], bool]
    executor: ThreadPoolExecutor
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)

    def learn(self, rounds: Sequence[Round]) -> None:
        """Learns all rounds; errors as for `_learn`."""
        one_by_one = distributed.from_first(self._is_marked)
        upcoming: Future[Prepared] | None = None
        for number, current in enumerate(rounds):
            self.watch.bar.say("preparing pictures")
            beside_steps = upcoming is not None
            upcoming = upcoming or self._submit(current)
            self._wait(upcoming)
            if beside_steps and _lacks_memory(upcoming.exception()):
                upcoming = self._submit(current)  # which lets go of the failed one, and of the arrays that it holds
                self._wait(upcoming)
            prepared = upcoming.result()
            upcoming = None if one_by_one or number + 1 == len(rounds) else self._submit(rounds[number + 1])
            left = current.without(_report_failures(current, prepared, self.records))
            self.watch.bar.skip(sum(current.limits) - sum(left.limits))
            if self.records.alone:
                masks = np.asarray(prepared.examples[0].masks[:, 0])
                show_masks(self.records.workdir / MASKS, prepared.pixels[0], masks)
            self._learn_round(left, prepared, upcoming)

    @property
    def _marker(self) -> epath.Path:
        """There if memory does not suffice to prepare a round beside another, as a job of many processes has found."""
        return self.records.folder / ONE_BY_ONE

    def _is_marked(self) -> bool:
        with storage_errors(self._marker, "read"):
            return self._marker.exists()

    def _submit(self, current: Round) -> "Future[Prepared]":
        held, _ = slot_owners(self.resources.mesh, len(current.members))
        return self.executor.submit(prepare, self.resources, current, held, self.cancelled)

    def _learn_round(self, current: Round, prepared: Prepared, upcoming: "Future[Prepared] | None") -> None:
        """Learns a round; again from its last checkpoint, if memory did not suffice beside the preparation of another.

        Raises:
            UnavailableError: it did not, in a job of many processes: the next one will prepare rounds one by one.
        """
        if not any(current.members):
            return
        bar = self.watch.bar
        position = bar.position
        bar.say("compiling")
        try:
            learn_round(self.resources, current, prepared, self.records, self.watch, self.stop)
            return
        except jax.errors.JaxRuntimeError as error:
            reason = out_of_memory(error)
            if upcoming is None or not reason:
                raise
            if jax.process_count() > 1:  # one cannot go back: the others wait for it, in the step that failed
                write_bytes(self._marker, b"")
                raise UnavailableError(
                    f"memory does not suffice to prepare a round while another is learnt ({reason}); the same command "
                    "does one after the other"
                ) from error
            logging.warning("%s; a round is learnt again from its last checkpoint, with nothing beside it", reason)
        # Not in the handler, where the error still holds the arrays of what failed.
        self._wait(upcoming)
        over = self.records.over(current)
        bar.return_to(position + sum(current.limits[slot] for slot in over))
        left = current.without(over)
        if any(left.members):
            learn_round(self.resources, left, prepared, self.records, self.watch, self.stop)

    def _wait(self, future: "Future[Prepared]") -> None:
        """Waits for a future to be done; a process that is alone can be stopped meanwhile.

        Raises:
            Stopped: it was.
        """
        if jax.process_count() > 1:
            wait([future])
        while not wait([future], timeout=0.02).done:
            if self.stop():
                raise Stopped


def _lacks_memory(error: BaseException | None) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(out_of_memory(error))


def _report_failures(current: Round, prepared: Prepared, records: Records) -> set[int]:
    """Reports the concepts of a round that cannot be learnt, and returns their slots.

    Raises:
        Exception: what is wrong with the only concept of a run.
    """
    if records.alone:
        for error in prepared.failures.values():
            raise error
    problems = []
    for slot, error in prepared.failures.items():
        problem = str(error)
        if not isinstance(error, InputError):
            member = current.members[slot]
            assert member is not None
            problem = f"{member.row.pictures}: {type(error).__name__}: {error}"
            logging.error("%s", problem, exc_info=error)  # a fault of ours, or of a library
        problems.append((slot, problem))
    failed = [(current.members[slot], slot, problem) for part in distributed.gather(problems) for slot, problem in part]
    records.add([report_line(member.row, "failed", error=problem) for member, _, problem in failed if member])
    return {slot for _, slot, _ in failed}
