"""Learns a table of concepts, many at once; `perfusion_jax.train` comes here when the config has `concepts`.

    python -m perfusion_jax.train --config configs/fleet.py --config.concepts=concepts.csv --workdir runs/fleet

Concepts are learnt in rounds of as many as fit; the pictures of the next round are prepared while one is learnt. A
finished concept is written at once, and a line of `report.jsonl` says so:

    {"name": "rex", "state": "done", "steps": 400, "seconds": 61.2, "chip_seconds": 7.7, "error": "",
     "row": "0f3a...", "image_similarity": ..., "text_similarity": ..., "prompt_precision": ..., "score": ...}

`state` is `done`, `diverged` (its loss was no longer finite) or `failed` (its folder or pictures cannot be used).
`seconds` is how long its round had taken by then, `chip_seconds` its share of the chips' time, at any moment that of
one among those that are not finished yet; both from the round's first step. `row` is a digest of what its line of the
table says.

The same command goes on inside a round that was interrupted (or begins it anew, on chips that it does not go with, or
does not fit any more), to the same concepts; does what is missing; tries failed concepts again; and leaves done and
diverged ones alone, and says so if their lines in the table are others now.
"""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from perfusion_jax import distributed, parallel
from perfusion_jax.checkpoints import Checkpoints
from perfusion_jax.config import OVERRIDES, check, member_config
from perfusion_jax.data.table import Row, read_table
from perfusion_jax.errors import InputError, out_of_memory
from perfusion_jax.files import locked, storage_errors
from perfusion_jax.fleet_members import PICTURES_STEP, Fleet, Member, Prepared, Round, load_fleet, plan, prepare
from perfusion_jax.fleet_report import OpenRound, Report
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.hlo_report import chips_of
from perfusion_jax.training import Learning
from perfusion_jax.validation import Validation
from perfusion_jax.workdir import Log, begin, has_results, write_concept

# Concepts that each process finishes between two looks at whether to stop.
FINISHED_AT_ONCE = 8
# Steps that are begun before the devices have taken those before them: enough to keep them busy, and few enough not to
# wait for long when the machine is about to be taken away.
AHEAD = 2


def train_fleet(config: ConfigDict, workdir: epath.Path, shard: tuple[int, int] = (0, 1)) -> None:
    """Learns what is missing of a table.

    Args:
        config: the fleet's (`configs/fleet.py`).
        workdir: shared by all processes, and by all jobs that have a part of the table.
        shard: (I, N): every N-th concept from the I-th on. Each job keeps its report in `shard_I_of_N/`.

    Raises:
        InputError: the config, table or workdir cannot be used, or not one concept was learnt and there are no other
            shards.
        UnavailableError: storage fails.
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
            stack.enter_context(locked(folder / "lock", "take another --workdir, or another --shard of it"))
            begin(config, folder)

        distributed.from_first(take)
        report = Report(folder / "report.jsonl")
        broken = [row for row in rows if row.problem and not report.is_over(row.name)]
        report.add([_line(row, "failed", error=row.problem) for row in broken])
        todo = [member for member in members if not report.is_over(member.name)]
        _warn_of_changed_rows(rows, report)
        if todo:
            _learn(config, workdir, folder, members, todo, report)
    lines = [report.lines[row.name] for row in rows]
    counts = {state: sum(line["state"] == state for line in lines) for state in ("done", "diverged", "failed")}
    summary = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    if distributed.is_first():
        print(f"{len(lines)} concept{'s' if len(lines) > 1 else ''}: {summary}; {workdir / 'concepts'}, {report.file}")
    if counts["done"] == len(lines):
        return
    wrong = next(line for line in lines if line["state"] != "done")
    message = (
        f"{len(lines) - counts['done']} of {len(lines)} concepts were not learnt, such as {wrong['name']}: "
        f"{wrong['error']}; all are in {report.file}. The same command tries the failed ones again"
    )
    # What starts jobs again when they fail could not mend a concept; and one shard must not stop the others.
    if not counts["done"] and count == 1:
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
    with storage_errors(workdir, "read"):
        others = [folder for folder in workdir.glob("shard_*_of_*") if not folder.name.endswith(f"_of_{count}")]
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
    workdir: epath.Path,
    folder: epath.Path,
    members: list[Member],
    todo: list[Member],
    report: Report,
) -> None:
    """Learns members round by round, the next round being prepared by a thread.

    Raises:
        KeyboardInterrupt: it was told to stop, and has saved.
        InputError, UnavailableError: something cannot be written.
    """
    fleet = load_fleet(config)
    rounds = plan(fleet, members, todo, OpenRound.read(folder / "round.json"))
    steps = sum(member.config.steps for member in todo)
    cancelled = threading.Event()
    with (
        distributed.stopping() as stop,
        ThreadPoolExecutor(1, "prepare") as executor,
        tqdm(total=steps, unit="step", desc="fleet", disable=not distributed.is_first()) as bar,
    ):

        def skip(left_out: int) -> None:  # steps that are not taken in this run do not count for its rate
            if not bar.disable:
                bar.n += left_out
                bar.initial += left_out
                bar.last_print_n += left_out
                bar.refresh()

        def advance(taken: int) -> None:
            bar.update(taken)
            rate = bar.format_dict["rate"]
            bar.set_postfix_str(f"{3600 * rate * len(todo) / steps:.0f} concepts/h" if rate else "", refresh=False)

        def submit(current: Round) -> "Future[Prepared]":
            held, _ = parallel.slot_owners(fleet.mesh, len(current.members))
            return executor.submit(prepare, fleet, current, held, cancelled)

        try:
            upcoming = submit(rounds[0])
            for number, current in enumerate(rounds):
                bar.set_postfix_str("preparing pictures")
                prepared = None
                try:
                    prepared = _result(upcoming, stop)
                except jax.errors.JaxRuntimeError as error:
                    if number == 0 or not out_of_memory(error):
                        raise
                if prepared is None:  # not in the handler, where the error still holds the arrays of what failed
                    upcoming = submit(current)  # the step of the round before was in memory as well; now it is not
                    prepared = _result(upcoming, stop)
                if number + 1 < len(rounds):
                    upcoming = submit(rounds[number + 1])
                failures = {slot: error for part in distributed.gather(prepared.failures) for slot, error in part}
                failed = [(current.members[slot], error) for slot, error in failures.items()]
                report.add([_line(member.row, "failed", error=error) for member, error in failed if member])
                left = current.without(failures)
                skip(sum(current.limits) - sum(left.limits))
                if any(left.members):
                    bar.set_postfix_str("compiling")
                    _learn_round(_RoundRun(fleet, left, prepared, workdir, folder, report, advance, skip), stop)
        finally:
            cancelled.set()


def _result(future: "Future[Prepared]", stop: Callable[[], bool]) -> Prepared:
    """Waits for a round to be prepared; a process that is alone can be stopped meanwhile."""
    while jax.process_count() == 1 and not future.done():
        if stop():
            raise KeyboardInterrupt
        time.sleep(0.02)
    return future.result()


def _line(row: Row, state: str, **facts: Any) -> dict[str, Any]:
    """A concept's line of the report."""
    line = {"name": row.name, "state": state, "steps": 0, "seconds": 0.0, "chip_seconds": 0.0, "error": ""}
    return line | {"row": row.digest} | facts


