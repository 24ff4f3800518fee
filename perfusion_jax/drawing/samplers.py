"""The samplers: how a schedule of noise is walked, from noise to picture.

All of them read the network's estimate of the finished picture, x_0, and step linearly in it, so a sampler is a table
of coefficients, computed here once in float64:

    x_next = carry x + current x_0 + previous x_0' + fresh n        x_0' of the step before, n standard normal

    ddim       Song et al., arXiv 2010.02502, eq. 12 without added noise
    dpm++      DPM-Solver++ (2M), Lu et al., arXiv 2211.01095, algorithm 2
    euler      Karras et al., arXiv 2206.00364, algorithm 1 without churn; in its coordinates, x / alpha
    euler_a    the same with noise put back after each step (k-diffusion's and diffusers' ancestral sampler)

Of the options of a checkpoint's scheduler, those that change its steps are honoured or refused, never passed over.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float32, Float64, Real

from perfusion_jax.base_model.schedule import NoiseSchedule
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.names import SAMPLERS, SPACINGS

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
        carry, current, previous, fresh: the step's coefficients.
        start: the standard deviation of the pure noise that the sampler starts from, a scalar.
    """

    timesteps: Float32[Array, "*steps"]
    signal: Float32[Array, "*steps"]
    noise: Float32[Array, "*steps"]
    carry: Float32[Array, "*steps"]
    current: Float32[Array, "*steps"]
    previous: Float32[Array, "*steps"]
    fresh: Float32[Array, "*steps"]
    start: Float32[Array, ""]

    def at(self, step: int) -> "Plan":
        """The row of one step, all scalars."""
        return self._replace(**{name: column[step] for name, column in self._asdict().items() if name != "start"})


def sampler_and_steps(schedule: NoiseSchedule, sampler: str | None, steps: int | None) -> tuple[str, int]:
    """Returns the sampler and the number of steps: those given, or else the checkpoint's sampler and its usual number.

    Args:
        schedule: the checkpoint's, whose scheduler's class says which sampler is its own. Of a class that is none of
            these, DDIM takes the place, and a warning says so.
        sampler: one of SAMPLERS, or None.
        steps: how many, or None.

    Raises:
        InputError: no such sampler.
    """
    if sampler is None:
        name = schedule.config.get("_class_name", "")
        sampler = next((own for prefix, own in _OWN_SAMPLERS if name.startswith(prefix)), None)
        if sampler is None:
            sampler = "ddim"
            if name:
                _warn_of_another(name, sampler)
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    return sampler, DEFAULT_STEPS[sampler] if steps is None else steps


def check_named(schedule: NoiseSchedule, sampler: str | None) -> None:
    """Sees that a sampler is named where the checkpoint was distilled for one that is not here.

    Raises:
        InputError: it is not.
    """
    name = schedule.config.get("_class_name", "")
    if sampler is None and name.startswith(_OF_FEW_STEPS):
        raise InputError(
            f"the base model's scheduler is {name}, which is not here: name one of {', '.join(SAMPLERS)}, such as "
            "euler_a with 4 to 8 steps and guidance 1"
        )


@functools.cache  # once for each
def _warn_of_another(name: str, sampler: str) -> None:
    logging.warning("the base model's scheduler is %s, which is not here: %s draws in its place", name, sampler)


def spaced(schedule: NoiseSchedule, spacing: str | None) -> NoiseSchedule:
    """The schedule with another spacing of timesteps.

    Args:
        schedule: the checkpoint's.
        spacing: `leading`, `trailing` or `linspace` (diffusers' `timestep_spacing`), or None for its own.
    """
    if spacing is None:
        return schedule
    return dataclasses.replace(schedule, config={**schedule.config, "timestep_spacing": spacing})


