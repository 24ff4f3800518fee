"""What the TPU compiler says of a compiled step: work, memory, collectives by mesh axis, and the bound they set.

Nothing here runs on a TPU. The compiler's figures are its own estimates, and a roofline is the time that no program
with these figures can beat on a chip with these peaks: a bound, not a measurement.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from perfusion_jax.pod.chips import Chip
from perfusion_jax.pod.memory import bytes_per_chip

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COLLECTIVE = re.compile(rf"= .*?[ )](?P<kind>{'|'.join(COLLECTIVES)})(?:-start)?\(")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%(?P<name>\S+) = (?P<results>\(.*?\)|\S+) (?P<kind>[a-z-]+)\((?P<operands>[^)]*)\)(?P<rest>.*)"
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\](?:\{(?P<order>[\d,]*)(?::(?P<layout>[^}]*))?\})?")
# They only name what another instruction has made, or end what another one has begun.
_MOVES_NOTHING = re.compile(r"parameter|constant|tuple|get-tuple-element|bitcast|while|after-all|partition-id|.*-done")

# Queries, keys and values come as [..., heads, width, tokens] (`base_model.flash_attention`).
_KERNEL = re.compile(
    r"%splash_mha_(?P<kind>fwd|dkv)\S* = (?P<results>.*?) custom-call\("
    r".*?operand_layout_constraints=\{(?P<operands>.*?)\}\}"
)
_MATRIX_PRODUCTS = {"fwd": 2, "dkv": 5}  # of queries, keys and values; the backward kernel gives all gradients


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
        kind: one of COLLECTIVES.
        groups: device numbers that talk to each other; none means all devices together.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]


def collectives(hlo: str) -> Iterator[Collective]:
    """Finds the collectives in HLO text (`compiled.as_text()`).

    Raises:
        ValueError: one is written in a form that is not known here, so that none is passed over in silence.
    """
    for line in hlo.splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            yield Collective(match["kind"], _groups(line))


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    if listed := _LISTED.search(line):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", listed[1] or ""))
    if iota := _IOTA.search(line):
        return _rows(_iota(iota[2], iota[3]).reshape(_numbers(iota[1])))
    if mesh := _MESH.search(line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        sizes = [int(size) for size in axes.values()]
        devices = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes))
        talking = [list(axes).index(name) for name in re.findall(r"'(\w+)'", mesh[4])]
        order = [axis for axis in range(len(sizes)) if axis not in talking] + talking
        width = math.prod(sizes[axis] for axis in talking)
        return _rows(devices.reshape(sizes).transpose(order).reshape(-1, width))
    raise ValueError(f"the devices of a collective cannot be read: {line.strip()[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(dimensions: str, order: str | None) -> np.ndarray:
    devices = np.arange(math.prod(_numbers(dimensions))).reshape(_numbers(dimensions))
    return devices.transpose(_numbers(order) if order else None)


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, groups.tolist()))


def hbm_traffic(hlo: str, loops: int = 1) -> float:
    """Counts the bytes that a program's operations read from the HBM and write to it.

    XLA keeps what it can in vector memory, and brings weights there ahead of time: arrays there, `S(1)` in HLO text, do
    not count, but the copies to and from them do. An operation counts as reading its operands whole.

    Args:
        hlo: text of the compiled program.
        loops: how often it repeats what stands in a loop.
    """
    entry = ""
    computations: dict[str, list[re.Match[str]]] = {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computations[header["name"]] = instructions = []
            entry = header["name"] if header["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            instructions.append(found)

    def count(name: str) -> float:
        total = 0.0
        results = {found["name"]: found["results"] for found in computations[name]}
        for found in computations[name]:
            if found["kind"] == "while" and (body := re.search(r"body=%([^\s,]+)", found["rest"])):
                total += loops * count(body[1])
            if _MOVES_NOTHING.fullmatch(found["kind"]):
                continue
            # An asynchronous copy or slice has two ends of one size, though a slice names all that it is cut from.
            if found["kind"] in ("copy-start", "slice-start"):
                arrays = list(_ARRAY.finditer(found["results"]))[:2]
                total += _bytes(arrays[1]) * sum(map(_in_hbm, arrays))
                continue
            operands = (results.get(operand.strip().lstrip("%"), "") for operand in found["operands"].split(","))
            arrays = [array for text in (found["results"], *operands) for array in _ARRAY.finditer(text)]
            total += sum(_bytes(array) for array in arrays if _in_hbm(array))
        return total

    return count(entry)


def _in_hbm(array: re.Match[str]) -> bool:
    return "S(" not in (array["layout"] or "")


def _bytes(array: re.Match[str], tile: str = "") -> float:
    """Bytes of an array, its padding to whole tiles included: those of its layout, or `tile` where it names none."""
    bits = int(re.sub(r"\D", "", array["dtype"]) or 8)  # `pred` is a byte
    shape = _numbers(array["shape"])
    order = _numbers(array["order"] or "") or range(len(shape))[::-1]
    named = re.match(r"T\(([\d,]+)\)", array["layout"] or "")
    sides = _numbers(named[1] if named else tile)[::-1]
    sizes = itertools.zip_longest((shape[axis] for axis in order), sides, fillvalue=1)
    return math.prod(-(-size // side) * side for size, side in sizes) * bits / 8


def kernel_cost(hlo: str) -> tuple[float, float]:
    """Counts the work of splash attention's kernels, of which XLA's cost model knows nothing.

    Returns:
        (floating-point operations, bytes of operands and results, in tiles of 8 x 128 unless the layout names others).
    """
    flops = traffic = 0.0
    for line in hlo.splitlines():
        if match := _KERNEL.search(line):
            arrays = [array for side in ("operands", "results") for array in _ARRAY.finditer(match[side])]
            query, key = [shape for array in arrays if len(shape := _numbers(array["shape"])) > 3][:2]
            flops += 2 * _MATRIX_PRODUCTS[match["kind"]] * math.prod(query) * key[-1]
            traffic += sum(_bytes(array, tile="8,128") for array in arrays)
    return flops, traffic


def axes_crossed(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which devices of one group differ.

    Args:
        groups: device numbers, counted through the mesh with the last axis fastest; none means all together.
        mesh_shape: size of each axis by name, in the order of the mesh.
    """
    sizes = tuple(mesh_shape.values())
    crossed = set()
    for group in groups or [range(math.prod(sizes))]:
        coordinates = np.unravel_index(list(group), sizes)
        crossed |= {axis for axis, where in zip(mesh_shape, coordinates, strict=True) if len(set(where.tolist())) > 1}
    return tuple(axis for axis in mesh_shape if axis in crossed)


