"""Drawing, as pure functions: prompts and noise to latents, all steps in one `lax.scan`, and latents to pictures.

Guidance is classifier-free (Ho and Salimans, arXiv 2207.12598), its rescaling that of Lin et al. (arXiv 2305.08891,
section 3.4).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import Architecture, KeysValues, keys_values
from perfusion_jax.drawing.samplers import Plan
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.edit import Gate
from perfusion_jax.method.surgery import Params, insert


class Guidance(NamedTuple):
    """How far pictures follow their prompts; float32 scalars.

    Attributes:
        scale: of the step away from the empty prompt's prediction; 1 for none.
        rescale: how much of the contrast that guidance adds is taken back, 0 to 1.
    """

    scale: jax.Array | float = 6.0
    rescale: jax.Array | float = 0.0


class Concepts(NamedTuple):
    """The concepts that a batch of prompts may name, in slots; an empty slot is all zeros.

    Attributes:
        stacked: [slots, ...].
        gates: [slots] each.
        present: which concepts act on each prompt, float32 [batch, slots].
        phases: how strongly each acts in each phase of the sampling, float32 [phases, slots].
        phase_of_step: int32 [steps].
        super_embeddings: the super-categories' word embeddings, float32 [slots, token_width], if all keys are to come
            from the prompt with these words (global key locking); None for local key locking.
    """

    stacked: Concept
    gates: Gate
    present: jax.Array
    phases: jax.Array
    phase_of_step: jax.Array
    super_embeddings: jax.Array | None


def prompt_keys_values(
    model: Architecture, params: dict[str, Params], ids: jax.Array, concepts: Concepts
) -> KeysValues:
    """Computes the keys and values of prompts under the edits of the concepts that each of them names.

    Args:
        model: its architecture.
        params: its weights, without edits.
        ids: int32 [batch, tokens].
        concepts: see `Concepts`.

    Returns:
        By layer, [phases, batch, tokens, out_width] each.
    """
    stacked, gates = concepts.stacked, concepts.gates
    encodings = model.encode(params["text_encoder"], ids, stacked.embedding)
    super_encodings = None
    if concepts.super_embeddings is not None:
        super_encodings = model.encode(params["text_encoder"], ids, concepts.super_embeddings)

    def of_prompt(
        strengths: jax.Array, present: jax.Array, encoding: jax.Array, super_encoding: jax.Array | None
    ) -> KeysValues:
        here = dataclasses.replace(
            stacked, target_input=present[:, None] * stacked.target_input, dual=present[:, None] * stacked.dual
        )
        edited = insert(params["unet"], here, gates._replace(strength=gates.strength * strengths))
        return keys_values(edited, encoding, super_encoding)

    of_batch = jax.vmap(of_prompt, in_axes=(None, 0, 0, 0))
    return jax.vmap(of_batch, in_axes=(0, None, None, None))(
        concepts.phases, concepts.present, encodings, super_encodings
    )


def sample_latents(
    model: Architecture,
    unet_params: Params,
    prompted: KeysValues,
    unprompted: KeysValues,
    phase_of_step: jax.Array,
    noisy: jax.Array,
    plan: Plan,
    guidance: Guidance,
    attention: bool = False,
    on_step: Callable[[], None] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Walks the plan of a sampler.

    Args:
        model: its architecture.
        unet_params: its UNet's weights; edits act through `prompted` alone.
        prompted: keys and values of the prompts, [phases, batch, ...].
        unprompted: those of the empty prompt through the unedited weights, [batch, ...].
        phase_of_step: which of the phases each step reads, int32 [steps].
        noisy: what to start from, float32 [batch, height / f, width / f, channels].
        plan: the sampler's.
        guidance: see `Guidance`.
        attention: whether to tell where the UNet looked.
        on_step: called on the host after every step, for progress.

    Returns:
        (latents, float32, the shape of `noisy`; the attention that each latent paid to each token of its prompt, the
        mean over heads, layers and steps, float32 [batch, height / f, width / f, tokens], or None if not asked for).
    """
    batch, height, width, _ = noisy.shape
    tokens = next(iter(prompted.values())).key.shape[2]
    dtype = model.unet.dtype

    def step(
        carried: tuple[jax.Array, jax.Array, jax.Array | None], now: tuple[Plan, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], None]:
        latents, picture_before, seen = carried
        at, phase = now
        both = jax.tree.map(lambda one, other: jnp.concatenate([one[phase], other]), prompted, unprompted)
        twice = jnp.concatenate([latents, latents]).astype(dtype)
        timesteps = jnp.full(2 * batch, at.timesteps)
        if seen is None:
            prediction = model.denoise(unet_params, twice, timesteps, both)
        else:
            prediction, maps = model.attention_maps(unet_params, twice, timesteps, both)
            seen = seen + maps[:batch]
        with_prompt, without = jnp.split(prediction.astype(jnp.float32), 2)
        guided = guide(with_prompt, without, guidance)
        if model.schedule.prediction_type == "epsilon":
            picture = (latents - at.noise * guided) / at.signal
        else:
            picture = at.signal * latents - at.noise * guided
        if on_step is not None:
            jax.debug.callback(on_step)
        return (at.carry * latents + at.current * picture + at.previous * picture_before, picture, seen), None

    steps = plan._replace(start=jnp.zeros_like(plan.timesteps))  # of all steps, so that the scan runs over all fields
    seen = jnp.zeros((batch, height, width, tokens), jnp.float32) if attention else None
    (latents, _, seen), _ = jax.lax.scan(step, (noisy, jnp.zeros_like(noisy), seen), (steps, phase_of_step))
    return latents, None if seen is None else seen / len(phase_of_step)


