"""The samplers: how a schedule of noise is walked, from noise to picture.

All of them read the network's estimate of the finished picture, x_0, and step linearly in it, so a sampler is a table
of coefficients, computed here once in float64:

    x_next = carry x + current x_0 + previous x_0'        x_0' of the step before

    ddim     Song et al., arXiv 2010.02502, eq. 12 without added noise
    dpm++    DPM-Solver++ (2M), Lu et al., arXiv 2211.01095, algorithm 2
    euler    Karras et al., arXiv 2206.00364, algorithm 1 without churn; in its coordinates, x / alpha
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Real

from perfusion_jax.base_model.schedule import NoiseSchedule
from perfusion_jax.runtime.errors import InputError

# Fewer steps than these end with a first-order step (diffusers' `lower_order_final`).
_SHORT = 15
# Signal left at the end of a schedule that has none, for the solvers that divide by it (diffusers).
_LEAST_KEPT = 2.0**-24

# The fields of a Plan before they are rounded to float32.
Columns = tuple[Real[np.ndarray, " steps"] | float, ...]


class Plan(NamedTuple):
    """The steps of a sampler; float32 [steps] each but `start`.

    Attributes:
        timesteps: for the network; those of `euler` may lie between whole ones.
        signal, noise: alpha and sigma before the step: x = alpha x_0 + sigma epsilon.
        carry, current, previous: the step's coefficients.
        start: the standard deviation of the pure noise that the sampler starts from, a scalar.
    """

    timesteps: Float32[Array, "*steps"]
    signal: Float32[Array, "*steps"]
    noise: Float32[Array, "*steps"]
    carry: Float32[Array, "*steps"]
    current: Float32[Array, "*steps"]
    previous: Float32[Array, "*steps"]
    start: Float32[Array, ""]


def make_plan(schedule: NoiseSchedule, sampler: str, steps: int, skipped: int = 0) -> Plan:
    """Plans the steps as diffusers' scheduler of that kind does from the checkpoint's scheduler config.

    Args:
        schedule: the checkpoint's.
        sampler: a key of SAMPLERS.
        steps: in how many the whole schedule is walked.
        skipped: how many of them, from the noisy end, are left out; then what follows starts from a picture.

    Raises:
        InputError: no such sampler or spacing of timesteps, or a number of steps that the schedule does not have.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise InputError(f"{steps} sampling steps: this model's schedule allows 1 to {total}")
    if not 0 <= skipped < steps:
        raise InputError(f"{skipped} of {steps} sampling steps left out: at least one must be left")
    plan = SAMPLERS[sampler](schedule, steps, skipped)
    return Plan(*(jnp.asarray(column, jnp.float32) for column in plan))


def _kept(schedule: NoiseSchedule, divided: bool) -> Float64[np.ndarray, " timesteps"]:
    """The share of the signal's variance left at each timestep, float64; never zero where it is divided by."""
    kept = schedule.alphas_cumprod.astype(np.float64)
    if divided and schedule.config.get("rescale_betas_zero_snr"):
        kept[-1] = _LEAST_KEPT
    return kept


def _spaced(schedule: NoiseSchedule, steps: int) -> Float64[np.ndarray, " {steps}"]:
    """Timesteps, float64 [steps], the noisiest first, before any rounding of `linspace`."""
    total = schedule.num_train_timesteps
    spacing = _spacing(schedule)
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps) + float(schedule.config.get("steps_offset", 0))
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps)[:steps]) - 1
    return np.linspace(0, total - 1, steps)[::-1]


def _spacing(schedule: NoiseSchedule) -> str:
    """How timesteps are spaced: as the config says, or by the default of the scheduler that it names."""
    name = schedule.config.get("_class_name", "")
    default = "linspace" if name.startswith(("DPMSolver", "Euler", "LMS", "KDPM", "Heun")) else "leading"
    spacing = schedule.config.get("timestep_spacing", default)
    if spacing not in ("leading", "trailing", "linspace"):
        raise InputError(f"timestep_spacing {spacing!r} of the scheduler is not one of leading, trailing, linspace")
    return spacing


