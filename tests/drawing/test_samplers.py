"""Samplers against the schedulers of PyTorch diffusers, on a network that is one line long."""

import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete

from perfusion_jax import InputError
from perfusion_jax.base_model.schedule import NoiseSchedule
from perfusion_jax.drawing.samplers import check_named, make_plan, sampler_and_steps, spaced

# diffusers asks PyTorch's tensors for NumPy arrays in the way of NumPy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# What a sampler puts back after each step.
FRESH = np.random.default_rng(1).standard_normal((5, 7))


@pytest.fixture(autouse=True)
def _fresh_noise(monkeypatch):
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: torch.from_numpy(FRESH))


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
        timestep, signal, noise, carry, current, previous, fresh = at
        predicted = network(x, timestep)
        pictures = {
            "epsilon": (x - noise * predicted) / max(signal, 1e-9),
            "v_prediction": signal * x - noise * predicted,
        }
        picture = pictures[prediction_type]
        x, before = carry * x + current * picture + previous * before + fresh * FRESH, picture
    return x


def assert_walks_alike(sampler, config):
    prediction_type = config["prediction_type"]
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
            signal = float(plan.signal[0]) if sampler.startswith("euler") else 1.0  # its coordinates are x / alpha
            expected = theirs(scheduler, x / signal, skipped)
        else:
            expected = theirs(scheduler, start, 0)
        np.testing.assert_allclose(ours(plan, prediction_type, x), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_walks_as_diffusers_does(sampler, spacing, prediction_type):
    config = {**BETAS, "timestep_spacing": spacing, "steps_offset": 1, "prediction_type": prediction_type}
    if sampler == "ddim":
        config |= {"clip_sample": False, "set_alpha_to_one": False}
    assert_walks_alike(sampler, config)


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"},
    ],
)
@pytest.mark.parametrize("sampler", ["dpm++", "euler"])
def test_options_are_followed_as_diffusers_does(sampler, options):
    assert_walks_alike(sampler, {**BETAS, "prediction_type": "epsilon", **options})


def test_the_last_step_of_dpm_may_be_of_first_order():
    assert_walks_alike(
        "dpm++", {**BETAS, "prediction_type": "epsilon", "euler_at_final": True, "final_sigmas_type": "sigma_min"}
    )


@pytest.mark.parametrize(
    ("sampler", "option", "value"),
    [
        ("ddim", "clip_sample", True),
        ("ddim", "thresholding", True),
        ("dpm++", "thresholding", True),
        ("dpm++", "solver_order", 3),
        ("dpm++", "algorithm_type", "sde-dpmsolver++"),
        ("dpm++", "solver_type", "heun"),
        ("dpm++", "use_lu_lambdas", True),
        ("dpm++", "lambda_min_clipped", -5.1),
        ("dpm++", "variance_type", "learned_range"),
        ("dpm++", "final_sigmas_type", "golden"),
        ("euler", "use_exponential_sigmas", True),
        ("euler", "use_beta_sigmas", True),
        ("euler", "interpolation_type", "log_linear"),
        ("euler", "timestep_type", "continuous"),
        ("euler", "sigma_max", 10.0),
    ],
)
def test_options_that_cannot_be_followed_are_refused_by_the_samplers_that_read_them(sampler, option, value):
    schedule = NoiseSchedule.from_config({**BETAS, option: value}, "test")
    with pytest.raises(InputError, match=rf"{option} = .*the sampler {re.escape(sampler)} cannot follow: take"):
        make_plan(schedule, sampler, 20)
    make_plan(schedule, "euler_a", 20)


def test_ddim_clips_unless_it_is_told_not_to():
    schedule = NoiseSchedule.from_config({**BETAS, "_class_name": "DDIMScheduler"}, "test")
    with pytest.raises(InputError, match="clip_sample = True"):
        make_plan(schedule, "ddim", 20)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_schedulers_of_another_kind_are_refused(name):
    with pytest.raises(InputError, match=f"{name} adds noise in another way"):
        NoiseSchedule.from_config({"_class_name": name}, "test")


@pytest.mark.parametrize(
    ("name", "sampler", "steps"),
    [
        ("DDIMScheduler", "ddim", 50),
        ("PNDMScheduler", "ddim", 50),
        ("DPMSolverMultistepScheduler", "dpm++", 20),
        ("EulerDiscreteScheduler", "euler", 30),
        ("EulerAncestralDiscreteScheduler", "euler_a", 30),
    ],
)
def test_a_checkpoint_has_a_sampler_of_its_own(name, sampler, steps):
    schedule = NoiseSchedule.from_config({**BETAS, "_class_name": name}, "test")
    assert sampler_and_steps(schedule, None, None) == (sampler, steps)
    assert sampler_and_steps(schedule, None, 4) == (sampler, 4)
    assert sampler_and_steps(schedule, "dpm++", None) == ("dpm++", 20)


def test_in_place_of_another_sampler_ddim_draws_and_a_warning_says_so(caplog):
    schedule = NoiseSchedule.from_config({**BETAS, "_class_name": "UniPCMultistepScheduler"}, "test")
    for _ in range(2):
        assert sampler_and_steps(schedule, None, None) == ("ddim", 50)
    assert sampler_and_steps(schedule, "euler", None) == ("euler", 30)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "the base model's scheduler is UniPCMultistepScheduler, which is not here: ddim draws in its place"


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_of_models_distilled_for_another_sampler_one_must_be_named(name):
    schedule = NoiseSchedule.from_config({**BETAS, "_class_name": name}, "test")
    with pytest.raises(InputError, match=f"scheduler is {name}, which is not here: name one of ddim"):
        check_named(schedule, None)
    check_named(schedule, "euler_a")
    assert sampler_and_steps(schedule, None, 20) == ("ddim", 20)  # where none can be named, as while one learns


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_timesteps_are_spaced_as_one_asks(sampler, spacing):
    own = "leading" if spacing != "leading" else "trailing"
    schedule = NoiseSchedule.from_config({**BETAS, "timestep_spacing": own}, "test")
    asked = make_plan(spaced(schedule, spacing), sampler, 4)
    expected = make_plan(NoiseSchedule.from_config({**BETAS, "timestep_spacing": spacing}, "test"), sampler, 4)
    for ours, theirs_ in zip(asked, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs_)
    assert spaced(schedule, None) is schedule


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
    with pytest.raises(InputError, match="'heun' is not one of ddim, dpm\\+\\+, euler, euler_a"):
        make_plan(schedule, "heun", 20)
    with pytest.raises(InputError, match="at least one must be left"):
        make_plan(schedule, "ddim", 20, skipped=20)
    odd = NoiseSchedule.from_config({**BETAS, "timestep_spacing": "golden"}, "test")
    with pytest.raises(InputError, match="timestep_spacing 'golden'"):
        make_plan(odd, "ddim", 20)
