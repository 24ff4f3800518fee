"""What helps to find out why a run is slow or diverges: `--profile` and `--debug_nans`."""

import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from absl import logging

from perfusion_jax.base_model import Architecture
from perfusion_jax.data.examples import Examples
from perfusion_jax.learning.step import Learning, Settings, loss_and_gradient
from perfusion_jax.method.surgery import Params
from perfusion_jax.runtime.errors import out_of_memory


class Diagnostics(NamedTuple):
    """What is asked for.

    Attributes:
        profile: steps of this run that are traced: the first, and the one after the last; None for none.
        debug_nans: whether to tell which operation gave the first NaN of a loss or gradient that is not finite.
    """

    profile: tuple[int, int] | None = None
    debug_nans: bool = False


class Profiler:
    """Traces some steps of a run with `jax.profiler`.

    Args:
        folder: where the trace goes; TensorBoard and Perfetto read it.
        steps: first, and the one after the last, counted from the first step of this run.
    """

    def __init__(self, folder: str, steps: tuple[int, int] | None):
        self._folder, self._first, self._end = folder, *(steps or (-1, -1))
        self._taken = 0
        self._tracing = False

    def before_step(self, wait: Callable[[], None]) -> None:
        """Begins or ends the trace; `wait` waits for the steps that are under way."""
        if self._taken == self._first:
            wait()
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif self._taken == self._end:
            wait()
            self.close()
        self._taken += 1

    def close(self) -> None:
        """Ends the trace, if one is open; warns if none was ever begun."""
        if self._first >= self._taken:
            logging.warning("--profile: this run took %d steps; none was traced", self._taken)
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def first_nan(
    model: Architecture,
    params: dict[str, Params],
    whitening: jax.Array | None,
    examples: Examples,
    learning: Learning,
    key: jax.Array,
    settings: Settings,
) -> str:
    """Repeats the step that diverged, operation by operation.

    Args:
        model, params, whitening, key, settings: as for `step.train_step`, on one device.
        examples: likewise, or on the host.
        learning: likewise; the state before that step is what a concept that has diverged keeps.

    Returns:
        Which operation gave the first NaN, and where; or why that is not known.

    Raises:
        jax.errors.JaxRuntimeError: the device fails.
    """
    # A sample at a time, and operation by operation: nothing is computed away, and what is no number is seen at once.
    settings = dataclasses.replace(settings, accumulation=settings.batch_size)
    examples, learning = jax.device_put((examples, learning))
    try:
        with jax.debug_nans(True), jax.disable_jit():
            (loss, _), gradient = loss_and_gradient(model, params, whitening, examples, learning, key, settings)
    except FloatingPointError as error:
        operation = str(error).partition("encountered in ")[2].partition(".")[0] or "an operation"
        return f"the first NaN came from {operation} {_place(error)}"
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return "memory does not suffice to repeat the step operation by operation"
    if jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient)):
        return "repeated by itself, the step was finite"
    return "no operation gave NaN: numbers grew to infinity"


def _place(error: Exception) -> str:
    """The innermost line of this program, or of a library of networks, that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = tuple(str(Path(module.__file__).parent) for module in (jax, flax) if module.__file__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if own[-1].name == "of_part":
        return "in the gradient"
    return f"in {own[-1].name}, {own[-1].filename}:{own[-1].lineno}"
