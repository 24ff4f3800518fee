import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from perfusion_jax import InputError
from perfusion_jax.base_model.schedule import NoiseSchedule


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_targets_equal_pytorch(beta_schedule, zero_snr):
    theirs = DDPMScheduler(
        beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr
    )
    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, 4, 8, 8, 4), dtype=np.float32)
    timesteps = np.array([0, 10, 500, 998])
    arguments = [torch.from_numpy(a) for a in (latents, noise, timesteps)]
    epsilon = NoiseSchedule.from_config(dict(theirs.config), "test")
    velocity = NoiseSchedule.from_config({**theirs.config, "prediction_type": "v_prediction"}, "test")
    np.testing.assert_allclose(epsilon.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(epsilon.add_noise(latents, noise, timesteps), theirs.add_noise(*arguments), atol=1e-4)
    np.testing.assert_allclose(velocity.target(latents, noise, timesteps), theirs.get_velocity(*arguments), atol=1e-4)
    np.testing.assert_array_equal(epsilon.target(latents, noise, timesteps), noise)
    assert epsilon.num_train_timesteps == 1000


def test_min_snr_weights_are_those_of_diffusers_scripts():
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    timesteps = np.array([0, 50, 300, 999])
    snr = compute_snr(theirs, torch.from_numpy(timesteps))
    for prediction_type, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        schedule = NoiseSchedule.from_config({**theirs.config, "prediction_type": prediction_type}, "test")
        expected = torch.clamp(snr, max=5) / divisor
        np.testing.assert_allclose(schedule.loss_weights(timesteps, 5.0), expected, rtol=1e-3)


def test_given_betas_win():
    schedule = NoiseSchedule.from_config({"trained_betas": [0.1, 0.2]}, "test")
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.72])
    assert schedule.add_noise(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([1])).dtype == jnp.float32


@pytest.mark.parametrize("change", [{"beta_schedule": "sigmoid"}, {"prediction_type": "sample"}])
def test_unknown_settings_are_refused_by_name(change):
    with pytest.raises(InputError, match=f"scheduler.json: {next(iter(change))}"):
        NoiseSchedule.from_config(change, "scheduler.json")
