"""The members of a fleet: who learns with whom, and what each learns from."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from perfusion_jax import distributed, parallel, training
from perfusion_jax.base_model import BaseModel
from perfusion_jax.config import settings_of
from perfusion_jax.data.examples import Examples
from perfusion_jax.data.table import Row
from perfusion_jax.errors import InputError, UnavailableError, of_the_runtime
from perfusion_jax.fleet_report import OpenRound
from perfusion_jax.metrics import Evaluator
from perfusion_jax.preparation import concept_key, load_base, load_evaluator, load_metric, prepare_data, read_pictures
from perfusion_jax.training import Learning, Settings

# Members at each place of the concept axis where the device does not tell its memory.
MEMBERS_BY_DEFAULT = 8
# Numbers of pictures are rounded up to multiples of this, so that few shapes are compiled.
PICTURES_STEP = 8


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

    def without(self, slots: Collection[int]) -> "Round":
        """The round with some slots emptied."""
        return self._replace(members=tuple(None if i in slots else m for i, m in enumerate(self.members)))


class Prepared(NamedTuple):
    """What this process has read for its slots of a round.

    Attributes:
        examples, learning, keys: by slot, on the host.
        pixels: the concepts' pictures by slot.
        failures: (slot, what is wrong) of those that cannot be used.
    """

    examples: dict[int, Examples]
    learning: dict[int, Learning]
    keys: dict[int, np.ndarray]
    pixels: dict[int, np.ndarray]
    failures: list[tuple[int, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Fleet:
    """What all rounds share.

    Attributes:
        config: the fleet's.
        base: the model, its weights on this process's first device.
        params: those that the step reads, over the mesh.
        whitening, metric: C^-1/2 on the first device, and over the mesh.
        evaluator: what concepts are scored by, or None.
        drawing_base, drawing_mesh: the model that draws, and what devices of this process share that; None for one.
        mesh: of all devices.
        compiled: the compiled step by (settings, slots, pictures, prompts, side).
    """

    config: ConfigDict
    base: BaseModel
    params: Any
    whitening: jax.Array
    metric: jax.Array
    evaluator: Evaluator | None
    drawing_base: BaseModel
    drawing_mesh: Mesh | None
    mesh: Mesh
    compiled: Callable[..., jax.stages.Compiled]

    def side_of(self, config: ConfigDict) -> int:
        """Side of a concept's pictures in pixels."""
        return config.size or self.base.unet.sample_size * self.base.vae_factor


def load_fleet(config: ConfigDict) -> Fleet:
    """Loads the model and lays its weights over the mesh.

    Raises:
        InputError: something that the config names cannot be used.
        UnavailableError: it cannot be read for now.
    """
    mesh = parallel.make_mesh(config.mesh)
    base = load_base(config)
    frozen = {name: base.params[name] for name in parallel.STEP_PARAMS}
    params = parallel.place(frozen, parallel.param_shardings(frozen, mesh))
    if mesh.shape["fsdp"] == 1:  # the whole weights lie on every device: one copy on the first is enough
        first = Mesh(jax.local_devices()[:1], ("data",))
        base = dataclasses.replace(base, params={**base.params, **parallel.on_each(params, first)})
    whitening = load_metric(config, base)
    drawing_base, drawing_mesh = base, None
    if config.validation_prompts and mesh.shape["fsdp"] == 1 and jax.local_device_count() > 1:
        drawing_mesh = Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))
        vae = jax.device_put(base.params["vae"], NamedSharding(drawing_mesh, PartitionSpec()))
        drawing_base = dataclasses.replace(base, params={**parallel.on_each(params, drawing_mesh), "vae": vae})

    @functools.cache
    def compiled(settings: Settings, slots: int, pictures: int, prompts: int, side: int) -> jax.stages.Compiled:
        shapes = parallel.member_shapes(base, settings, pictures, prompts, side)
        step: Any = parallel.make_fleet_step(base, settings, mesh)
        return step.lower(*parallel.step_shapes(base, shapes, slots)).compile()

    metric = parallel.place(whitening, NamedSharding(mesh, PartitionSpec()))
    evaluator = load_evaluator(config) if config.validation_prompts else None
    return Fleet(config, base, params, whitening, metric, evaluator, drawing_base, drawing_mesh, mesh, compiled)


def round_settings(config: ConfigDict) -> Settings:
    """How a member learns; `flip` may differ inside a round and is seen to by `_without_mirrored`."""
    return dataclasses.replace(settings_of(config), flip=True)