def count_by_axes(hlo: str, mesh_shape: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Counts collectives by the axes they cross (joined by `+`) and by kind; those within one device are left out."""
    counts = Counter((axes_crossed(found.groups, mesh_shape), found.kind) for found in collectives(hlo))
    table: dict[str, dict[str, int]] = {}
    for (axes, kind), count in sorted(counts.items()):
        if axes:
            table.setdefault("+".join(axes), {})[kind] = count
    return table


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """A compiled program on one device of a chip.

    Attributes:
        flops: floating-point operations.
        traffic: bytes that are read from the HBM and written to it (`hbm_traffic`).
        accessed: bytes that operations read and write: XLA's "bytes accessed", and those of attention's kernels. What
            XLA keeps in vector memory between two operations counts too.
        arguments, outputs, temporaries: bytes of memory; outputs that reuse an argument's memory are not counted.
        peak: the most memory that is in use at a time, in bytes.
        memory: of the device, in bytes.
        compute_seconds, memory_seconds: that the published peaks need for `flops` and for `traffic`.
        collectives: how many, by axes and by kind.
    """

    flops: float
    traffic: float
    accessed: float
    arguments: int
    outputs: int
    temporaries: int
    peak: int
    memory: float
    compute_seconds: float
    memory_seconds: float
    collectives: dict[str, dict[str, int]]

    @property
    def fits(self) -> bool:
        """Whether the program fits into the device's memory."""
        return self.peak <= self.memory

    @property
    def bound_seconds(self) -> float:
        """The time that no run can beat: whichever of computing and moving data takes longer."""
        return max(self.compute_seconds, self.memory_seconds)


def report(compiled: jax.stages.Compiled, mesh_shape: Mapping[str, int], chip: Chip, loops: int = 1) -> ProgramReport:
    """Reads what the compiler tells of a program.

    Args:
        compiled: for a mesh.
        mesh_shape: size of each axis of that mesh by name, in order.
        chip: the peaks of one of its devices.
        loops: how often the program repeats what it does in a loop, which XLA counts once.
    """
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    hlo = compiled.as_text()
    if cost is None or memory is None or hlo is None:
        raise ValueError("the compiler tells nothing of this program")
    kernel_flops, kernel_bytes = kernel_cost(hlo)
    flops, traffic = loops * (cost["flops"] + kernel_flops), hbm_traffic(hlo, loops)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return ProgramReport(
        flops=flops,
        traffic=traffic,
        accessed=loops * (cost["bytes accessed"] + kernel_bytes),
        arguments=memory.argument_size_in_bytes,
        outputs=outputs,
        temporaries=memory.temp_size_in_bytes,
        peak=bytes_per_chip(compiled),
        memory=chip.memory,
        compute_seconds=flops / chip.flops,
        memory_seconds=traffic / chip.bandwidth,
        collectives=count_by_axes(hlo, mesh_shape),
    )
