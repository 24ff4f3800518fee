"""Drawing pictures: prompts and noise to latents, all steps in one `lax.scan`, and latents to pictures.

The sampler is DDIM (Song et al., arXiv 2010.02502) without added noise, with classifier-free guidance (Ho and Salimans,
arXiv 2207.12598).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax import concept as concept_lib
from perfusion_jax.base_model import BaseModel, KeysValues, keys_values
from perfusion_jax.base_model.schedule import NoiseSchedule
from perfusion_jax.concept import Concept
from perfusion_jax.edit import Gate
from perfusion_jax.errors import InputError
from perfusion_jax.surgery import Params, insert


class DdimSteps(NamedTuple):
    """The steps of a DDIM sampler, from noise to picture.

    Attributes:
        timesteps: int32 [steps].
        kept: a_t, the signal's share of the variance before each step, float32 [steps].
        kept_after: the same after it, float32 [steps].
    """

    timesteps: np.ndarray
    kept: np.ndarray
    kept_after: np.ndarray


def ddim_steps(schedule: NoiseSchedule, steps: int) -> DdimSteps:
    """Chooses timesteps as diffusers' DDIMScheduler does from the checkpoint's scheduler config.

    Raises:
        InputError: more steps than the schedule has, none at all, or an unknown spacing.
    """
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise InputError(f"{steps} sampling steps: this model's schedule allows 1 to {total}")
    spacing = schedule.config.get("timestep_spacing", "leading")
    if spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (total // steps) + schedule.config.get("steps_offset", 0)
    elif spacing == "trailing":
        timesteps = np.round(np.arange(total, 0, -total / steps)) - 1
    elif spacing == "linspace":
        timesteps = np.round(np.linspace(0, total - 1, steps))[::-1]
    else:
        raise InputError(f"timestep_spacing {spacing!r} of the scheduler is not one of leading, trailing, linspace")
    timesteps = np.clip(timesteps, 0, total - 1).astype(np.int32)
    after = timesteps - total // steps
    last = 1.0 if schedule.config.get("set_alpha_to_one", True) else schedule.alphas_cumprod[0]
    kept = schedule.alphas_cumprod
    return DdimSteps(timesteps, kept[timesteps], np.where(after < 0, last, kept[after]).astype(np.float32))


def noise_for(base: BaseModel, seeds: Sequence[int], height: int, width: int) -> jax.Array:
    """Returns the noise each picture starts from, float32 [len(seeds), height / f, width / f, channels].

    It depends on the picture's own seed alone, not on its place in the batch.

    Args:
        base: the model.
        seeds: one per picture.
        height, width: of the pictures in pixels, multiples of the autoencoder's factor f.

    Raises:
        InputError: a height or width that is no multiple of f.
    """
    factor = base.vae_factor
    if height % factor or width % factor or not height > 0 < width:
        raise InputError(f"pictures of {width} x {height} pixels: width and height must be multiples of {factor}")
    shape = (height // factor, width // factor, base.latent_channels)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample_latents(
    base: BaseModel,
    unet_params: Params,
    prompted: KeysValues,
    unprompted: KeysValues,
    noise: jax.Array,
    steps: int,
    guidance_scale: jax.Array | float,
) -> jax.Array:
    """Draws latents: pure, and meant to be jitted with `base` and `steps` static.

    Args:
        base: the model.
        unet_params: its UNet's weights; edits act through `prompted` alone.
        prompted: keys and values of the prompts, of a batch.
        unprompted: keys and values of the empty prompt through the unedited weights, of the same batch size.
        noise: from `noise_for`, [batch, height / f, width / f, channels].
        steps: DDIM steps.
        guidance_scale: 1 for none.

    Returns:
        Latents, float32, the shape of the noise.
    """
    plan = ddim_steps(base.schedule, steps)
    both = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), prompted, unprompted)
    dtype = base.unet.dtype

    def step(latents: jax.Array, now: DdimSteps) -> tuple[jax.Array, None]:
        twice = jnp.concatenate([latents, latents]).astype(dtype)
        timesteps = jnp.full(len(twice), now.timesteps)
        prediction = base.denoise(unet_params, twice, timesteps, both).astype(jnp.float32)
        with_prompt, without = jnp.split(prediction, 2)
        guided = without + guidance_scale * (with_prompt - without)
        signal, noisiness = jnp.sqrt(now.kept), jnp.sqrt(1 - now.kept)
        if base.schedule.prediction_type == "epsilon":
            epsilon = guided
            picture = (latents - noisiness * epsilon) / signal
        else:
            epsilon = signal * guided + noisiness * latents
            picture = signal * latents - noisiness * guided
        return jnp.sqrt(now.kept_after) * picture + jnp.sqrt(1 - now.kept_after) * epsilon, None

    # init_noise_sigma of DDIM is 1.
    latents, _ = jax.lax.scan(step, noise, jax.tree.map(jnp.asarray, plan))
    return latents


def draw(
    base: BaseModel,
    params: dict[str, Params],
    ids: jax.Array,
    unprompted_ids: jax.Array,
    noise: jax.Array,
    steps: int,
    guidance_scale: jax.Array | float,
    concepts: Concept | None = None,
    gates: Gate | Sequence[Gate] | None = None,
) -> jax.Array:
    """Draws tokenised prompts: pure, and meant to be jitted with `base` and `steps` static.

    Args:
        base: the model.
        params: its weights, without edits.
        ids: int32 [batch, tokens].
        unprompted_ids: the empty prompt, or a negative one, int32 [batch, tokens].
        noise: from `noise_for`, [batch, height / f, width / f, channels].
        steps: DDIM steps.
        guidance_scale: 1 for none.
        concepts: stacked concepts that the prompts may name.
        gates: one for all of them, or one for each.

    Returns:
        Pictures in about [-1, 1], float32 [batch, height, width, 3].
    """
    unet = params["unet"]
    embeddings = None
    if concepts is not None:
        assert gates is not None
        unet, embeddings = insert(unet, concepts, gates), concepts.embedding
    prompted = keys_values(unet, base.encode(params["text_encoder"], ids, embeddings))
    # The unconditional prompt goes through the frozen weights: guidance is away from what the model itself would draw.
    unprompted = keys_values(params["unet"], base.encode(params["text_encoder"], unprompted_ids))
    latents = sample_latents(base, params["unet"], prompted, unprompted, noise, steps, guidance_scale)
    return base.decode_latent(params["vae"], latents.astype(base.vae.dtype))


_draw = jax.jit(draw, static_argnames=("base", "steps"))


def generate(
    base: BaseModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    concepts: Mapping[str, Concept] | None = None,
    gates: Gate | Sequence[Gate] | None = None,
    steps: int = 50,
    guidance_scale: float = 6.0,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """Draws prompts.

    Args:
        base: the model.
        prompts: one per picture; they may name concepts.
        seeds: one per picture. A picture depends on its own prompt and seed alone.
        concepts: by placeholder, such as `<dog>`.
        gates: one for all concepts, or one for each.
        steps: DDIM steps.
        guidance_scale: 1 for none.
        height, width: in pixels; the model's own size if left out.
        batch_size: pictures drawn at once.

    Returns:
        uint8 [len(prompts), height, width, 3].

    Raises:
        InputError: a prompt names a concept that is not given, or a size or number of steps is impossible.
    """
    native = base.unet.sample_size * base.vae_factor
    placeholders = list(concepts or ())
    ids = base.tokenizer(prompts, placeholders)
    empty = base.tokenizer([""] * batch_size)
    noise = noise_for(base, seeds, height or native, width or native)
    stacked = concept_lib.stack([*concepts.values()]) if concepts else None
    if concepts and gates is None:
        raise InputError("concepts are given without gates")
    pictures = []
    for start in range(0, len(prompts), batch_size):
        count = len(ids[start : start + batch_size])
        rows = np.minimum(np.arange(start, start + batch_size), start + count - 1)  # one batch size is compiled
        drawn = _draw(base, base.params, ids[rows], empty, noise[rows], steps, guidance_scale, stacked, gates)
        pictures.append(to_pixels(drawn[:count]))
    return np.concatenate(pictures)


def to_pixels(images: jax.Array) -> np.ndarray:
    """Rounds pictures in [-1, 1] to bytes: uint8 of the same shape, what is outside cut off."""
    return np.asarray(jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8))