def plan(fleet: Fleet, table: Sequence[Member], todo: Sequence[Member], opened: OpenRound) -> list[Round]:
    """Puts members into rounds: the open one first, then those of equal settings together, by their steps.

    Args:
        fleet: what all rounds share.
        table: all members. A round has as many slots as suit these, however few are left: with other numbers of slots,
            another program is compiled, and the last bits of a result would depend on where a run was interrupted.
        todo: those that are left.
        opened: the round that was interrupted, if one was.

    Raises:
        InputError: `config.members` or a batch does not go with the mesh, or not even one member fits.
    """
    places = fleet.mesh.shape["concept"]
    groups: dict[tuple[Settings, int], list[Member]] = {}
    for member in table:
        key = (round_settings(member.config), fleet.side_of(member.config))
        groups.setdefault(key, []).append(member)
    for (settings, _), everyone in groups.items():
        try:
            parallel.check_split(settings, fleet.mesh)
        except InputError as error:
            raise InputError(f"{everyone[0].row.where}: {error}") from error
    left = {member.identity: member for member in todo}
    rounds = []
    slots = [left.get(identity) if identity else None for identity in opened.members]
    alike = {(round_settings(member.config), fleet.side_of(member.config)) for member in slots if member}
    # The open round is begun anew on a mesh that its slots do not go with, or where they do not fit any more.
    if len(alike) == 1 and len(slots) % places == 0:
        ((settings, side),) = alike
        if _fit(fleet, settings, side, len(slots)):
            rounds.append(Round(tuple(slots), settings))
            taken = set(opened.members)
            left = {identity: member for identity, member in left.items() if identity not in taken}
    for (settings, side), everyone in groups.items():
        group = [member for member in everyone if member.identity in left]
        if not group:
            continue
        group.sort(key=lambda member: member.config.steps)  # members that end together leave no slot idle
        slots_each = _members_at_once(fleet, settings, side, len(everyone))
        if slots_each % places:
            raise InputError(
                f"config.members is {slots_each}; it must be a multiple of the {places} places along concept in "
                "config.mesh"
            )
        for start in range(0, len(group), slots_each):
            chosen: list[Member | None] = [*group[start : start + slots_each]]
            rounds.append(Round(tuple(chosen + [None] * (slots_each - len(chosen))), settings))
    return rounds


def _members_at_once(fleet: Fleet, settings: Settings, side: int, wanted: int) -> int:
    places = fleet.mesh.shape["concept"]
    most = -(-wanted // places)
    if fleet.config.members:
        return min(fleet.config.members, most * places)
    room = _room(fleet)
    if room is None:
        fitting = min(most, MEMBERS_BY_DEFAULT)
    else:
        fitting = parallel.most_that_fit(functools.partial(_taken, fleet, settings, side), room, most)
    # Rounds as full as each other: a slot takes its time, with a member in it or without.
    rounds = -(-most // fitting)
    return places * -(-most // rounds)


def _fit(fleet: Fleet, settings: Settings, side: int, slots: int) -> bool:
    """Whether so many slots may be learnt at once."""
    if fleet.config.members:
        return slots <= fleet.config.members
    room, members = _room(fleet), slots // fleet.mesh.shape["concept"]
    return room is None or parallel.fits(functools.partial(_taken, fleet, settings, side), room, members)


def _taken(fleet: Fleet, settings: Settings, side: int, members: int) -> int:
    """Memory that the step takes on a chip, in bytes, with so many members at each place of the concept axis."""
    slots, prompts = members * fleet.mesh.shape["concept"], len(fleet.config.templates)
    return parallel.bytes_per_chip(fleet.compiled(settings, slots, PICTURES_STEP, prompts, side))


def _room(fleet: Fleet) -> int | None:
    """Memory that the step may take on a chip, in bytes, the same in all processes; None if devices do not tell."""
    memory = jax.local_devices()[0].memory_stats() or {}
    # The first device also prepares the next round, for which a tenth is left, holds the evaluator, and where weights
    # are split, their whole.
    more = [*fleet.evaluator.params] if fleet.evaluator else []
    if fleet.mesh.shape["fsdp"] > 1:
        more += [fleet.base.params[name] for name in parallel.STEP_PARAMS]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(more))
    limits = [limit for limit in distributed.gather(memory.get("bytes_limit")) if limit is not None]
    return int(0.9 * min(limits)) - held if limits else None


def prepare(fleet: Fleet, current: Round, held: Sequence[int], cancelled: threading.Event) -> Prepared:
    """Reads, decodes and encodes the pictures of a round, and begins its concepts.

    Args:
        fleet: what all rounds share.
        current: the round.
        held: slots of this process.
        cancelled: set when the rest is not needed any more.

    Raises:
        UnavailableError: storage fails, or the hub, from which a segmenter comes, cannot be reached.
        jax.errors.JaxRuntimeError: the first device fails, or its memory does not suffice.
        MemoryError: the host's does not.
    """
    prepared = Prepared({}, {}, {}, {}, [])
    for slot in held:
        member = current.members[slot]
        if member is None or cancelled.is_set():
            continue
        config, row = member.config, member.row
        try:
            key, mask_key = jax.random.split(concept_key(config))
            pictures = read_pictures(row.pictures, row.masks, row.captions)
            data = prepare_data(config, fleet.base, pictures, mask_key)
            concept = fleet.base.new_concept(config.super_category, fleet.whitening, data.prompts)
        except Exception as error:  # storage raises what it likes; one concept must not end the others
            if isinstance(error, (UnavailableError, MemoryError)) or of_the_runtime(error):  # no fault of the concept's
                raise
            problem = (
                str(error) if isinstance(error, InputError) else f"{row.pictures}: {type(error).__name__}: {error}"
            )
            prepared.failures.append((slot, problem))
            continue
        examples = data.examples if config.flip else _without_mirrored(data.examples)
        prepared.examples[slot] = jax.device_get(examples)
        prepared.learning[slot] = jax.device_get(training.start(concept, current.settings))
        prepared.keys[slot] = np.asarray(jax.random.key_data(key))
        prepared.pixels[slot] = data.pixels
    return prepared


def _without_mirrored(examples: Examples) -> Examples:
    """Puts each picture as it is where its mirror image stands: a flip then changes nothing."""
    return examples._replace(**{name: getattr(examples, name)[:, [0, 0]] for name in ("mean", "std", "masks")})
