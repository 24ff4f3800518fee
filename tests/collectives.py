"""Reads from compiled HLO which devices talk to which: an oracle for `hlo_report`, which shares no code with it."""

import re

import numpy as np

_COLLECTIVE = re.compile(
    r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all)"
    r"(?:-start)?\(.*"
)
_TILES = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
_MESH_DEVICES = r"\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    devices = np.arange(np.prod(sizes)).reshape(sizes)
    return devices.transpose(_numbers(order)).ravel() if order else devices.ravel()


def groups_of(instruction: str) -> list[list[int]]:
    """The groups of device numbers between which a collective instruction sends; one for each pair that it names.

    Raises:
        ValueError: it is written in a way that is not known here.
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", instruction):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if tiles := re.search(f"replica_groups={_TILES}", instruction):
        return _iota(tiles[2], tiles[3]).reshape(_numbers(tiles[1])).tolist()
    if mesh := re.search(
        rf"replica_groups=mesh\[([^\]]+)\](?:, device_ids={_MESH_DEVICES})? \{{((?:'\w+',? ?)+)\}}", instruction
    ):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        sizes = list(axes.values())
        devices = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(np.prod(sizes))
        talking = [list(axes).index(name) for name in re.findall(r"'(\w+)'", mesh[4])]
        kept = [axis for axis in range(len(sizes)) if axis not in talking]
        width = int(np.prod([sizes[axis] for axis in talking]))
        return devices.reshape(sizes).transpose([*kept, *talking]).reshape(-1, width).tolist()
    raise ValueError(f"not understood: {instruction}")


def collectives(hlo: str) -> list[tuple[str, list[list[int]]]]:
    """All collectives of a compiled program: (name, groups of devices)."""
    return [(match[1], groups_of(match[0])) for match in map(_COLLECTIVE.search, hlo.splitlines()) if match]