def make_plan(schedule: NoiseSchedule, sampler: str, steps: int, skipped: int = 0) -> Plan:
    """Plans the steps as diffusers' scheduler of that kind does from the checkpoint's scheduler config.

    Args:
        schedule: the checkpoint's.
        sampler: one of SAMPLERS.
        steps: in how many the whole schedule is walked.
        skipped: how many of them, from the noisy end, are left out; then what follows starts from a picture.

    Raises:
        InputError: no such sampler, a number of steps that the schedule does not have, or an option of the checkpoint's
            scheduler that this sampler cannot follow.
    """
    sampler_and_steps(schedule, sampler, steps)
    _check_options(schedule, sampler)
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise InputError(f"{steps} sampling steps: this model's schedule allows 1 to {total}")
    if not 0 <= skipped < steps:
        raise InputError(f"{skipped} of {steps} sampling steps left out: at least one must be left")
    plan = _COLUMNS[sampler](schedule, steps, skipped)
    return Plan(*(jnp.asarray(column, jnp.float32) for column in plan))


def _check_options(schedule: NoiseSchedule, sampler: str) -> None:
    """Refuses options of the checkpoint's scheduler that a sampler would read and cannot follow.

    Raises:
        InputError: there is one.
    """
    config = schedule.config
    for key, followed, samplers in _OPTIONS:
        # diffusers' DDIM clips unless it is told not to.
        clips = key == "clip_sample" and config.get("_class_name") == "DDIMScheduler"
        value = config.get(key, True if clips else followed[0])
        if sampler in samplers and value not in followed:
            others = " or ".join(other for other in SAMPLERS if other not in samplers)
            raise InputError(
                f"scheduler_config.json of the base model says {key} = {value!r}, which the sampler {sampler} cannot "
                f"follow: take the sampler {others}, or set {key} to {followed[0]!r} in a copy of the model"
            )


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
    if spacing not in SPACINGS:
        raise InputError(f"timestep_spacing {spacing!r} of the scheduler is not one of {', '.join(SPACINGS)}")
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
    none = np.zeros_like(current)
    return timesteps, signal, noise, carry, current, none, none, 1.0


def _all_sigmas(schedule: NoiseSchedule) -> Float64[np.ndarray, " timesteps"]:
    """Noise per signal at each timestep."""
    kept = _kept(schedule, divided=True)
    return np.sqrt((1 - kept) / kept)


def _last_sigma(schedule: NoiseSchedule) -> float:
    """Noise per signal after the last step."""
    return _all_sigmas(schedule)[0] if schedule.config.get("final_sigmas_type", "zero") == "sigma_min" else 0.0


def _sigmas(schedule: NoiseSchedule, timesteps: Real[np.ndarray, " steps"]) -> Float64[np.ndarray, " steps"]:
    """Noise per signal at timesteps, also between whole ones."""
    every = _all_sigmas(schedule)
    return np.interp(timesteps, np.arange(len(every)), every)


def _karras(
    schedule: NoiseSchedule, most: float, least: float, steps: int
) -> tuple[Float64[np.ndarray, " {steps}"], Float64[np.ndarray, " {steps}"]]:
    """Timesteps, and noise per signal spaced as Karras et al. do (eq. 5, rho = 7)."""
    sigmas = np.linspace(most ** (1 / 7), least ** (1 / 7), steps) ** 7
    every = np.log(_all_sigmas(schedule))
    return np.interp(np.log(sigmas), every, np.arange(len(every))), sigmas


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
    if schedule.config.get("use_karras_sigmas"):
        every = _all_sigmas(schedule)
        spaced, sigmas = _karras(schedule, every[-1], every[0], steps)
        if schedule.config.get("beta_schedule") != "squaredcos_cap_v2":
            spaced = spaced.round()
        spaced = np.trunc(spaced)  # diffusers keeps whole timesteps, and the noise between them
    else:
        sigmas = _sigmas(schedule, spaced)
    timesteps, sigmas = spaced[skipped:], np.append(sigmas[skipped:], _last_sigma(schedule))
    signal, noise = _signal_and_noise(sigmas)
    with np.errstate(divide="ignore"):
        log_ratio = -np.log(sigmas)  # lambda; infinite where no noise is left
    width = np.diff(log_ratio)
    first_order = -signal[1:] * np.expm1(-width)
    # Half of (h / h_before) of the difference between this estimate and the one before.
    correction = np.zeros_like(width)
    correction[1:] = first_order[1:] * 0.5 * width[1:] / width[:-1]
    ends_lower = (steps < _SHORT and schedule.config.get("lower_order_final", True)) or schedule.config.get(
        "euler_at_final", False
    )
    if sigmas[-1] == 0 or ends_lower:
        correction[-1] = 0.0
    carry, current = noise[1:] / noise[:-1], first_order + correction
    return timesteps, signal[:-1], noise[:-1], carry, current, -correction, np.zeros_like(current), 1.0


