"""The one loop: a round of concepts is learnt, logged, looked at, saved, and each concept is written when it is done.

A run of one concept is a round with one slot.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from perfusion_jax.formats.concept_file import TrainedConcept, save_concept
from perfusion_jax.formats.exporting import export
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.best import Best, keep_better, nothing_scored
from perfusion_jax.learning.checkpoints import Checkpoints
from perfusion_jax.learning.diagnostics import Profiler, first_nan
from perfusion_jax.learning.fleet_step import Members, member_shapes, pad_pictures
from perfusion_jax.learning.losses import Losses
from perfusion_jax.learning.metrics import Scores
from perfusion_jax.learning.preparation import Prepared
from perfusion_jax.learning.progress import Bar, Meter, Work
from perfusion_jax.learning.records import Records, report_line
from perfusion_jax.learning.report import OpenRound
from perfusion_jax.learning.resources import Resources
from perfusion_jax.learning.rounds import Member, Round
from perfusion_jax.learning.scoring import Validation
from perfusion_jax.learning.step import Learning
from perfusion_jax.learning.workdir import Log, make_card
from perfusion_jax.method.baselines import BASELINES, Learnt
from perfusion_jax.pod import distributed
from perfusion_jax.pod.chips import chips_of
from perfusion_jax.pod.slots import read_members, slot_owners, stack_members
from perfusion_jax.runtime.errors import InputError, Stopped, UnavailableError

# Concepts that each process finishes between two looks at whether to stop.
FINISHED_AT_ONCE = 8
# Steps that are begun before the devices have taken those before them: enough to keep them busy, and few enough not to
# wait for long when the machine is about to be taken away.
AHEAD = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundState:
    """All that a checkpoint holds: the stacked state of learning, and the best concepts if scores choose them."""

    learning: Learning
    best: Best | None


class Watch(NamedTuple):
    """What people see of a run.

    Attributes:
        bar: its progress.
        profiler: what traces steps.
        debug_nans: whether to tell which operation gave the first NaN, where a concept diverges.
    """

    bar: Bar
    profiler: Profiler
    debug_nans: bool


def learn_round(
    resources: Resources,
    current: Round,
    prepared: Prepared,
    records: Records,
    watch: Watch,
    stop: Callable[[], bool],
) -> None:
    """Learns a round, or goes on with it; each concept is written when it has taken its own steps.

    Args:
        resources: what all rounds share.
        current: the round.
        prepared: what this process has read for it.
        records: where results go.
        watch: what people see of it.
        stop: whether it is time to save and stop.

    Raises:
        Stopped: it was told to stop, and has saved.
        InputError, UnavailableError: something cannot be written, or the only concept has diverged.
        jax.errors.JaxRuntimeError: a device fails, or its memory does not suffice.
    """
    slots, config = len(current.members), resources.config
    most = max((len(examples.mean) for examples in prepared.examples.values()), default=1)
    opened = records.open_round(current, most)
    side = resources.side_of(next(member.config for member in current.members if member))
    shape = (opened.pictures, len(config.templates), side)
    members, learning = _stack(resources, current, prepared, shape)
    compiled = resources.compiled(current.settings, slots, *shape)
    with closing(Checkpoints(records.checkpoints, config.keep_checkpoints)) as checkpoints:
        best = nothing_scored(learning.concept, slots, resources.mesh) if resources.keeps_best else None
        state, step = RoundState(learning, best), 0
        del learning, best
        if restored := checkpoints.restore(state, logging.warning):
            state, step = restored
        with records.log(opened.steps_before + step) as log:
            loop = Loop(
                resources=resources,
                current=current,
                prepared=prepared,
                records=records,
                watch=watch,
                opened=opened,
                compiled=compiled,
                members=members,
                checkpoints=checkpoints,
                log=log,
                state=state,
                step=step,
            )
            del state, restored  # of which the steps take the buffers
            loop.run(stop)
            # Nothing is left of the round but its last checkpoint, which nobody needs.
            records.keep(OpenRound(steps_before=opened.steps_before + loop.step))
    distributed.wait_for_all("round is over")


def _stack(
    resources: Resources, current: Round, prepared: Prepared, shape: tuple[int, int, int]
) -> tuple[Members, Learning]:
    """A round's arrays over the mesh; `shape`: (pictures, prompts, side) that they are padded to."""
    rows = {
        slot: (
            (pad_pictures(examples, shape[0]), prepared.keys[slot], np.int32(current.limits[slot])),
            prepared.learning[slot],
        )
        for slot, examples in prepared.examples.items()
    }
    shapes = member_shapes(resources.base.model, current.settings, *shape)
    return stack_members(rows, shapes, len(current.members), resources.mesh)


