"""Sampling against PyTorch diffusers' own pipelines on the same weights, prompts and noise."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_text
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

from perfusion_jax import Gate, insert, keys_values, load_base_model
from perfusion_jax.base_model import Context, whole_sizes
from perfusion_jax.drawing.denoising import (
    Concepts,
    Guidance,
    Prompts,
    Unprompted,
    begin,
    noise_for,
    prompt_context,
    read_prompts,
    take_step,
    to_pixels,
)
from perfusion_jax.drawing.samplers import make_plan
from perfusion_jax.method.concept import stack

# diffusers asks PyTorch's tensors for NumPy arrays in the way of NumPy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZES = whole_sizes(32, 32)
PROMPTS = ["a photo of a dog", "the teddy bear on the beach"]
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}


def make_pipeline(folder, sampler, kind=""):
    """The checkpoint's pipeline, or with `kind` another one for it, such as `Img2Img`."""
    name = torch_text.pipeline_class(folder).replace("Pipeline", f"{kind}Pipeline")
    scheduler = SCHEDULERS[sampler].from_config(DDIMScheduler.from_pretrained(folder / "scheduler").config)
    checks = {} if (folder / "text_encoder_2").is_dir() else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, name).from_pretrained(folder, scheduler=scheduler, feature_extractor=None, **checks)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unprompted(ids):
    return Unprompted(ids, np.ones(len(ids), np.float32))


def plain_keys_values(base, texts):
    return keys_values(base.params["unet"], base.model.encode(base.params, base.model.tokenizer(texts)).tokens)


def walk_all(base, prompts, walk, plan, guidance):
    """The latents after all steps of a plan."""
    step = jax.jit(take_step, static_argnums=0)
    for number in range(len(plan.timesteps)):
        walk = step(base.model, base.params["unet"], prompts, walk, plan.at(number), 0, guidance or Guidance())
    return walk.latents


def sample(base, noise, plan, guidance, init_latents=None):
    """Guidance of None: without the empty prompt."""
    ids = base.model.tokenizer(PROMPTS)
    empty = None
    if guidance is not None:
        weight = np.full(len(ids), 1 - base.model.empty_prompt_is_zero, np.float32)
        empty = Unprompted(base.model.tokenizer([""] * len(ids)), weight)
    sizes = whole_sizes(*(base.model.vae_factor * side for side in noise.shape[1:3]))
    prompts = read_prompts(base.model, base.params, ids, sizes, empty)
    return np.asarray(walk_all(base, prompts, begin(noise, plan.at(0), init_latents=init_latents), plan, guidance))


def first(latents):
    """Channels first, as PyTorch has them."""
    return np.asarray(latents).transpose(0, 3, 1, 2)


def compare_after(folder, base, sampler, steps, size, rescale=0.0, guidance=6.0):
    noise = noise_for(base.model, [3, 4], size, size)
    theirs = make_pipeline(folder, sampler)(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_rescale=rescale,
        latents=torch.from_numpy(first(noise).copy()),
        height=size,
        width=size,
        output_type="latent",
    ).images.numpy()
    plan = make_plan(base.model.schedule, sampler, steps)
    ours = sample(base, noise, plan, Guidance(guidance, rescale) if guidance > 1 else None)
    assert np.abs(first(ours) - theirs).max() < 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_after_many_steps_equal_pytorch(folder, base, sampler, steps):
    compare_after(folder, base, sampler, steps, 32, rescale=0.7 if sampler == "ddim" else 0.0)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_as_pytorch(sd1_folder, sd1_base, guidance):
    compare_after(sd1_folder, sd1_base, "euler", 4, 32, guidance=guidance)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_full_stable_diffusion_15_samples_as_pytorch(full_size_folder, sampler):
    compare_after(full_size_folder, load_base_model(full_size_folder), sampler, 5, 128)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_from_a_picture_as_pytorch(sd1_folder, sd1_base, sampler):
    rng = np.random.default_rng(0)
    start = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)
    noise = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(5)).numpy()
    theirs = make_pipeline(sd1_folder, sampler, "Img2Img")(
        PROMPTS,
        image=torch.from_numpy(first(start).copy()),
        strength=0.6,
        num_inference_steps=20,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images.numpy()
    plan = make_plan(sd1_base.model.schedule, sampler, 20, skipped=8)
    ours = sample(
        sd1_base, jnp.asarray(noise.transpose(0, 2, 3, 1)), plan, Guidance(6.0, 0.0), init_latents=jnp.asarray(start)
    )
    assert np.abs(first(ours) - theirs).max() < 1e-3 * np.abs(theirs).max()


def two_concepts(base):
    """Two concepts away from where they started, and a gate for each."""
    rng = np.random.default_rng(0)

    def moved(word):
        concept = base.new_concept(word, jnp.eye(base.model.context_width))
        return jax.tree.map(
            lambda leaf: leaf + 0.3 * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), concept
        )

    return [moved("dog"), moved("cat")], [Gate(0.5, 0.15, 1.0), Gate(0.6, 0.2, 0.8)]


