"""Drawing, as pure functions: prompts and noise to latents, step by step, and latents to pictures.

Guidance is classifier-free (Ho and Salimans, arXiv 2207.12598), its rescaling that of Lin et al. (arXiv 2305.08891,
section 3.4).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt32

from perfusion_jax.base_model import Architecture, Context, Encoding
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

    scale: Float32[Array, ""] | float = 6.0
    rescale: Float32[Array, ""] | float = 0.0


class Concepts(NamedTuple):
    """The concepts that a batch of prompts may name, in slots; an empty slot is all zeros.

    Attributes:
        stacked: [slots, ...].
        gates: [slots] each.
        present: which concepts act on each prompt, float32 [batch, slots].
        phases: how strongly each acts in each phase of the sampling, float32 [phases, slots].
        super_embeddings: the super-categories' word embeddings, float32 [slots, token_width], if all keys are to come
            from the prompt with these words (global key locking); None for local key locking.
    """

    stacked: Concept
    gates: Gate
    present: Float32[Array, "batch slots"]
    phases: Float32[Array, "phases slots"]
    super_embeddings: Float32[Array, "slots token_width"] | None


class Unprompted(NamedTuple):
    """What guidance leads away from.

    Attributes:
        ids: of the empty prompt, or of a negative one, int32 [batch, tokens].
        weight: of its encodings, float32 [batch]: 1; or 0 for models that take zeros for the empty prompt's.
    """

    ids: Int32[Array | np.ndarray, "batch tokens"]
    weight: Float32[Array | np.ndarray, " batch"]


class Prompts(NamedTuple):
    """What the steps of a sampler read of the text.

    Attributes:
        prompted: of the prompts, each array with the axes [phases, batch, ...].
        unprompted: of what guidance leads away from, [batch, ...] each; None where there is no guidance.
    """

    prompted: Context
    unprompted: Context | None


class Walk(NamedTuple):
    """Where a sampler is.

    Attributes:
        latents: float32 [batch, height / f, width / f, channels].
        picture: the network's estimate of the finished latents at the step before, the same shape.
        attention: that each latent has paid to each token of its prompt, the mean over heads and layers, summed over
            the steps so far: float32 [batch, height / f, width / f, tokens]; None if it is not wanted.
    """

    latents: Float32[Array, "batch height width channels"]
    picture: Float32[Array, "batch height width channels"]
    attention: Float32[Array, "batch height width tokens"] | None


def prompt_context(
    model: Architecture,
    params: dict[str, Params],
    ids: Int32[Array | np.ndarray, "batch tokens"],
    sizes: Float32[Array | np.ndarray, " sizes"],
    concepts: Concepts,
) -> Context:
    """Computes what the UNet reads of prompts under the edits of the concepts that each of them names.

    Args:
        model: the architecture.
        params: its weights, without edits.
        ids: int32 [batch, tokens].
        sizes: of the pictures, float32 [6].
        concepts: see `Concepts`.

    Returns:
        Each array with the axes [phases, batch, ...].
    """
    stacked, gates = concepts.stacked, concepts.gates
    encodings = model.encode(params, ids, stacked.embedding)
    super_encodings = None
    if concepts.super_embeddings is not None:
        super_encodings = model.encode(params, ids, concepts.super_embeddings)

    def of_prompt(
        strengths: Float32[Array, " slots"],
        present: Float32[Array, " slots"],
        encoding: Encoding,
        super_encoding: Encoding | None,
    ) -> Context:
        here = dataclasses.replace(
            stacked, target_input=present[:, None] * stacked.target_input, dual=present[:, None] * stacked.dual
        )
        edited = insert(params["unet"], here, gates._replace(strength=gates.strength * strengths))
        return model.read(edited, encoding, jnp.asarray(sizes), super_encoding)

    of_batch = jax.vmap(of_prompt, in_axes=(None, 0, 0, 0))
    return jax.vmap(of_batch, in_axes=(0, None, None, None))(
        concepts.phases, concepts.present, encodings, super_encodings
    )


def read_prompts(
    model: Architecture,
    params: dict[str, Params],
    ids: Int32[Array | np.ndarray, "batch tokens"],
    sizes: Float32[Array | np.ndarray, " sizes"],
    unprompted: Unprompted | None,
    concepts: Concepts | None = None,
) -> Prompts:
    """Computes what all steps read of tokenised prompts.

    Args:
        model: the architecture.
        params: its weights, without edits.
        ids: int32 [batch, tokens].
        sizes: of the pictures, float32 [6] (`base_model.Added`).
        unprompted: what guidance leads away from; None without guidance.
        concepts: what the prompts may name.
    """
    of_each = jnp.tile(jnp.asarray(sizes), (len(ids), 1))
    if concepts is None:
        alone = model.read(params["unet"], model.encode(params, ids), of_each)
        prompted = jax.tree.map(lambda array: array[None], alone)
    else:
        prompted = prompt_context(model, params, ids, sizes, concepts)
    if unprompted is None:
        return Prompts(prompted, None)

    def weighted(encodings: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        weight = jnp.reshape(jnp.asarray(unprompted.weight), (-1,) + (1,) * (encodings.ndim - 1))
        return encodings * weight.astype(encodings.dtype)

    # The unconditional prompt goes through the frozen weights: guidance is away from what the model itself would draw.
    encoding = jax.tree.map(weighted, model.encode(params, unprompted.ids))
    return Prompts(prompted, model.read(params["unet"], encoding, of_each))


def begin(
    noise: Float32[Array, "batch height width channels"],
    at: Plan,
    tokens: int | None = None,
    init_latents: Float32[Array, "#batch height width channels"] | None = None,
) -> Walk:
    """Returns the state before the first step.

    Args:
        noise: from `noise_for`, [batch, height / f, width / f, channels].
        at: the first step's row of the plan, scalars; with `init_latents`, of the steps that are left.
        tokens: of a prompt, to sum up the attention to each; None does not.
        init_latents: of a picture to start from, the shape of the noise.
    """
    noisy = at.start * noise if init_latents is None else at.signal * init_latents + at.noise * noise
    attention = None if tokens is None else jnp.zeros((*noise.shape[:3], tokens), jnp.float32)
    return Walk(noisy, jnp.zeros_like(noisy), attention)


def take_step(
    model: Architecture,
    unet_params: Params,
    prompts: Prompts,
    walk: Walk,
    at: Plan,
    phase: Int32[Array, ""] | int,
    guidance: Guidance,
    fresh: Float32[Array, "batch height width channels"] | None = None,
) -> Walk:
    """Takes one step of a sampler. What differs from step to step is an array: one program serves all of them.

    Args:
        model: the architecture.
        unet_params: its UNet's weights; edits act through `prompts` alone.
        prompts: from `read_prompts`.
        walk: the state before.
        at: the step's row of the plan, scalars.
        phase: which of the prompts' phases the step reads.
        guidance: see `Guidance`; it plays no part without unprompted keys and values.
        fresh: noise that the sampler puts back, standard normal; None for samplers that put back none.
    """
    latents, picture_before, attention = walk
    batch = len(latents)
    context = jax.tree.map(lambda array: array[phase], prompts.prompted)
    noisy = latents.astype(model.unet.dtype)
    if prompts.unprompted is not None:
        context = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), context, prompts.unprompted)
        noisy = jnp.concatenate([noisy, noisy])
    timesteps = jnp.full(len(noisy), at.timesteps)
    if attention is None:
        prediction = model.denoise(unet_params, noisy, timesteps, context)
    else:
        prediction, maps = model.attention_maps(unet_params, noisy, timesteps, context)
        attention = attention + maps[:batch]
    guided = prediction.astype(jnp.float32)
    if prompts.unprompted is not None:
        guided = guide(guided[:batch], guided[batch:], guidance)
    if model.schedule.prediction_type == "epsilon":
        picture = (latents - at.noise * guided) / at.signal
    else:
        picture = at.signal * latents - at.noise * guided
    after = at.carry * latents + at.current * picture + at.previous * picture_before
    return Walk(after if fresh is None else after + at.fresh * fresh, picture, attention)


def guide(
    prompted: Float[Array, "batch height width channels"],
    unprompted: Float[Array, "batch height width channels"],
    guidance: Guidance,
) -> Float[Array, "batch height width channels"]:
    """Classifier-free guidance of predictions, [batch, height, width, channels] each."""
    guided = unprompted + guidance.scale * (prompted - unprompted)
    spread, spread_guided = (jnp.std(array, axis=(1, 2, 3), keepdims=True) for array in (prompted, guided))
    return guided * (1 + guidance.rescale * (spread / spread_guided - 1))


def noise_for(
    model: Architecture, seeds: UInt32[Array, " batch"] | Sequence[int], height: int, width: int
) -> Float32[Array, "batch latent_height latent_width channels"]:
    """Returns the noise each picture starts from, float32 [len(seeds), height / f, width / f, channels].

    It depends on the picture's own seed alone, not on its place in the batch.

    Args:
        model: the architecture.
        seeds: uint32, one per picture.
        height, width: of the pictures in pixels, multiples of the autoencoder's factor f.
    """
    shape = (height // model.vae_factor, width // model.vae_factor, model.latent_channels)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def fresh_noise(
    seeds: UInt32[Array | np.ndarray, " batch"],
    step: Int32[Array, ""] | int,
    latents: Float32[Array, "batch height width channels"],
) -> Float32[Array, "batch height width channels"]:
    """Returns the noise that a sampler puts back after a step; like `noise_for`, a picture's own.

    Args:
        seeds: uint32, one per picture.
        step: its number.
        latents: of the shape wanted.
    """
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(jnp.asarray(seeds))
    return jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)


def to_pixels(images: Float[Array, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Rounds pictures in [-1, 1] to bytes: uint8 of the same shape, what is outside cut off."""
    return np.round(np.clip((np.asarray(images, np.float32) + 1) * 127.5, 0, 255)).astype(np.uint8)