@dataclasses.dataclass(kw_only=True)
class Loop:
    """A round while it is learnt.

    Attributes:
        resources, current, prepared, records, watch: as for `learn_round`.
        opened: what is kept of the round.
        compiled: the fleet's step.
        members: what it reads of them.
        checkpoints: where its state is saved.
        log: where its losses and scores go; None in all processes but the first.
        state: what a checkpoint holds.
        step: steps taken.
    """

    resources: Resources
    current: Round
    prepared: Prepared
    records: Records
    watch: Watch
    opened: OpenRound
    compiled: jax.stages.Compiled
    members: Members
    checkpoints: Checkpoints
    log: Log | None
    state: RoundState
    step: int

    def __post_init__(self) -> None:
        """Sets up what changes while the round runs."""
        mesh, current = self.resources.mesh, self.current
        self._config = self.resources.config
        self._owned = set(slot_owners(mesh, len(current.members))[1])
        self._waiting = [slot for slot, limit in enumerate(current.limits) if limit]
        self._diverged: set[int] = set()
        self._validations: dict[int, Validation] = {}  # by slot; each embeds its concept's own pictures once
        self._saved = self.step
        self._losses = Losses()
        self._work = Work.of(self.compiled, mesh.devices.flat[0].device_kind, current.settings.accumulation)
        self._started = time.monotonic() - self.opened.seconds
        self._meter = Meter()

    def run(self, stop: Callable[[], bool]) -> None:
        """Takes the steps that are left; `stop` and errors as for `learn_round`."""
        self.watch.bar.skip(sum(min(self.step, self.current.limits[slot]) for slot in self._waiting))
        while self._waiting:
            if stop():
                self._save()
                raise Stopped
            if self._due():
                with self._pause():
                    self._finish()
            else:
                self._take_step()

    def _due(self) -> list[int]:
        """The slots that have come to their end."""
        limits = self.current.limits
        return [slot for slot in self._waiting if limits[slot] <= self.step or slot in self._diverged]

    def _member(self, slot: int) -> Member:
        member = self.current.members[slot]
        assert member is not None
        return member

    def _take_step(self) -> None:
        config, resources, limits = self._config, self.resources, self.current.limits
        self.watch.profiler.before_step(lambda: jax.block_until_ready(self.state))
        learning, loss = self.compiled(resources.params, resources.mesh_whitening, self.members, self.state.learning)
        self.state = dataclasses.replace(self.state, learning=learning)
        self.step += 1
        self._losses.add(loss)
        self._meter.count(self._losses.wait(AHEAD))
        self.watch.bar.advance(sum(self.step <= limits[slot] for slot in self._waiting))
        last = [slot for slot in self._waiting if self.step == limits[slot]]
        if self.step % config.log_every == 0 or (last and self.records.alone):
            self._read_losses(left=1)
        validated: list[int] = []
        if config.validate_every and config.validation_prompts:
            every = self.step % config.validate_every == 0
            validated = [slot for slot in self._waiting if limits[slot] >= self.step] if every else last
        if validated:
            with self._pause():
                self._validate(validated)
        if self.step % config.checkpoint_every == 0:
            with self._pause():
                self._save()

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Within it no steps are under way, and time does not count for their speed."""
        self._meter.count(self._losses.wait())
        with self._meter.pause():
            yield

    def _read_losses(self, left: int = 0) -> None:
        """Logs mean losses over the members of this process that still learn; `left` entries are left for later.

        Raises:
            InputError: the loss of the only concept is not finite.
        """
        self._losses.pack(self.step, self._meter.read())
        for step, values, seconds in self._losses.read(left):
            if jax.process_count() == 1:
                self._find_diverged(values, step)
            finite = values[np.isfinite(values)]
            if self.log is None or not finite.size:
                continue
            facts = {"loss": float(finite.mean())}
            if not self.records.alone:
                facts["members"] = int(np.isfinite(values[-1]).sum())
            rate = utilisation = None
            if seconds is not None:
                rate = len(self._waiting) * self.current.settings.batch_size / seconds
                utilisation = self._work.utilisation(seconds)
                facts |= {"step_seconds": seconds, "samples_per_second": rate}
                facts |= {} if utilisation is None else {"mfu": utilisation}
            self.log(self.opened.steps_before + step, "", **facts)
            self.watch.bar.show(facts["loss"], rate, utilisation)

    def _find_diverged(self, values: np.ndarray, step: int) -> None:
        """Finds members whose losses ([steps, slots], up to `step`) were not finite before their end."""
        first = step - len(values) + 1
        for slot in self._waiting:
            taken = values[: max(0, self.current.limits[slot] - first + 1), slot]
            if np.isfinite(taken).all():
                continue
            if self.records.alone:
                learning = read_members(self.state.learning, [slot])[slot]
                raise InputError(
                    f"{self._divergence(slot, learning)}: in a new --workdir, lower config.{self._rate} and "
                    f"config.embedding_rate, or try config.dtype='float32'; earlier checkpoints: "
                    f"{self.records.checkpoints}"
                )
            self._diverged.add(slot)

    @property
    def _rate(self) -> str:
        return "weights_rate" if self.current.settings.method in BASELINES else "values_rate"

    def _divergence(self, slot: int, learning: Learning) -> str:
        """Says how a concept has diverged; `learning`: as it was before that step, on the host."""
        problem = f"the loss or its gradient was not finite at step {int(learning.step) + 1}"
        if not self.watch.debug_nans:
            return problem
        resources, prepared = self.resources, self.prepared
        key = jax.random.wrap_key_data(jnp.asarray(prepared.keys[slot]))
        base, settings = resources.base, self.current.settings
        examples = prepared.examples[slot]
        found = first_nan(base.model, base.params, resources.whitening, examples, learning, key, settings)
        return f"{problem} ({found})"

    def _save(self) -> None:
        if self.step <= self._saved:
            return
        # Steps that a checkpoint spares the next start are logged before it.
        self._read_losses()
        if self.log is not None:
            self.log.flush()
        self.checkpoints.save(self.step, self.state)
        self._charge()
        self.records.keep(self.opened)
        self._saved = self.step

    def _charge(self) -> None:
        """Shares the time since the last call out among those that are not finished."""
        seconds = time.monotonic() - self._started
        share = (seconds - self.opened.seconds) * chips_of(self.resources.mesh) / len(self._waiting)
        self.opened = dataclasses.replace(self.opened, seconds=seconds, chip_seconds=self.opened.chip_seconds + share)

    def _validate(self, slots: Sequence[int]) -> None:
        """Draws and scores concepts as they are, and keeps those that are the best so far."""
        self._read_losses()
        found: list[tuple[int, Scores | None]] = []
        mine = [slot for slot in slots if slot in self._owned and slot not in self._diverged]
        for slot, concept in read_members(self.state.learning.concept, mine).items():
            member = self._member(slot)
            sheet, scores = self._draw(slot, concept)
            write_picture(self.records.sheet(member, self.step), sheet)
            if self.log is not None:
                self.log.picture(self.opened.steps_before + self.step, sheet, "" if self.records.alone else member.name)
            found.append((slot, scores))
        gathered = [pair for part in distributed.gather(found) for pair in part]
        scored = {slot: Scores(*scores) for slot, scores in gathered if scores is not None}
        if self.log is not None:
            for slot, scores in scored.items():
                name = "" if self.records.alone else self._member(slot).name
                self.log(self.opened.steps_before + self.step, name, **scores.facts)
        if self.state.best is not None:
            best = keep_better(self.state.best, self.state.learning.concept, scored, self.step, self.resources.mesh)
            self.state = dataclasses.replace(self.state, best=best)

    def _draw(self, slot: int, concept: Learnt) -> tuple[np.ndarray, Scores | None]:
        """Draws a concept, on the host as it is read; returns a sheet of pictures, and their scores."""
        resources = self.resources
        if slot not in self._validations:
            self._validations[slot] = Validation(
                self._member(slot).config,
                resources.drawing_base,
                resources.evaluator,
                self.prepared.pixels[slot],
                resources.drawing_mesh,
            )
        validation = self._validations[slot]
        drawn, sheet = validation.draw(jax.tree.map(jnp.asarray, concept))
        return sheet, validation.score(drawn)

    def _finish(self) -> None:
        """Writes concepts that have come to their end, or some of them."""
        self._save()
        self._charge()
        mine = [slot for slot in self._due() if slot in self._owned][:FINISHED_AT_ONCE]
        lines = [self._finish_one(slot, state) for slot, state in read_members(self.state.learning, mine).items()]
        parts = distributed.gather([mine, lines])
        self.records.add([line for _, part in parts for line in part])
        over = {slot for part, _ in parts for slot in part}
        self._waiting = [slot for slot in self._waiting if slot not in over]

    def _finish_one(self, slot: int, learning: Learning) -> dict[str, Any]:
        """Writes a concept, the best scored one or the last; returns its line of the report."""
        member, best = self._member(slot), self.state.best
        facts: dict[str, Any] = {
            "steps": int(learning.step),
            "seconds": round(self.opened.seconds, 3),
            "chip_seconds": round(self.opened.chip_seconds, 3),
        }
        if learning.diverged:
            error = (
                f"{self._divergence(slot, learning)}: lower {self._rate} and embedding_rate, or try "
                "config.dtype='float32'"
            )
            return report_line(member.row, "diverged", **facts, error=error)
        concept, step, scores = learning.concept, int(learning.step), None
        if best is not None and (best_step := int(np.asarray(best.steps)[slot])):
            concept, step = read_members(best.concept, [slot])[slot], best_step
            scores = Scores(*np.asarray(best.scores)[slot].tolist())
        concept, card = jax.tree.map(jnp.asarray, concept), make_card(member.config, self.resources.base, step)
        save_concept(self.records.concept(member), concept, card)
        exports: list[str] = []
        for kind in self._config.exports:
            folder = self.records.export(member, kind)
            try:
                export(self.resources.drawing_base, [TrainedConcept(concept, card)], kind, folder)
                exports.append(kind)
            except UnavailableError:
                raise
            except InputError as error:  # as where the folder holds something else; the concept itself is written
                logging.warning("%s is learnt, and not exported as %s: %s", member.name, kind, error)
        if not self.records.alone and not self._config.validate_every and member.config.validation_prompts:
            sheet, scores = self._draw(slot, concept)
            write_picture(self.records.sheet(member), sheet)
        return report_line(member.row, "done", **facts, exports=exports, **(scores.facts if scores else {}))