@dataclasses.dataclass
class _RoundRun:
    """What a round is learnt with."""

    fleet: Fleet
    current: Round
    prepared: Prepared
    workdir: epath.Path
    folder: epath.Path
    report: Report
    advance: Callable[[int], None]
    skip: Callable[[int], None]


def _learn_round(run: _RoundRun, stop: Callable[[], bool]) -> None:
    """Takes the steps of a round that are left; each concept is written when it has taken its own.

    Raises:
        KeyboardInterrupt: it was told to stop, and has saved.
        InputError, UnavailableError: something cannot be written.
    """
    fleet, current, config = run.fleet, run.current, run.fleet.config
    slots, limits = len(current.members), current.limits
    file = run.folder / "round.json"
    opened = OpenRound.read(file)
    identities = [member.identity if member else None for member in current.members]
    # Concepts of this round that were finished before it was interrupted, or that failed, have no slot now.
    goes_on = len(opened.members) == slots and all(a == b for a, b in zip(identities, opened.members, strict=True) if a)
    if not goes_on:
        opened = OpenRound(steps_before=opened.steps_before)
    most = max((len(examples.mean) for examples in run.prepared.examples.values()), default=1)
    most = max(opened.pictures, *distributed.gather(most))
    # Who has lost its slot stands still from here on, and so must not come back to it.
    opened = dataclasses.replace(opened, members=identities, pictures=-(-most // PICTURES_STEP) * PICTURES_STEP)
    if distributed.is_first() and not goes_on:
        with storage_errors(run.folder / "checkpoints", "deleted"):
            (run.folder / "checkpoints").rmtree(missing_ok=True)
    opened.write(file)
    distributed.wait_for_all("round")

    members, learning, step_arguments = _stack(run, opened.pictures)
    compiled = fleet.compiled(current.settings, slots, *step_arguments)
    _, owned = parallel.slot_owners(fleet.mesh, slots)
    waiting = [slot for slot, limit in enumerate(limits) if limit]

    with ExitStack() as stack:
        checkpoints = stack.enter_context(closing(Checkpoints(run.folder / "checkpoints", config.keep_checkpoints)))
        restored = checkpoints.restore(learning, logging.warning)
        now = 0
        if restored is not None:
            learning, now = restored
        saved = now
        run.skip(sum(min(now, limits[slot]) for slot in waiting))
        log = None
        if distributed.is_first():
            log = stack.enter_context(closing(Log(run.folder, opened.steps_before + now)))
        started = time.monotonic() - opened.seconds
        losses: list[jax.Array] = []
        unread: list[tuple[int, list[jax.Array]]] = []

        def charge() -> None:
            """Shares the time since the last call out among those that are not finished."""
            nonlocal opened
            seconds = time.monotonic() - started
            share = (seconds - opened.seconds) * chips_of(fleet.mesh) / len(waiting)
            opened = dataclasses.replace(opened, seconds=seconds, chip_seconds=opened.chip_seconds + share)

        def save() -> None:
            nonlocal saved, losses
            if now > saved:
                # Steps that a checkpoint spares the next start are logged before it.
                unread.append((now, losses))
                losses = []
                _log_losses(unread, 0, log, opened.steps_before)
                if log is not None:
                    log.flush()
                checkpoints.save(now, learning)
                charge()
                opened.write(file)
                saved = now

        while waiting:
            due = [slot for slot in waiting if limits[slot] <= now]
            if stop():
                save()
                raise KeyboardInterrupt
            if due:
                save()
                charge()
                mine = [slot for slot in due if slot in owned][:FINISHED_AT_ONCE]
                lines = _finish(run, learning, mine, opened)
                parts = distributed.gather([mine, lines])
                run.report.add([line for _, part in parts for line in part])
                over = {slot for part, _ in parts for slot in part}
                waiting = [slot for slot in waiting if slot not in over]
                continue
            learning, loss = compiled(fleet.params, fleet.metric, members, learning)
            now += 1
            losses.append(loss)
            if len(losses) > AHEAD:
                losses[-1 - AHEAD].block_until_ready()
            run.advance(sum(now <= limits[slot] for slot in waiting))
            if now % config.log_every == 0:
                unread.append((now, losses))
                losses = []
                # The newest losses are read one time later: they may still be on their way while the devices work on.
                _log_losses(unread, 1, log, opened.steps_before)
            if now % config.checkpoint_every == 0:
                save()
        # Nothing is left of the round but its last checkpoint, which nobody needs.
        OpenRound(steps_before=opened.steps_before + now).write(file)
    distributed.wait_for_all("round is over")


def _stack(run: _RoundRun, pictures: int) -> tuple[parallel.Members, Learning, tuple[int, int, int]]:
    """The round's arrays over the mesh, and (pictures, prompts, side) that they are padded to."""
    fleet, current, prepared = run.fleet, run.current, run.prepared
    side = fleet.side_of(next(member.config for member in current.members if member))
    shape = (pictures, len(fleet.config.templates), side)
    rows = {
        slot: (
            (parallel.pad_pictures(examples, pictures), prepared.keys[slot], np.int32(current.limits[slot])),
            prepared.learning[slot],
        )
        for slot, examples in prepared.examples.items()
    }
    shapes = parallel.member_shapes(fleet.base, current.settings, *shape)
    members, learning = parallel.stack_members(rows, shapes, len(current.members), fleet.mesh)
    return members, learning, shape


def _log_losses(unread: list[tuple[int, list[jax.Array]]], left: int, log: Log | None, before: int) -> None:
    """Logs mean losses over the members of this process that still learn, oldest first; `left` entries stay."""
    while len(unread) > left:
        step, losses = unread.pop(0)
        if not losses:
            continue
        # Along data and fsdp, devices hold the same members.
        parts = [{str(part.index): part.data for part in loss.addressable_shards} for loss in losses]
        values = np.stack([np.concatenate([np.asarray(part) for part in loss.values()]) for loss in parts])
        finite = values[np.isfinite(values)]
        if log is not None and finite.size:
            log(before + step, loss=float(finite.mean()), members=int(np.isfinite(values[-1]).sum()))


def _finish(run: _RoundRun, learning: Learning, slots: Sequence[int], opened: OpenRound) -> list[dict[str, Any]]:
    """Writes and scores concepts that have taken their steps; returns their lines of the report.

    Raises:
        InputError, UnavailableError: something cannot be written.
    """
    lines = []
    for slot, state in parallel.read_members(learning, slots).items():
        member = run.current.members[slot]
        assert member is not None
        facts: dict[str, Any] = {
            "steps": int(state.step),
            "seconds": round(opened.seconds, 3),
            "chip_seconds": round(opened.chip_seconds, 3),
        }
        if state.diverged:
            error = (
                f"the loss or its gradient was not finite at step {int(state.step) + 1}: lower values_rate and "
                "embedding_rate, or try config.dtype='float32'"
            )
            lines.append(_line(member.row, "diverged", **facts, error=error))
            continue
        concept = jax.tree.map(jax.numpy.asarray, state.concept)
        file = run.workdir / "concepts" / f"{member.name}.safetensors"
        write_concept(file, member.config, run.fleet.base, concept, int(state.step))
        if member.config.validation_prompts:
            fleet = run.fleet
            validation = Validation(
                member.config, fleet.drawing_base, fleet.evaluator, run.prepared.pixels[slot], fleet.drawing_mesh
            )
            drawn, sheet = validation.draw(concept)
            write_picture(run.workdir / "samples" / f"{member.name}.png", sheet)
            scores = validation.score(drawn)
            if scores is not None:
                facts |= {
                    "image_similarity": scores.image,
                    "text_similarity": scores.text,
                    "prompt_precision": scores.precision,
                    "score": scores.score,
                }
        lines.append(_line(member.row, "done", **facts))
    return lines
