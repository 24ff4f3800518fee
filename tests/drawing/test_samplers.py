"""Samplers against the schedulers of PyTorch diffusers, on a network that is one line long."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from perfusion_jax import InputError
from perfusion_jax.base_model.schedule import NoiseSchedule
from perfusion_jax.drawing.samplers import make_plan

# diffusers asks PyTorch's tensors for NumPy arrays in the way of NumPy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x, timestep):
    return 0.7 * np.tanh(x + 0.3) - 0.2 * np.cos(timestep / 300)


def theirs(scheduler, x, skipped):
    """What diffusers' pipelines do: text to image, or, with skipped steps, image to image."""
    if skipped:
        if hasattr(scheduler, "set_begin_index"):  # DDIM keeps no index
            scheduler.set_begin_index(skipped)
    else:
        x = x * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps[skipped:]:
        scaled = scheduler.scale_model_input(torch.from_numpy(x), timestep).numpy()
        prediction = torch.from_numpy(network(scaled, float(timestep)))
        x = scheduler.step(prediction, timestep, torch.from_numpy(x)).prev_sample.numpy()
    return x


def ours(plan, prediction_type, x):
    """The recurrence of `denoising.take_step`, in NumPy."""
    before = np.zeros_like(x)
    for at in zip(*(np.asarray(field, np.float64) for field in plan[:-1]), strict=True):
        timestep, signal, noise, carry, current, previous = at
        predicted = network(x, timestep)
        pictures = {
            "epsilon": (x - noise * predicted) / max(signal, 1e-9),
            "v_prediction": signal * x - noise * predicted,
        }
        picture = pictures[prediction_type]
        x, before = carry * x + current * picture + previous * before, picture
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_walks_as_diffusers_does(sampler, spacing, prediction_type):
    config = {**BETAS, "timestep_spacing": spacing, "steps_offset": 1, "prediction_type": prediction_type}
    if sampler == "ddim":
        config |= {"clip_sample": False, "set_alpha_to_one": False}
    scheduler = SCHEDULERS[sampler](**config)
    schedule = NoiseSchedule.from_config(dict(scheduler.config), "test")
    start = np.random.default_rng(0).standard_normal((5, 7))
    for steps, skipped in ((1, 0), (2, 0), (7, 0), (14, 0), (15, 0), (50, 0), (20, 8)):
        scheduler.set_timesteps(steps)
        plan = make_plan(schedule, sampler, steps, skipped)
        np.testing.assert_allclose(plan.timesteps, scheduler.timesteps[skipped:], atol=1e-3)
        x = start * float(plan.start)
        if skipped:  # both begin at the noise level of the first step that is left
            x = start
            signal = float(plan.signal[0]) if sampler == "euler" else 1.0  # its coordinates are x / alpha
            expected = theirs(scheduler, x / signal, skipped)
        else:
            expected = theirs(scheduler, start, 0)
        np.testing.assert_allclose(ours(plan, prediction_type, x), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_schedule_that_ends_in_pure_noise(sampler):
    """Lin et al.'s rescaled betas: nothing is left of the picture at the last timestep, where sampling starts."""
    config = {
        **BETAS,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    if sampler == "ddim":
        config |= {"clip_sample": False}
    scheduler = SCHEDULERS[sampler](**config)
    scheduler.set_timesteps(20)
    plan = make_plan(NoiseSchedule.from_config(dict(scheduler.config), "test"), sampler, 20)
    start = np.random.default_rng(0).standard_normal((5, 7))
    expected = theirs(scheduler, start, 0)
    np.testing.assert_allclose(
        ours(plan, "v_prediction", start * float(plan.start)), expected, atol=1e-3 * np.abs(expected).max()
    )


def test_the_spacing_is_the_default_of_the_scheduler_that_the_checkpoint_names():
    for name, first in (("DDIMScheduler", 980), ("PNDMScheduler", 980), ("EulerDiscreteScheduler", 999)):
        schedule = NoiseSchedule.from_config({**BETAS, "_class_name": name}, "test")
        assert float(make_plan(schedule, "euler", 50).timesteps[0]) == first


def test_impossible_plans_are_refused():
    schedule = NoiseSchedule.from_config(BETAS, "test")
    with pytest.raises(InputError, match="1001 sampling steps: this model's schedule allows 1 to 1000"):
        make_plan(schedule, "ddim", 1001)
    with pytest.raises(InputError, match="'heun' is not one of ddim, dpm\\+\\+, euler"):
        make_plan(schedule, "heun", 20)
    with pytest.raises(InputError, match="at least one must be left"):
        make_plan(schedule, "ddim", 20, skipped=20)
    odd = NoiseSchedule.from_config({**BETAS, "timestep_spacing": "golden"}, "test")
    with pytest.raises(InputError, match="timestep_spacing 'golden'"):
        make_plan(odd, "ddim", 20)