def in_slots(concepts, gates, present, phases=((1.0, 1.0, 1.0),), super_embeddings=None):
    """Two concepts and an empty slot."""
    stacked = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, 1), *[(0, 0)] * (leaf.ndim - 1)]), stack(concepts))
    padded = Gate(*(jnp.array([*pair, 1.0]) for pair in zip(*gates, strict=True)))
    return Concepts(stacked, padded, jnp.array(present), jnp.array(phases), super_embeddings)


def assert_close(ours, expected, tolerance=1e-5):
    for layer, fed in expected.items():
        for name in ("key", "value"):
            reference = np.asarray(getattr(fed, name))
            difference = np.abs(np.asarray(getattr(ours[layer], name)) - reference).max()
            assert difference < tolerance * np.abs(reference).max(), (layer, name)


def test_each_prompt_of_a_batch_is_edited_by_the_concepts_that_it_names(sd1_base):
    base, params = sd1_base, sd1_base.params
    concepts, gates = two_concepts(base)
    prompts = ["a photo of a <rex>", "a <tom> on the beach", "<rex> and <tom>", "a dog"]
    ids = base.model.tokenizer(prompts, ["<rex>", "<tom>"])
    present = [[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0], [0, 0, 0.0]]
    ours = jax.jit(prompt_context, static_argnums=0)(base.model, params, ids, SIZES, in_slots(concepts, gates, present))
    encodings = base.model.encode(params, ids, stack(concepts).embedding).tokens
    for number, named in enumerate(([0], [1], [0, 1], [])):
        edited = insert(params["unet"], [concepts[j] for j in named], [gates[j] for j in named])
        alone = keys_values(edited, encodings[number : number + 1])
        assert_close(jax.tree.map(lambda array, row=number: array[0, row : row + 1], ours.layers), alone)


def test_a_concept_acts_only_in_its_phases(sd1_base):
    base, params = sd1_base, sd1_base.params
    concepts, gates = two_concepts(base)
    ids = base.model.tokenizer(["<rex> and <tom>"], ["<rex>", "<tom>"])
    phases = ((1.0, 1.0, 1.0), (0.0, 1.0, 1.0))
    ours = prompt_context(base.model, params, ids, SIZES, in_slots(concepts, gates, [[1.0, 1.0, 0]], phases))
    encodings = base.model.encode(params, ids, stack(concepts).embedding).tokens
    for number, factors in enumerate(phases):
        weaker = [gate._replace(strength=gate.strength * factor) for gate, factor in zip(gates, factors, strict=False)]
        alone = keys_values(insert(params["unet"], concepts, weaker), encodings)
        assert_close(jax.tree.map(lambda array, phase=number: array[phase], ours.layers), alone)


def test_the_global_lock_takes_all_keys_from_the_super_categories(sd1_base):
    base, params = sd1_base, sd1_base.params
    concepts, gates = two_concepts(base)
    ids = base.model.tokenizer(["my <rex> and <tom>"], ["<rex>", "<tom>"])
    words = [base.super_category_embedding(word) for word in ("dog", "cat")]
    locked = in_slots(concepts, gates, [[1.0, 1.0, 0]], super_embeddings=jnp.stack([*words, jnp.zeros_like(words[0])]))
    ours = prompt_context(base.model, params, ids, SIZES, locked)
    plain = plain_keys_values(base, ["my dog and cat"])
    local = prompt_context(base.model, params, ids, SIZES, locked._replace(super_embeddings=None)).layers
    for layer, fed in ours.layers.items():
        np.testing.assert_allclose(fed.key[0], plain[layer].key, atol=1e-5 * np.abs(plain[layer].key).max())
        np.testing.assert_array_equal(fed.value, local[layer].value)
        assert np.abs(local[layer].key[0] - plain[layer].key).max() > 1e-2 * np.abs(plain[layer].key).max()


def test_the_unconditional_prompt_goes_through_the_frozen_weights(sd1_base):
    base, params = sd1_base, sd1_base.params
    concepts, _ = two_concepts(base)
    wide = Gate(bias=-5.0, temperature=0.15, strength=1.0)  # open for every word
    ids, empty = base.model.tokenizer(["a photo of a <rex>"], ["<rex>"]), base.model.tokenizer([""])
    noise, plan = noise_for(base.model, [0], 32, 32), make_plan(base.model.schedule, "ddim", 2)
    slots = in_slots(concepts, [wide, wide], [[1.0, 0, 0]])
    edited = insert(params["unet"], concepts[0], wide)

    def latents(prompts):
        return np.asarray(walk_all(base, prompts, begin(noise, plan.at(0)), plan, Guidance(6.0, 0.0)))

    def expected(unet):
        away_from = Context(keys_values(unet, base.model.encode(params, empty).tokens))
        return latents(Prompts(prompt_context(base.model, params, ids, SIZES, slots), away_from))

    drawn = latents(read_prompts(base.model, params, ids, SIZES, unprompted(empty), slots))
    frozen = expected(params["unet"])
    np.testing.assert_allclose(drawn, frozen, atol=1e-4 * np.abs(frozen).max())
    assert np.abs(drawn - expected(edited)).max() > 1e-2 * np.abs(frozen).max()


def test_pixels_are_rounded_and_cut():
    np.testing.assert_array_equal(to_pixels(jnp.array([-2.0, -1.0, 0.0, 1.0, 2.0])), [0, 0, 128, 255, 255])
