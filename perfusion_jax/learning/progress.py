"""What a person sees of a run while it learns: a bar, the loss, and how fast it goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from perfusion_jax.pod import chips
from perfusion_jax.pod.hlo_report import kernel_cost


class Meter:
    """Measures seconds a step, pauses left out: compiling, drawing, scoring and saving.

    Args:
        clock: seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._began = clock()
        self._steps = 0

    def count(self, steps: int) -> None:
        """Counts steps that were taken."""
        self._steps += steps

    def read(self) -> float | None:
        """Seconds a step since the last call; None if there was none."""
        now = self._clock()
        seconds = (now - self._began) / self._steps if self._steps else None
        self._began, self._steps = now, 0
        return seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within it, time does not count."""
        began = self._clock()
        try:
            yield
        finally:
            # What `read` was called within has begun anew there.
            self._began += self._clock() - max(began, self._began)


@dataclass(frozen=True)
class Work:
    """What a compiled step computes.

    Attributes:
        flops: floating-point operations of each device, by the compiler's count; 0 if it does not tell.
        peak: floating-point operations a second of a device by its data sheet; None if it is not known.
    """

    flops: float
    peak: float | None

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, device_kind: str, repeats: int) -> "Work":
        """Reads it from a compiled step.

        Args:
            compiled: the step.
            device_kind: of its devices, as JAX calls it.
            repeats: how often the step repeats what it does in a loop, which the compiler counts once.
        """
        chip = chips.CHIPS.get(device_kind)
        if chip is None:
            return cls(0.0, None)
        cost: Any = compiled.cost_analysis() or {}
        kernels, _ = kernel_cost(compiled.as_text() or "")
        return cls(repeats * (cost.get("flops", 0.0) + kernels), chips.find_chip(device_kind).flops)

    def utilisation(self, step_seconds: float) -> float | None:
        """Model FLOP utilisation: the share of the peak that a step of so many seconds reaches; None if unknown."""
        return self.flops / step_seconds / self.peak if self.peak and self.flops else None


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        position: steps taken, those of all concepts together.
        total: steps there are.
        rate: steps a second; None before it is known.
        words: what is being done, or how it goes.
    """

    position: int
    total: int
    rate: float | None
    words: str


class Bar:
    """The progress over all steps of a run.

    Args:
        total: steps, those of all concepts together.
        concepts: how many are to be learnt in this run.
        name: stands before the bar.
        shown: whether it is shown at all.
    """

    def __init__(self, total: int, concepts: int, name: str, shown: bool = True):
        self._steps_each = total / concepts
        self._concepts = concepts
        self._words = ""
        self._bar = tqdm(total=total, unit="step", desc=name, disable=not shown)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    def skip(self, steps: int) -> None:
        """Counts steps that are not taken in this run: not for its rate."""
        if not self._bar.disable:
            self._bar.n += steps
            self._bar.initial += steps
            self._bar.last_print_n += steps
            self._bar.refresh()

    @property
    def position(self) -> int:
        """Steps counted so far."""
        return int(self._bar.n)

    def return_to(self, position: int) -> None:
        """Goes back to where it was; what was counted since will be counted again."""
        if not self._bar.disable:
            self._bar.n = self._bar.last_print_n = position
            self._bar.initial = min(self._bar.initial, position)
            self._bar.refresh()

    def advance(self, steps: int) -> None:
        """Counts steps taken."""
        self._bar.update(steps)

    def read(self) -> Progress:
        """How far it has come."""
        facts = self._bar.format_dict
        return Progress(self.position, facts["total"], facts["rate"], self._words)

    def say(self, words: str) -> None:
        """Shows what is being done."""
        self._words = words
        self._bar.set_postfix_str(words)

    def show(self, loss: float, samples_per_second: float | None, utilisation: float | None) -> None:
        """Shows how it goes."""
        words = [f"loss {loss:.4f}"]
        if samples_per_second is not None:
            words.append(f"{samples_per_second:.3g} samples/s")
        if utilisation is not None:
            words.append(f"{utilisation:.0%} MFU")
        rate = self._bar.format_dict["rate"]
        if rate and self._concepts > 1:
            words.append(f"{3600 * rate / self._steps_each:.0f} concepts/h")
        self._words = ", ".join(words)
        self._bar.set_postfix_str(self._words, refresh=False)
