"""Soft masks of where a thing is: from its folder, or zero-shot from the frozen UNet's own attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import Architecture, whole_sizes
from perfusion_jax.method.surgery import Params

# Shares of the noise schedule at which the UNet is asked; with less noise it looks at details, with more at nothing.
NOISE_LEVELS = (0.2, 0.35, 0.5, 0.65)
DRAWS = 4


def shrink(masks: np.ndarray, factor: int) -> np.ndarray:
    """Averages masks over the pixels of each latent: float32 [count, height, width] to [count, height / factor,
    ...].
    """
    count, height, width = masks.shape
    return masks.reshape(count, height // factor, factor, width // factor, factor).mean(axis=(2, 4))


def normalise(masks: np.ndarray) -> np.ndarray:
    """Divides each mask, the last two axes, by its own largest value."""
    return masks / masks.max(axis=(-2, -1), keepdims=True)


def attention_masks(
    model: Architecture, params: dict[str, Params], latents: jax.Array, super_category: str, key: jax.Array
) -> jax.Array:
    """Masks from the UNet's cross-attention to the super-category's word, over noise levels, draws and layers.

    Args:
        model: the architecture.
        params: its weights.
        latents: of the pictures, [count, height, width, channels].
        super_category: the word or words for this kind of thing.
        key: of the noise, which is the same for all of them.

    Returns:
        float32 [count, height, width], each from 0 at its least to 1 at its most attentive latent.
    """
    ids, is_word = model.tokenizer.locate("a photo of a {}", super_category)
    return _attention_masks(model, params, latents, ids, is_word.astype(np.float32), key)


@partial(jax.jit, static_argnames="model")  # the word is an argument: one compilation serves all concepts
def _attention_masks(
    model: Architecture,
    params: dict[str, Params],
    latents: jax.Array,
    ids: jax.Array,
    is_word: jax.Array,
    key: jax.Array,
) -> jax.Array:
    count = len(latents)
    encoding = model.encode(params, jnp.tile(ids, (count, 1)))
    sizes = whole_sizes(*(model.vae_factor * side for side in latents.shape[1:3]))
    context = model.read(params["unet"], encoding, jnp.tile(sizes, (count, 1)))
    levels = np.array(NOISE_LEVELS * DRAWS)

    def at(level: jax.Array, noise_key: jax.Array) -> jax.Array:
        timesteps = jnp.full(count, (level * model.schedule.num_train_timesteps).astype(jnp.int32))
        noisy = model.schedule.add_noise(latents, jax.random.normal(noise_key, latents.shape[1:]), timesteps)
        _, maps = model.attention_maps(params["unet"], noisy.astype(model.unet.dtype), timesteps, context)
        return jnp.einsum("bhwt,t->bhw", maps, is_word)

    attention = jax.lax.map(lambda pair: at(*pair), (jnp.asarray(levels), jax.random.split(key, len(levels)))).mean(0)
    attention -= attention.min(axis=(1, 2), keepdims=True)
    return attention / attention.max(axis=(1, 2), keepdims=True)
