"""How much memory a compiled program takes, and how many members of a fleet fit."""

import math
from collections.abc import Callable
from typing import Any

import jax

from perfusion_jax.runtime.errors import InputError, out_of_memory


def bytes_per_chip(compiled: jax.stages.Compiled) -> int:
    """Memory that a compiled program takes on each device at its peak, in bytes, as the compiler reports it."""
    report: Any = compiled.memory_analysis()
    return int(
        report.argument_size_in_bytes
        + report.output_size_in_bytes
        - report.alias_size_in_bytes
        + report.temp_size_in_bytes
        + report.generated_code_size_in_bytes
    )


def most_that_fit(bytes_for: Callable[[int], int], limit: int, most: int, advice: str) -> int:
    """How many members fit on a device.

    Memory grows by about the same for every member: two compilations tell how much, and one more makes sure.

    Args:
        bytes_for: bytes that so many members take on a device; the TPU's compiler raises `jax.errors.JaxRuntimeError`
            instead where it is more than there is.
        limit: bytes that there is room for on a device.
        most: more than so many are not wanted.
        advice: what to do if not even one fits, for the message.

    Raises:
        InputError: not even one fits.
        jax.errors.JaxRuntimeError: likewise, by the compiler's word.
    """
    one = bytes_for(1)
    if one > limit:
        raise InputError(
            f"one concept takes {one / 1e9:.1f} GB of a chip, where there is room for {limit / 1e9:.1f} GB: {advice}"
        )
    if most == 1:
        return 1
    count = min(most, 1 + int((limit - one) / max(1, _bytes_or_infinity(bytes_for, 2) - one)))
    while count > 1 and not fits(bytes_for, limit, count):
        count -= max(1, count // 16)
    return count


def fits(bytes_for: Callable[[int], int], limit: int, members: int) -> bool:
    """Whether so many members fit on a device; arguments as for `most_that_fit`."""
    return _bytes_or_infinity(bytes_for, members) <= limit


def _bytes_or_infinity(bytes_for: Callable[[int], int], members: int) -> float:
    try:
        return bytes_for(members)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return math.inf
