"""Slots: trees of many members' arrays, stacked along a leading axis that is split over the mesh's axis `concept`.

Slot i of every array is member i's. A slot without a member holds zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def slot_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with a leading axis of slots."""
    return NamedSharding(mesh, P("concept"))


def slot_owners(mesh: Mesh, slots: int) -> tuple[list[int], list[int]]:
    """Which slots are whose.

    Returns:
        (slots that lie on devices of this process; those of them that it writes and reports: where several processes
        share a slot, the first of them does).
    """
    holders: dict[int, set[int]] = {slot: set() for slot in range(slots)}
    for device, (index,) in slot_sharding(mesh).devices_indices_map((slots,)).items():
        for slot in range(*index.indices(slots)):
            holders[slot].add(device.process_index)  # type: ignore[attr-defined]
    here = jax.process_index()
    held = [slot for slot, processes in holders.items() if here in processes]
    return held, [slot for slot in held if min(holders[slot]) == here]


def stack_members(rows: Mapping[int, Any], shapes: Any, slots: int, mesh: Mesh) -> Any:
    """Stacks members over all processes; each gives those of its own slots.

    Args:
        rows: a tree of arrays for each slot of this process that has a member.
        shapes: of such a tree; slots without a member become zeros.
        slots: of the round.
        mesh: the fleet's.
    """
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    leaves = {slot: jax.tree.leaves(tree) for slot, tree in rows.items()}
    blanks, structure = jax.tree.flatten(empty)

    def stack(number: int, blank: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            chosen = range(*index[0].indices(slots))
            return np.stack([np.asarray(leaves[slot][number]) if slot in leaves else blank for slot in chosen])

        return jax.make_array_from_callback((slots, *blank.shape), slot_sharding(mesh), part)

    return jax.tree.unflatten(structure, [stack(number, blank) for number, blank in enumerate(blanks)])


def read_members(stacked: Any, wanted: Sequence[int]) -> dict[int, Any]:
    """Copies members of this process's slots to the host: a tree of NumPy arrays for each slot wanted."""
    leaves, structure = jax.tree.flatten(stacked)
    rows: dict[int, list[np.ndarray]] = {slot: [] for slot in wanted}
    for leaf in leaves:
        found: dict[int, np.ndarray] = {}
        for shard in leaf.addressable_shards:
            first = shard.index[0].start or 0
            for slot in wanted:
                if slot not in found and first <= slot < first + shard.data.shape[0]:
                    found[slot] = np.asarray(shard.data[slot - first])
        for slot in wanted:
            rows[slot].append(found[slot])
    return {slot: jax.tree.unflatten(structure, row) for slot, row in rows.items()}
