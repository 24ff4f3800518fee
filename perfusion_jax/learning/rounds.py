"""Rounds: which concepts of a fleet are learnt together."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from perfusion_jax.config import MEMORY_ADVICE
from perfusion_jax.data.sources import count_pictures
from perfusion_jax.data.table import Row
from perfusion_jax.learning.fleet_step import check_split, member_shapes
from perfusion_jax.learning.report import OpenRound
from perfusion_jax.learning.resources import Resources
from perfusion_jax.learning.step import Settings
from perfusion_jax.pod import distributed
from perfusion_jax.pod.memory import bytes_per_chip, fits, most_that_fit
from perfusion_jax.runtime.errors import InputError

# Members at each place of the concept axis where the device does not tell its memory.
MEMBERS_BY_DEFAULT = 8
# Numbers of pictures are rounded up to multiples of this, so that few shapes are compiled.
PICTURES_STEP = 8
# Folders of pictures that are listed at once: in a bucket each takes a while.
LISTED_AT_ONCE = 32


class Member(NamedTuple):
    """A concept of the table, with its own config."""

    row: Row
    config: ConfigDict

    @property
    def name(self) -> str:
        """The concept's name."""
        return self.row.name

    @property
    def identity(self) -> str:
        """The name and the digest of the row: what was learnt by another row is not this concept's."""
        return f"{self.name} {self.row.digest}"


class Round(NamedTuple):
    """Members that are learnt together.

    Attributes:
        members: by slot; None for a slot that stays empty.
        settings: how all of them learn.
    """

    members: tuple[Member | None, ...]
    settings: Settings

    @property
    def limits(self) -> list[int]:
        """Steps that each member takes, by slot."""
        return [member.config.steps if member else 0 for member in self.members]

    @property
    def identities(self) -> list[str | None]:
        """The members' identities, by slot."""
        return [member.identity if member else None for member in self.members]

    def without(self, slots: Collection[int]) -> "Round":
        """The round with some slots emptied."""
        return self._replace(members=tuple(None if i in slots else m for i, m in enumerate(self.members)))


def round_settings(config: ConfigDict) -> Settings:
    """How a member learns; `flip` may differ inside a round and is seen to when its pictures are prepared."""
    return dataclasses.replace(Settings.of(config), flip=True)


def rounded_up(pictures: int) -> int:
    """The number of pictures that examples are padded to."""
    return -(-pictures // PICTURES_STEP) * PICTURES_STEP


def plan(resources: Resources, table: Sequence[Member], todo: Sequence[Member], opened: OpenRound) -> list[Round]:
    """Puts members into rounds: the open one first, then those of equal settings together, by their steps.

    Args:
        resources: what all rounds share.
        table: all members. A round has as many slots as suit these, however few are left: with other numbers of slots,
            another program is compiled, and the last bits of a result would depend on where a run was interrupted.
        todo: those that are left.
        opened: the round that was interrupted, if one was.

    Raises:
        InputError: `config.members` or a batch does not go with the mesh, or not even one member fits.
    """
    places = resources.mesh.shape["concept"]
    groups: dict[tuple[Settings, int], list[Member]] = {}
    for member in table:
        key = (round_settings(member.config), resources.side_of(member.config))
        groups.setdefault(key, []).append(member)
    for (settings, _), everyone in groups.items():
        try:
            check_split(settings, resources.mesh)
        except InputError as error:
            where = everyone[0].row.where
            raise InputError(f"{where}: {error}" if where else str(error)) from error
    left = {member.identity: member for member in todo}
    rounds = []
    slots = [left.get(identity) if identity else None for identity in opened.members]
    alike = {(round_settings(member.config), resources.side_of(member.config)) for member in slots if member}
    # The open round is begun anew on a mesh that its slots do not go with, or where they do not fit any more.
    if len(alike) == 1 and len(slots) % places == 0:
        ((settings, side),) = alike
        if _fit(resources, settings, side, opened.pictures, len(slots)):
            rounds.append(Round(tuple(slots), settings))
            taken = set(opened.members)
            left = {identity: member for identity, member in left.items() if identity not in taken}
    for (settings, side), everyone in groups.items():
        group = [member for member in everyone if member.identity in left]
        if not group:
            continue
        group.sort(key=lambda member: member.config.steps)  # members that end together leave no slot idle
        slots_each = _members_at_once(resources, settings, side, everyone)
        if slots_each % places:
            raise InputError(
                f"config.members is {slots_each}; it must be a multiple of the {places} places along concept in "
                "config.mesh"
            )
        for start in range(0, len(group), slots_each):
            chosen: list[Member | None] = [*group[start : start + slots_each]]
            rounds.append(Round(tuple(chosen + [None] * (slots_each - len(chosen))), settings))
    return rounds


def _members_at_once(resources: Resources, settings: Settings, side: int, everyone: Sequence[Member]) -> int:
    places = resources.mesh.shape["concept"]
    most = -(-len(everyone) // places)
    if resources.config.members:
        return min(resources.config.members, most * places)
    room = _room(resources)
    if room is None:
        fitting = min(most, MEMBERS_BY_DEFAULT)
    else:
        pictures = distributed.from_first(lambda: _most_pictures(everyone))
        taken = _bytes_for(resources, settings, side, pictures)
        fitting = most_that_fit(taken, room, most, MEMORY_ADVICE)
    # Rounds as full as each other: a slot takes its time, with a member in it or without.
    rounds = -(-most // fitting)
    return places * -(-most // rounds)


def _most_pictures(members: Sequence[Member]) -> int:
    with ThreadPoolExecutor(LISTED_AT_ONCE) as executor:
        return max(executor.map(count_pictures, [member.row.pictures for member in members]))


def _fit(resources: Resources, settings: Settings, side: int, pictures: int, slots: int) -> bool:
    """Whether so many slots may be learnt at once."""
    if resources.config.members:
        return slots <= resources.config.members
    room, members = _room(resources), slots // resources.mesh.shape["concept"]
    return room is None or fits(_bytes_for(resources, settings, side, pictures), room, members)


def _bytes_for(resources: Resources, settings: Settings, side: int, pictures: int) -> Callable[[int], int]:
    """Memory that the step takes on a chip, in bytes, by the number of members at each place of the concept axis."""
    places, prompts = resources.mesh.shape["concept"], len(resources.config.templates)
    padded = rounded_up(max(1, pictures))
    _, learning = member_shapes(resources.base.model, settings, padded, prompts, side)
    # Of a DreamBooth the best so far is as large as the model.
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(learning.concept)) * resources.keeps_best

    @functools.cache
    def taken(members: int) -> int:
        return members * kept + bytes_per_chip(resources.compiled(settings, members * places, padded, prompts, side))

    return taken


def _room(resources: Resources) -> int | None:
    """Memory that the step may take on a chip, in bytes, the same in all processes; None if devices do not tell."""
    memory = jax.local_devices()[0].memory_stats() or {}
    # The first device also prepares the next round, for which a tenth is left, and holds the evaluator.
    evaluator = resources.evaluator.params if resources.evaluator else []
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(evaluator))
    limits = [limit for limit in distributed.gather(memory.get("bytes_limit")) if limit is not None]
    return int(0.9 * min(limits)) - held if limits else None
