"""Losses of steps, read from the devices when they have come: to wait for the newest would leave the devices idle."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np


class Entry(NamedTuple):
    """Losses that are logged together.

    Attributes:
        step: the last of them.
        values: float32 [steps, slots], the slots of this process; NaN where a member has diverged or is done.
        seconds: a step, on average; None if no time was measured.
    """

    step: int
    values: np.ndarray
    seconds: float | None


class Losses:
    """What the steps of a round return, oldest first."""

    def __init__(self) -> None:
        self._in_flight: list[jax.Array] = []
        self._new: list[jax.Array] = []
        self._packed: list[tuple[int, list[jax.Array], float | None]] = []

    def add(self, loss: jax.Array) -> None:
        """Adds a step's losses, float32 [slots]."""
        self._in_flight.append(loss)
        self._new.append(loss)

    def wait(self, ahead: int = 0) -> int:
        """Waits until all steps but the last `ahead` are taken; returns how many that are more than the last time."""
        taken, self._in_flight = self._in_flight[: -ahead or None], self._in_flight[-ahead:] if ahead else []
        jax.block_until_ready(taken)
        return len(taken)

    def pack(self, step: int, seconds: float | None) -> None:
        """Makes an entry of what is new, if anything is."""
        if self._new:
            self._packed.append((step, self._new, seconds))
            self._new = []

    def read(self, left: int = 0) -> Iterator[Entry]:
        """Takes entries off, all but the last `left`; waits for them."""
        while len(self._packed) > left:
            step, losses, seconds = self._packed.pop(0)
            # Along data, devices hold the same members.
            parts = [{part.index[0].start or 0: part.data for part in loss.addressable_shards} for loss in losses]
            values = np.stack([np.concatenate([np.asarray(part[first]) for first in sorted(part)]) for part in parts])
            yield Entry(step, values, seconds)