def _ddim(schedule: NoiseSchedule, steps: int, skipped: int) -> Columns:
    total = schedule.num_train_timesteps
    timesteps = np.clip(np.round(_spaced(schedule, steps)), 0, total - 1).astype(int)[skipped:]
    kept = _kept(schedule, divided=False)
    after = timesteps - total // steps
    last = 1.0 if schedule.config.get("set_alpha_to_one", True) else kept[0]
    kept_after = np.where(after < 0, last, kept[after])
    signal, noise = np.sqrt(kept[timesteps]), np.sqrt(1 - kept[timesteps])
    carry = np.sqrt(1 - kept_after) / noise
    current = np.sqrt(kept_after) - signal * carry
    return timesteps, signal, noise, carry, current, np.zeros_like(current), 1.0


def _sigmas(schedule: NoiseSchedule, timesteps: Real[np.ndarray, " steps"]) -> Float64[np.ndarray, " steps+1"]:
    """Noise per signal at timesteps, also between whole ones, and after the last step: float64 [steps + 1]."""
    kept = _kept(schedule, divided=True)
    every = np.sqrt((1 - kept) / kept)
    last = every[0] if schedule.config.get("final_sigmas_type", "zero") == "sigma_min" else 0.0
    return np.append(np.interp(timesteps, np.arange(len(every)), every), last)


def _signal_and_noise(
    sigmas: Float64[np.ndarray, " steps"],
) -> tuple[Float64[np.ndarray, " steps"], Float64[np.ndarray, " steps"]]:
    signal = 1 / np.sqrt(sigmas**2 + 1)
    return signal, sigmas * signal


def _dpm(schedule: NoiseSchedule, steps: int, skipped: int) -> Columns:
    total = schedule.num_train_timesteps
    if _spacing(schedule) == "leading":
        # Unlike the others, this one plans one step more and leaves out the last.
        spaced = np.arange(steps + 1)[::-1][:-1] * (total // (steps + 1)) + schedule.config.get("steps_offset", 0)
    elif _spacing(schedule) == "linspace":
        spaced = np.round(np.linspace(0, total - 1, steps + 1))[::-1][:-1]
    else:
        spaced = _spaced(schedule, steps)
    timesteps = spaced[skipped:]
    sigmas = _sigmas(schedule, timesteps)
    signal, noise = _signal_and_noise(sigmas)
    with np.errstate(divide="ignore"):
        log_ratio = -np.log(sigmas)  # lambda; infinite where no noise is left
    width = np.diff(log_ratio)
    first_order = -signal[1:] * np.expm1(-width)
    # Half of (h / h_before) of the difference between this estimate and the one before.
    correction = np.zeros_like(width)
    correction[1:] = first_order[1:] * 0.5 * width[1:] / width[:-1]
    if sigmas[-1] == 0 or (steps < _SHORT and schedule.config.get("lower_order_final", True)):
        correction[-1] = 0.0
    return timesteps, signal[:-1], noise[:-1], noise[1:] / noise[:-1], first_order + correction, -correction, 1.0


def _euler(schedule: NoiseSchedule, steps: int, skipped: int) -> Columns:
    timesteps = _spaced(schedule, steps)[skipped:]
    sigmas = _sigmas(schedule, timesteps)
    signal, noise = _signal_and_noise(sigmas)
    ratio = sigmas[1:] / sigmas[:-1]
    carry, current = ratio * signal[1:] / signal[:-1], (1 - ratio) * signal[1:]
    # In its coordinates the noise is sqrt(sigma^2 + 1) where timesteps lead, else sigma; here that is scaled by alpha.
    start = 1.0 if _spacing(schedule) == "leading" else noise[0]
    return timesteps, signal[:-1], noise[:-1], carry, current, np.zeros_like(current), start


SAMPLERS: dict[str, Callable[[NoiseSchedule, int, int], Columns]] = {"ddim": _ddim, "dpm++": _dpm, "euler": _euler}
DEFAULT_STEPS = {"ddim": 50, "dpm++": 20, "euler": 30}
