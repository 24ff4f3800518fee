"""Sampling against PyTorch diffusers' own pipeline on the same weights, prompts and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion_jax import Gate, InputError, insert, keys_values, remove
from perfusion_jax.base_model.schedule import NoiseSchedule
from perfusion_jax.sampling import ddim_steps, draw, generate, noise_for, sample_latents, to_pixels

PROMPTS = ["a photo of a dog", "the teddy bear on the beach"]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_timesteps_are_those_of_diffusers(spacing, steps):
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule.from_config(dict(theirs.config), "test")
    np.testing.assert_array_equal(ddim_steps(schedule, steps).timesteps, theirs.timesteps)


def test_latents_after_fifty_steps_equal_pytorch(folder, base):
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_for(base, [3, 4], 32, 32)
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=50,
        guidance_scale=6.0,
        latents=torch.from_numpy(np.asarray(noise).transpose(0, 3, 1, 2).copy()),
        output_type="latent",
    ).images.numpy()
    unet = base.params["unet"]
    prompted, unprompted = (
        keys_values(unet, base.encode(base.params["text_encoder"], base.tokenizer(texts)))
        for texts in (PROMPTS, ["", ""])
    )
    ours = np.asarray(sample_latents(base, unet, prompted, unprompted, noise, 50, 6.0)).transpose(0, 3, 1, 2)
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(base):
    options = {"steps": 3, "height": 32, "width": 32, "batch_size": 2}
    together = generate(base, [*PROMPTS, PROMPTS[0]], [5, 6, 7], **options)
    alone = generate(base, [PROMPTS[1]], [6], **options)
    assert together.shape == (3, 32, 32, 3)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert np.abs(together[0].astype(int) - together[2]).max() > 5


def test_a_concept_still_untrained_draws_its_super_category(base):
    whitening = jnp.eye(base.context_width)
    concept = base.new_concept("dog", whitening)
    options = {"steps": 3, "height": 32, "width": 32, "batch_size": 1}
    plain = generate(base, ["a photo of a dog"], [0], **options)
    closed = Gate(bias=0.6, temperature=0.15, strength=0.0)
    shut = generate(base, ["a photo of a <rex>"], [0], concepts={"<rex>": concept}, gates=closed, **options)
    assert np.abs(plain.astype(int) - shut).max() <= 1
    opened = Gate(bias=0.6, temperature=0.15, strength=1.0)
    edited = generate(base, ["a photo of a <rex>"], [0], concepts={"<rex>": concept}, gates=opened, **options)
    assert np.abs(plain.astype(int) - edited).max() > 1


def test_the_unconditional_prompt_goes_through_the_frozen_weights(sd1_base):
    concept = sd1_base.new_concept("dog", jnp.eye(sd1_base.context_width))
    stacked = jax.tree.map(lambda leaf: 1.3 * leaf[None], concept)
    params, gate = sd1_base.params, Gate(bias=-5.0, temperature=0.15)  # open for every word
    ids, empty = sd1_base.tokenizer(["a photo of a <rex>"], ["<rex>"]), sd1_base.tokenizer([""])
    noise = noise_for(sd1_base, [0], 32, 32)
    drawn = draw(sd1_base, params, ids, empty, noise, 2, 6.0, stacked, gate)

    def latents(unprompted_unet):
        edited = insert(params["unet"], stacked, gate)
        prompted = keys_values(edited, sd1_base.encode(params["text_encoder"], ids, stacked.embedding))
        unprompted = keys_values(unprompted_unet(edited), sd1_base.encode(params["text_encoder"], empty))
        return sample_latents(sd1_base, params["unet"], prompted, unprompted, noise, 2, 6.0)

    frozen, mistaken = (
        np.asarray(sd1_base.decode_latent(params["vae"], latents(unet))) for unet in (remove, lambda edited: edited)
    )
    np.testing.assert_allclose(drawn, frozen, atol=1e-4 * np.abs(frozen).max())
    assert np.abs(drawn - mistaken).max() > 1e-2 * np.abs(frozen).max()


def test_impossible_requests_are_refused(base):
    with pytest.raises(InputError, match="multiples of"):
        generate(base, ["a dog"], [0], height=31, width=32)
    with pytest.raises(InputError, match="1001 sampling steps"):
        generate(base, ["a dog"], [0], steps=1001, height=32, width=32)
    with pytest.raises(InputError, match="<rex>"):
        generate(base, ["a <rex>"], [0], height=32, width=32)


def test_pixels_are_rounded_and_cut():
    np.testing.assert_array_equal(to_pixels(jnp.array([-2.0, -1.0, 0.0, 1.0, 2.0])), [0, 0, 128, 255, 255])
