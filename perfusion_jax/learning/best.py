"""The best concepts of a round so far, by their scores."""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32

from perfusion_jax.learning.metrics import Scores
from perfusion_jax.method.baselines import Learnt
from perfusion_jax.pod.mesh import place
from perfusion_jax.pod.slots import slot_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The concepts with the best scores so far.

    Attributes:
        concept: stacked, one a slot; the untrained one as long as nothing is scored.
        scores: the fields of `metrics.Scores`, float32 [slots, 3].
        steps: after which they were scored, int32 [slots]; 0 as long as nothing is scored.
    """

    concept: Learnt
    scores: Float32[Array, "slots 3"]
    steps: Int32[Array, " slots"]


def nothing_scored(concept: Learnt, slots: int, mesh: Mesh) -> Best:
    """Returns the best before anything is scored.

    Args:
        concept: the untrained ones, stacked over the mesh; copied, for the first step takes the buffers of the state.
        slots: how many.
        mesh: of all devices.
    """
    copied = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=slot_sharding(mesh))(concept)
    scores = np.zeros((slots, len(Scores._fields)), np.float32)
    return _best(copied, scores, np.zeros(slots, np.int32), mesh)


def keep_better(best: Best, offered: Learnt, scored: Mapping[int, Scores], step: int, mesh: Mesh) -> Best:
    """Takes the concepts that are better than the best so far; the buffers of `best` are taken.

    Args:
        best: so far.
        offered: the concepts as they are, stacked.
        scored: their scores, by slot.
        step: after which they were scored.
        mesh: of all devices.
    """
    scores, steps = np.array(best.scores), np.array(best.steps)
    better = np.zeros(len(steps), bool)
    for slot, found in scored.items():
        rounded = np.asarray(found, np.float32)  # as they are kept: an interruption changes nothing
        if not steps[slot] or Scores(*rounded).score > Scores(*scores[slot]).score:
            better[slot], scores[slot], steps[slot] = True, rounded, step
    return _best(_exchange(best.concept, offered, better), scores, steps, mesh) if better.any() else best


def _best(concept: Learnt, scores: np.ndarray, steps: np.ndarray, mesh: Mesh) -> Best:
    return Best(concept, place(scores, mesh), place(steps, mesh))


@partial(jax.jit, donate_argnums=0)
def _exchange(kept: Learnt, offered: Learnt, better: Bool[Array | np.ndarray, " slots"]) -> Learnt:
    """Takes the concepts of those slots for which `better` holds."""
    return jax.tree.map(lambda old, new: jnp.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old), kept, offered)
