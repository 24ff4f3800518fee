"""What concepts do while pictures are drawn: their gates, the steps they act in, and what they add to the UNet."""

import math
from collections.abc import Collection, Sequence
from math import isfinite
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import Architecture, BaseModel
from perfusion_jax.drawing.denoising import Concepts
from perfusion_jax.formats.concept_file import PERFUSION, ConceptCard, TrainedConcept
from perfusion_jax.method import concept as concept_lib
from perfusion_jax.method.baselines import Baseline, add
from perfusion_jax.method.edit import Gate
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.errors import InputError

# Concepts are padded to this many, so that up to this many can come and go without compiling anew.
SLOTS = 4

Control = float | Sequence[float] | np.ndarray | jax.Array | None


class Controls(NamedTuple):
    """What is said of concepts while they are drawn.

    Attributes:
        bias, temperature, strength, start, end: as for `generation.drawing`; one for all concepts or one for each, None
            for their own, or what is usual.
        lock: `local` or `global`.
    """

    bias: Control = None
    temperature: Control = None
    strength: Control = None
    start: Control = None
    end: Control = None
    lock: str = "local"


OF_EDIT = ("bias", "temperature", "start", "end")
"""Controls of Perfusion's edit, which other methods do not have."""


def check(concepts: Sequence[TrainedConcept], controls: Controls) -> None:
    """Sees that controls can act on concepts.

    Raises:
        InputError: one is impossible, or does nothing to any of them.
    """
    if controls.lock not in ("local", "global"):
        raise InputError(f"lock is {controls.lock!r}; it must be 'local' or 'global'")
    if not any(card.method == PERFUSION for _, card in concepts):
        for _, card in concepts:
            check_controls(card, [name for name in OF_EDIT if getattr(controls, name) is not None])
    trained = next((card for _, card in concepts if not card.lock_keys), None)
    if trained and controls.lock == "global":
        raise InputError(
            f"{trained.name}: its keys were trained (config.lock_keys=False), and the global lock would pass them "
            "over: draw it with the local one"
        )


def check_controls(card: ConceptCard, controls: Collection[str]) -> None:
    """Sees that what is given acts on a concept.

    Raises:
        InputError: it was learnt by a method that has no such control.
    """
    if card.method == PERFUSION:
        return
    for name in OF_EDIT:
        if name in controls:
            raise InputError(f"{name} is of Perfusion's edit: {card.name} was learnt by {card.method}, which has none")


def in_slots(
    base: BaseModel,
    concepts: Sequence[TrainedConcept],
    controls: Controls,
    fractions: np.ndarray,
    ids: np.ndarray,
) -> tuple[Concepts | None, np.ndarray]:
    """Puts concepts into slots.

    Args:
        base: the model.
        concepts: to be drawn.
        controls: of them.
        fractions: how much of the sampling is done before each step, 0 to 1, [steps].
        ids: of all prompts.

    Returns:
        The slots, None without concepts; and which of their phases each step reads, int32 [steps].

    Raises:
        InputError: a control has another number of values, or an impossible one.
    """
    if not concepts:
        return None, np.zeros(len(fractions), np.int32)
    count, words = len(concepts), _words(base.model, concepts)
    slots = max(SLOTS, count)
    gates = (
        per_concept("bias", controls.bias, [card.bias for _, card in words]),
        per_concept("temperature", controls.temperature, [card.temperature for _, card in words]),
        per_concept("strength", controls.strength, [1.0] * count),
    )

    def pad(array: jax.Array, fill: float = 0.0) -> jax.Array:
        empty = jnp.full((slots - count, *array.shape[1:]), fill, jnp.float32)
        return jnp.concatenate([jnp.asarray(array, jnp.float32), empty])

    super_embeddings = None
    if controls.lock == "global":
        super_embeddings = pad(jnp.stack([base.super_category_embedding(card.super_category) for _, card in concepts]))
    start, end = (
        np.asarray(per_concept(name, given, [usual] * count))
        for name, given, usual in (("start", controls.start, 0.0), ("end", controls.end, 1.0))
    )
    active = np.ones((len(fractions), slots), np.float32)
    active[:, :count] = (start <= fractions[:, None]) & (fractions[:, None] < end)
    phases, phase_of_step = _phases(active)
    present = np.any(ids[:, :, None] == base.model.tokenizer.vocabulary_size + np.arange(slots), axis=1)
    stacked = Concepts(
        stacked=jax.tree.map(pad, concept_lib.stack([concept for concept, _ in words])),
        gates=Gate(*(pad(jnp.asarray(field), fill=1.0) for field in gates)),
        present=jnp.asarray(present, jnp.float32),
        phases=jnp.asarray(phases),
        super_embeddings=super_embeddings,
    )
    return stacked, phase_of_step


def _phases(active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of float32 [steps, slots], which concepts act in a step; and which of them each step has,
    int32 [steps].
    """
    phases, phase_of_step = np.unique(active, axis=0, return_inverse=True)
    if len(phases) > 1:  # 3, 5, 9, ...: one concept has at most 3, so that other windows of it compile nothing anew
        whole = 2 ** max(1, math.ceil(math.log2(len(phases) - 1))) + 1
        phases = np.pad(phases, ((0, whole - len(phases)), (0, 0)), "edge")
    return phases, phase_of_step.reshape(-1).astype(np.int32)


def _words(model: Architecture, concepts: Sequence[TrainedConcept]) -> list[TrainedConcept]:
    """The concepts, those of other methods than Perfusion as words alone."""
    return [
        trained._replace(concept=model.word_alone(trained.concept.embedding))
        if isinstance(trained.concept, Baseline)
        else trained
        for trained in concepts
    ]


_added = jax.jit(add)


def changed(unet_params: Params, concepts: Sequence[TrainedConcept], strength: Control) -> Params:
    """The UNet with what other methods than Perfusion have learnt added to it."""
    if not concepts:
        return unet_params
    strengths = per_concept("strength", strength, [1.0] * len(concepts))
    for (concept, _), each in zip(concepts, strengths, strict=True):
        if isinstance(concept, Baseline) and concept.changes:
            unet_params = _added(unet_params, concept, each)
    return unet_params


def per_concept(name: str, given: Control, defaults: Sequence[float]) -> list[float]:
    """Values of one control of all concepts: those given, one for all or one for each, or else the defaults.

    Raises:
        InputError: another number of values, or an impossible one.
    """
    try:
        array = np.asarray(defaults if given is None else given, np.float64)  # numbers of any library, and arrays
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {given!r}; it must be a number, or one for each concept") from error
    if array.ndim > 1:
        raise InputError(f"{name} has the shape {array.shape}: give one number, or one for each concept")
    values = array.reshape(-1).tolist()
    if len(values) not in (1, len(defaults)):
        raise InputError(f"{name} has {len(values)} values: give one, or one for each of the {len(defaults)} concepts")
    for value in values:
        if not isfinite(value) or (name == "temperature" and value <= 0):
            raise InputError(f"{name} is {value}; it must be finite" + ", and above 0" * (name == "temperature"))
        if name in ("start", "end") and not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; it is a fraction of the steps, from 0 to 1")
    return values * len(defaults) if len(values) == 1 else values
