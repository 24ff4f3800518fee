"""The one loop: a round of concepts is learnt, logged, looked at, saved, and each concept is written when it is done.

A run of one concept is a round with one slot.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.checkpoints import Checkpoints
from perfusion_jax.learning.fleet_step import Members, member_shapes, pad_pictures
from perfusion_jax.learning.metrics import Similarities
from perfusion_jax.learning.preparation import Prepared
from perfusion_jax.learning.progress import Bar, Meter, Profiler, Work
from perfusion_jax.learning.records import Records, report_line
from perfusion_jax.learning.report import OpenRound
from perfusion_jax.learning.resources import Resources
from perfusion_jax.learning.rounds import Member, Round
from perfusion_jax.learning.scoring import Validation
from perfusion_jax.learning.step import Learning
from perfusion_jax.learning.workdir import Log, write_concept
from perfusion_jax.method.concept import Concept
from perfusion_jax.pod import distributed
from perfusion_jax.pod.chips import chips_of
from perfusion_jax.pod.mesh import place
from perfusion_jax.pod.slots import read_members, slot_owners, slot_sharding, stack_members
from perfusion_jax.runtime.errors import InputError, Stopped

# Concepts that each process finishes between two looks at whether to stop.
FINISHED_AT_ONCE = 8
# Steps that are begun before the devices have taken those before them: enough to keep them busy, and few enough not to
# wait for long when the machine is about to be taken away.
AHEAD = 2


@flax.struct.dataclass
class Best:
    """The concepts with the best scores so far.

    Attributes:
        concept: stacked, one a slot; the untrained one as long as nothing is scored.
        scores: the fields of `metrics.Similarities`, float32 [slots, 3].
        steps: after which they were scored, int32 [slots]; 0 as long as nothing is scored.
    """

    concept: Concept
    scores: jax.Array
    steps: jax.Array


@flax.struct.dataclass
class RoundState:
    """All that a checkpoint holds: the stacked state of learning, and the best concepts if a look chooses them."""

    learning: Learning
    best: Best | None


@partial(jax.jit, donate_argnums=0)
def _exchange(kept: Concept, offered: Concept, better: jax.Array) -> Concept:
    """Takes the concepts of those slots for which `better` (bool [slots]) holds."""
    return jax.tree.map(lambda old, new: jnp.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old), kept, offered)


class Loop:
    """A round while it is learnt.

    Args:
        resources: what all rounds share.
        current: the round.
        prepared: what this process has read for it.
        records: where results go.
        bar: what people see.
        profiler: what traces steps.
    """

    def __init__(
        self,
        resources: Resources,
        current: Round,
        prepared: Prepared,
        records: Records,
        bar: Bar,
        profiler: Profiler,
    ):
        self._resources, self._current, self._prepared = resources, current, prepared
        self._records, self._bar, self._profiler = records, bar, profiler
        self._config = resources.config
        self._owned = set(slot_owners(resources.mesh, len(current.members))[1])
        self._waiting = [slot for slot, limit in enumerate(current.limits) if limit]
        self._diverged: set[int] = set()
        self._step = self._saved = 0
        self._validations: dict[int, Validation] = {}  # by slot; each embeds its concept's own pictures once
        self._losses: list[jax.Array] = []
        # (step, losses up to it, seconds a step), not read yet: the newest may still be on their way.
        self._unread: list[tuple[int, list[jax.Array], float | None]] = []

    def run(self, stop: Callable[[], bool]) -> None:
        """Takes the steps that are left; each concept is written when it has taken its own.

        Args:
            stop: whether it is time to save and stop.

        Raises:
            Stopped: it was told to stop, and has saved.
            InputError, UnavailableError: something cannot be written, or the only concept has diverged.
        """
        resources, current, records = self._resources, self._current, self._records
        most = max((len(examples.mean) for examples in self._prepared.examples.values()), default=1)
        self._opened = records.open_round(current, most)
        side = resources.side_of(next(member.config for member in current.members if member))
        shape = (self._opened.pictures, len(self._config.templates), side)
        self._members, learning = self._stack(shape)
        self._compiled = resources.compiled(current.settings, len(current.members), *shape)
        device_kind = resources.mesh.devices.flat[0].device_kind
        self._work = Work.of(self._compiled, device_kind, current.settings.accumulation)
        with ExitStack() as stack:
            checkpoints = Checkpoints(records.checkpoints, self._config.keep_checkpoints)
            self._checkpoints = stack.enter_context(closing(checkpoints))
            self._state = RoundState(learning, self._no_best(learning.concept))
            restored = checkpoints.restore(self._state, logging.warning)
            if restored is not None:
                self._state, self._step = restored
                self._saved = self._step
            self._bar.skip(sum(min(self._step, current.limits[slot]) for slot in self._waiting))
            self._log: Log | None = stack.enter_context(records.log(self._opened.steps_before + self._step))
            self._started = time.monotonic() - self._opened.seconds
            self._meter = Meter()
            while self._waiting:
                if stop():
                    self._save()
                    raise Stopped
                if self._due():
                    with self._meter.pause():
                        self._finish()
                else:
                    self._take_step()
            # Nothing is left of the round but its last checkpoint, which nobody needs.
            records.keep(OpenRound(steps_before=self._opened.steps_before + self._step))
        distributed.wait_for_all("round is over")

    def _due(self) -> list[int]:
        """The slots that have come to their end."""
        limits = self._current.limits
        return [slot for slot in self._waiting if limits[slot] <= self._step or slot in self._diverged]

    def _member(self, slot: int) -> Member:
        member = self._current.members[slot]
        assert member is not None
        return member

    def _stack(self, shape: tuple[int, int, int]) -> tuple[Members, Learning]:
        """The round's arrays over the mesh; `shape`: (pictures, prompts, side) that they are padded to."""
        prepared, current = self._prepared, self._current
        rows = {
            slot: (
                (pad_pictures(examples, shape[0]), prepared.keys[slot], np.int32(current.limits[slot])),
                prepared.learning[slot],
            )
            for slot, examples in prepared.examples.items()
        }
        shapes = member_shapes(self._resources.base.model, current.settings, *shape)
        return stack_members(rows, shapes, len(current.members), self._resources.mesh)

    def _no_best(self, concept: Concept) -> Best | None:
        config = self._config
        if not (config.validate_every and config.validation_prompts and self._resources.evaluator):
            return None
        slots, whole = len(self._current.members), NamedSharding(self._resources.mesh, P())
        scores = place(np.zeros((slots, len(Similarities._fields)), np.float32), whole)
        # Copied, for the first step takes the buffers of the state.
        copied = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=slot_sharding(self._resources.mesh))(concept)
        return Best(copied, scores, place(np.zeros(slots, np.int32), whole))

    def _take_step(self) -> None:
        config, resources, limits = self._config, self._resources, self._current.limits
        self._profiler.before_step(lambda: jax.block_until_ready(self._state))
        learning, loss = self._compiled(resources.params, resources.mesh_whitening, self._members, self._state.learning)
        self._state = dataclasses.replace(self._state, learning=learning)
        self._step += 1
        self._meter.step()
        self._losses.append(loss)
        if len(self._losses) > AHEAD:
            self._losses[-1 - AHEAD].block_until_ready()
        self._bar.advance(sum(self._step <= limits[slot] for slot in self._waiting))
        last = [slot for slot in self._waiting if self._step == limits[slot]]
        looks = config.validate_every and config.validation_prompts
        every = looks and self._step % config.validate_every == 0
        if self._step % config.log_every == 0 or (last and self._records.alone):
            self._pack_losses()
            self._read_losses(left=1)
        with self._meter.pause():
            if looks and (every or last):
                self._look([slot for slot in self._waiting if limits[slot] >= self._step] if every else last)
            if self._step % config.checkpoint_every == 0:
                self._save()

    def _pack_losses(self) -> None:
        if self._losses:
            self._unread.append((self._step, self._losses, self._meter.read()))
            self._losses = []

    def _read_losses(self, left: int) -> None:
        """Logs mean losses over the members of this process that still learn, oldest first; `left` entries stay.

        Raises:
            InputError: the loss of the only concept is not finite.
        """
        while len(self._unread) > left:
            step, losses, seconds = self._unread.pop(0)
            # Along data and fsdp, devices hold the same members.
            parts = [{part.index[0].start or 0: part.data for part in loss.addressable_shards} for loss in losses]
            values = np.stack([np.concatenate([np.asarray(part[first]) for first in sorted(part)]) for part in parts])
            if jax.process_count() == 1:
                self._find_diverged(values, step)
            finite = values[np.isfinite(values)]
            if self._log is None or not finite.size:
                continue
            mean = float(finite.mean())
            members = int(np.isfinite(values[-1]).sum())
            facts: dict[str, float] = {"loss": mean}
            if not self._records.alone:
                facts["members"] = members
            rate = utilisation = None
            if seconds is not None:
                rate = len(self._waiting) * self._current.settings.batch_size / seconds
                utilisation = self._work.utilisation(seconds)
                facts |= {"step_seconds": seconds, "samples_per_second": rate}
                facts |= {} if utilisation is None else {"mfu": utilisation}
            self._log(self._opened.steps_before + step, "", **facts)
            self._bar.show(mean, rate, utilisation)

    def _find_diverged(self, values: np.ndarray, step: int) -> None:
        """Finds members whose losses ([steps, slots], up to `step`) were not finite before their end."""
        first = step - len(values) + 1
        for slot in self._waiting:
            taken = values[: max(0, self._current.limits[slot] - first + 1), slot]
            if np.isfinite(taken).all():
                continue
            if self._records.alone:
                raise InputError(
                    f"the loss or its gradient was not finite at step {first + int(np.argmin(np.isfinite(taken)))}: in "
                    "a new --workdir, lower config.values_rate and config.embedding_rate, or try "
                    f"config.dtype='float32'; earlier checkpoints: {self._records.checkpoints}"
                )
            self._diverged.add(slot)

    def _save(self) -> None:
        if self._step <= self._saved:
            return
        # Steps that a checkpoint spares the next start are logged before it.
        self._pack_losses()
        self._read_losses(left=0)
        if self._log is not None:
            self._log.flush()
        self._checkpoints.save(self._step, self._state)
        self._charge()
        self._records.keep(self._opened)
        self._saved = self._step

    def _charge(self) -> None:
        """Shares the time since the last call out among those that are not finished."""
        seconds = time.monotonic() - self._started
        share = (seconds - self._opened.seconds) * chips_of(self._resources.mesh) / len(self._waiting)
        self._opened = dataclasses.replace(
            self._opened, seconds=seconds, chip_seconds=self._opened.chip_seconds + share
        )

    def _look(self, slots: Sequence[int]) -> None:
        """Draws and scores concepts as they are, and keeps those that are the best so far."""
        self._pack_losses()
        self._read_losses(left=0)
        found: list[tuple[int, Similarities | None]] = []
        mine = [slot for slot in slots if slot in self._owned and slot not in self._diverged]
        for slot, concept in read_members(self._state.learning.concept, mine).items():
            member = self._member(slot)
            sheet, scores = self._draw(slot, concept)
            write_picture(self._records.sheet(member, self._step), sheet)
            if self._log is not None:
                self._log.picture(self._step, sheet, "" if self._records.alone else member.name)
            found.append((slot, scores))
        gathered = [pair for part in distributed.gather(found) for pair in part]
        scored = {slot: Similarities(*scores) for slot, scores in gathered if scores is not None}
        if self._log is not None:
            for slot, scores in scored.items():
                name = "" if self._records.alone else self._member(slot).name
                self._log(self._opened.steps_before + self._step, name, **scores.facts)
        self._keep_best(scored)

    def _keep_best(self, scored: dict[int, Similarities]) -> None:
        best = self._state.best
        if best is None:
            return
        scores, steps = np.array(best.scores), np.array(best.steps)
        better = np.zeros(len(steps), bool)
        for slot, found in scored.items():
            rounded = np.asarray(found, np.float32)  # as they are kept: an interruption changes nothing
            if not steps[slot] or Similarities(*rounded).score > Similarities(*scores[slot]).score:
                better[slot], scores[slot], steps[slot] = True, rounded, self._step
        if not better.any():
            return
        whole = NamedSharding(self._resources.mesh, P())
        concept = _exchange(best.concept, self._state.learning.concept, better)
        self._state = dataclasses.replace(self._state, best=Best(concept, place(scores, whole), place(steps, whole)))

    def _draw(self, slot: int, concept: Concept) -> tuple[np.ndarray, Similarities | None]:
        """Draws a concept, on the host as it is read; returns a sheet of pictures, and their scores."""
        resources = self._resources
        if slot not in self._validations:
            self._validations[slot] = Validation(
                self._member(slot).config,
                resources.drawing_base,
                resources.evaluator,
                self._prepared.pixels[slot],
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
        lines = [self._finish_one(slot, state) for slot, state in read_members(self._state.learning, mine).items()]
        parts = distributed.gather([mine, lines])
        self._records.add([line for _, part in parts for line in part])
        over = {slot for part, _ in parts for slot in part}
        self._waiting = [slot for slot in self._waiting if slot not in over]

    def _finish_one(self, slot: int, learning: Learning) -> dict[str, Any]:
        """Writes a concept, the best scored one or the last; returns its line of the report."""
        member, best = self._member(slot), self._state.best
        facts: dict[str, Any] = {
            "steps": int(learning.step),
            "seconds": round(self._opened.seconds, 3),
            "chip_seconds": round(self._opened.chip_seconds, 3),
        }
        if learning.diverged:
            error = (
                f"the loss or its gradient was not finite at step {int(learning.step) + 1}: lower values_rate and "
                "embedding_rate, or try config.dtype='float32'"
            )
            return report_line(member.row, "diverged", **facts, error=error)
        concept, step, scores = learning.concept, int(learning.step), None
        if best is not None and (best_step := int(np.asarray(best.steps)[slot])):
            concept, step = read_members(best.concept, [slot])[slot], best_step
            scores = Similarities(*np.asarray(best.scores)[slot].tolist())
        file = self._records.concept(member)
        write_concept(file, member.config, self._resources.base, jax.tree.map(jnp.asarray, concept), step)
        if not self._records.alone and not self._config.validate_every and member.config.validation_prompts:
            sheet, scores = self._draw(slot, concept)
            write_picture(self._records.sheet(member), sheet)
        return report_line(member.row, "done", **facts, **(scores.facts if scores else {}))