def _euler(schedule: NoiseSchedule, steps: int, skipped: int) -> Columns:
    timesteps = _spaced(schedule, steps)
    sigmas = _sigmas(schedule, timesteps)
    if schedule.config.get("use_karras_sigmas"):
        timesteps, sigmas = _karras(schedule, sigmas[0], sigmas[-1], steps)
    return _euler_steps(schedule, timesteps[skipped:], np.append(sigmas[skipped:], _last_sigma(schedule)), fresh=False)


def _euler_ancestral(schedule: NoiseSchedule, steps: int, skipped: int) -> Columns:
    timesteps = _spaced(schedule, steps)[skipped:]
    return _euler_steps(schedule, timesteps, np.append(_sigmas(schedule, timesteps), 0.0), fresh=True)


def _euler_steps(
    schedule: NoiseSchedule,
    timesteps: Float64[np.ndarray, " steps"],
    sigmas: Float64[np.ndarray, " steps+1"],
    fresh: bool,
) -> Columns:
    """Euler's steps along noise per signal; with `fresh` noise, each goes further down and is noised up again."""
    signal, noise = _signal_and_noise(sigmas)
    signal[-1] = 1.0  # it ends in its own coordinates, also where noise is left
    before, after = sigmas[:-1], sigmas[1:]
    up = after * np.sqrt(1 - (after / before) ** 2) if fresh else np.zeros_like(after)
    ratio = np.sqrt(after**2 - up**2) / before
    carry, current = ratio * signal[1:] / signal[:-1], (1 - ratio) * signal[1:]
    # In its coordinates the noise is sqrt(sigma^2 + 1) where timesteps lead, else sigma; here that is scaled by alpha.
    start = 1.0 if _spacing(schedule) == "leading" else noise[0]
    return timesteps, signal[:-1], noise[:-1], carry, current, np.zeros_like(current), up * signal[1:], start


_COLUMNS: dict[str, Callable[[NoiseSchedule, int, int], Columns]] = {
    "ddim": _ddim,
    "dpm++": _dpm,
    "euler": _euler,
    "euler_a": _euler_ancestral,
}
DEFAULT_STEPS = {"ddim": 50, "dpm++": 20, "euler": 30, "euler_a": 30}
# Of a checkpoint, by the beginning of its scheduler's class.
_OWN_SAMPLERS = (
    *(("EulerAncestral", "euler_a"), ("Euler", "euler"), ("DPMSolver", "dpm++")),
    *(("DDIMScheduler", "ddim"), ("PNDMScheduler", "ddim"), ("DDPMScheduler", "ddim")),
)
# Consistency models' (arXiv 2310.04378, 2402.19159); DDIM in its usual number of steps would draw nothing of worth.
_OF_FEW_STEPS = ("LCM", "TCD")
# Options of diffusers' schedulers that change steps: values that are followed, and by which samplers an option is read.
_SOLVERS = ("dpm++", "euler")
_OPTIONS: tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...] = (
    ("clip_sample", (False,), ("ddim",)),
    ("thresholding", (False,), ("ddim", "dpm++")),
    ("use_exponential_sigmas", (False, None), _SOLVERS),
    ("use_beta_sigmas", (False, None), _SOLVERS),
    ("final_sigmas_type", ("zero", "sigma_min"), _SOLVERS),
    ("interpolation_type", ("linear",), ("euler",)),
    ("timestep_type", ("discrete",), ("euler",)),
    ("sigma_min", (None,), ("euler",)),
    ("sigma_max", (None,), ("euler",)),
    ("solver_order", (2,), ("dpm++",)),
    ("algorithm_type", ("dpmsolver++",), ("dpm++",)),
    ("solver_type", ("midpoint",), ("dpm++",)),
    ("use_lu_lambdas", (False,), ("dpm++",)),
    ("use_flow_sigmas", (False,), ("dpm++",)),
    ("use_dynamic_shifting", (False,), ("dpm++",)),
    ("lambda_min_clipped", (-np.inf, None), ("dpm++",)),
    ("variance_type", (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"), ("dpm++",)),
)