def guide(prompted: jax.Array, unprompted: jax.Array, guidance: Guidance) -> jax.Array:
    """Classifier-free guidance of predictions, [batch, height, width, channels] each."""
    guided = unprompted + guidance.scale * (prompted - unprompted)
    spread, spread_guided = (jnp.std(array, axis=(1, 2, 3), keepdims=True) for array in (prompted, guided))
    return guided * (1 + guidance.rescale * (spread / spread_guided - 1))


def draw(
    model: Architecture,
    params: dict[str, Params],
    ids: jax.Array,
    unprompted_ids: jax.Array,
    noise: jax.Array,
    plan: Plan,
    guidance: Guidance,
    concepts: Concepts | None = None,
    init_latents: jax.Array | None = None,
    attention: bool = False,
    on_step: Callable[[], None] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Draws tokenised prompts: pure, and meant to be jitted with `base`, `attention` and `on_step` static.

    Args:
        model: its architecture.
        params: its weights, without edits.
        ids: int32 [batch, tokens].
        unprompted_ids: the empty prompt, or a negative one, int32 [batch, tokens].
        noise: from `noise_for`, [batch, height / f, width / f, channels].
        plan: of the sampler; with `init_latents`, of the steps that are left.
        guidance: see `Guidance`.
        concepts: what the prompts may name.
        init_latents: of a picture to start from, the shape of the noise.
        attention, on_step: as for `sample_latents`.

    Returns:
        (pictures in about [-1, 1], float32 [batch, height, width, 3]; attention as from `sample_latents`).
    """
    if concepts is None:
        alone = keys_values(params["unet"], model.encode(params["text_encoder"], ids))
        prompted = jax.tree.map(lambda array: array[None], alone)
        phase_of_step = jnp.zeros(len(plan.timesteps), jnp.int32)
    else:
        prompted = prompt_keys_values(model, params, ids, concepts)
        phase_of_step = concepts.phase_of_step
    # The unconditional prompt goes through the frozen weights: guidance is away from what the model itself would draw.
    unprompted = keys_values(params["unet"], model.encode(params["text_encoder"], unprompted_ids))
    noisy = plan.start * noise if init_latents is None else plan.signal[0] * init_latents + plan.noise[0] * noise
    latents, seen = sample_latents(
        model, params["unet"], prompted, unprompted, phase_of_step, noisy, plan, guidance, attention, on_step
    )
    return model.decode_latent(params["vae"], latents.astype(model.vae.dtype)), seen


def noise_for(model: Architecture, seeds: jax.Array | Sequence[int], height: int, width: int) -> jax.Array:
    """Returns the noise each picture starts from, float32 [len(seeds), height / f, width / f, channels].

    It depends on the picture's own seed alone, not on its place in the batch.

    Args:
        model: its architecture.
        seeds: uint32, one per picture.
        height, width: of the pictures in pixels, multiples of the autoencoder's factor f.
    """
    shape = (height // model.vae_factor, width // model.vae_factor, model.latent_channels)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def to_pixels(images: jax.Array) -> np.ndarray:
    """Rounds pictures in [-1, 1] to bytes: uint8 of the same shape, what is outside cut off."""
    return np.asarray(jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8))
