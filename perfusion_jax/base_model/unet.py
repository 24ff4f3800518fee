"""The frozen UNet, run on keys and values that are given.

The UNet reads the words of a prompt only through the keys and values of its cross-attention, and they depend on the
prompt alone. `keys_values` computes them once, under whatever edit is in the parameter tree; `denoise` runs the UNet on
them and never computes its own `to_k` and `to_v`. Some models (SDXL) also read one vector for the whole prompt, and the
sizes of the picture.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model.flax_classes import FlaxUNet2DConditionModel
from perfusion_jax.base_model.unet_blocks import KeysValues, KeyValue, Observer, interceptor
from perfusion_jax.method import edit as edit_lib
from perfusion_jax.method.surgery import EDIT, TARGET_OUTPUTS, Params, cross_attention_layers
from perfusion_jax.runtime.errors import InputError

SIZES = 6
"""Numbers that a UNet reads of each picture's size (`Added.sizes`)."""


class Added(NamedTuple):
    """What some UNets add to the embedding of the timestep (SDXL, arXiv 2307.01952, section 2.2).

    Attributes:
        pooled: one vector for each prompt, [batch, pooled_width].
        sizes: of each picture, float32 [batch, 6]: height and width before it was scaled, top and left of what was cut
            out of the scaled picture, height and width of that; in pixels.
    """

    pooled: jax.Array
    sizes: jax.Array


def whole_sizes(height: int, width: int) -> np.ndarray:
    """The sizes of a picture that is neither scaled nor cut, float32 [6] (`Added.sizes`); in pixels."""
    return np.array([height, width, 0, 0, height, width], np.float32)


class Context(NamedTuple):
    """What the UNet reads beside latents and timesteps, for a batch.

    Attributes:
        layers: keys and values by cross-attention layer.
        added: for UNets that read it, else None.
    """

    layers: KeysValues
    added: Added | None = None


def keys_values(
    unet_params: Params, encodings: jax.Array, super_category_encodings: jax.Array | None = None
) -> KeysValues:
    """Computes the keys and values of every cross-attention layer, edited where an edit is in the tree.

    Args:
        unet_params: the UNet, with or without edits (`surgery.insert`).
        encodings: encodings of the prompts, [batch, tokens, context_width].
        super_category_encodings: encodings of the same ids with the super-category's embedding in place of each
            concept's (`BaseModel.super_category_embedding`), so that every word keeps its position. When given,
            the keys of the whole prompt come from these through the frozen weights (global key locking); without,
            the edit locks the key at the concept's word only (local key locking).

    Returns:
        Keys and values by layer, in the dtype of the encodings.

    Raises:
        InputError: the two encodings differ in shape.
    """
    if super_category_encodings is not None and super_category_encodings.shape != encodings.shape:
        raise InputError(
            f"the super-category's encodings have shape {super_category_encodings.shape}, the "
            f"concept's {encodings.shape}: encode the same ids"
        )
    edit = unet_params.get(EDIT)
    edited = None if edit is None else edit_lib.edited_input(edit, encodings)

    def project(weights: Any) -> jax.Array:
        if edited is None:
            return plain(weights, encodings)
        return edit_lib.project(weights["kernel"], edited, weights[TARGET_OUTPUTS])

    def plain(weights: Any, inputs: jax.Array) -> jax.Array:
        return jnp.matmul(inputs, weights["kernel"].astype(inputs.dtype))

    return {
        layer: KeyValue(
            key=project(weights["to_k"])
            if super_category_encodings is None
            else plain(weights["to_k"], super_category_encodings),
            value=project(weights["to_v"]),
        )
        for layer, weights in cross_attention_layers(unet_params).items()
    }


def denoise(
    module: FlaxUNet2DConditionModel,
    unet_params: Params,
    latents: jax.Array,
    timesteps: jax.Array,
    context: Context,
    observe: Observer | None = None,
) -> jax.Array:
    """Runs the UNet on given keys and values.

    Args:
        module: the UNet's architecture.
        unet_params: its weights; edits in the tree have no effect here.
        latents: noisy latents, [batch, height, width, channels].
        timesteps: int32 [batch].
        context: of the same batch.
        observe: called for every cross-attention layer, in order, with its queries, keys and number of heads.

    Returns:
        The network's prediction (noise or velocity: see the schedule), [batch, height, width, channels].

    Raises:
        InputError: a cross-attention layer has no keys and values, they or the latents do not fit, or what this UNet
            adds is missing.
    """
    _check_inputs(module, unet_params, latents, context)
    # The text enters through the intercepted attention alone; the module still wants an argument in its place.
    no_text = jnp.zeros((latents.shape[0], 1, 1), latents.dtype)
    added = None
    if context.added is not None:
        added = {"text_embeds": context.added.pooled, "time_ids": context.added.sizes}
    channels_first = jnp.moveaxis(latents, -1, 1)
    halvings = len(module.block_out_channels) - 1
    with nn.intercept_methods(interceptor(latents, halvings, context.layers, observe)):
        prediction = module.apply({"params": unet_params}, channels_first, timesteps, no_text, added).sample
    return jnp.moveaxis(prediction, 1, -1)


def attention_maps(
    module: FlaxUNet2DConditionModel,
    unet_params: Params,
    latents: jax.Array,
    timesteps: jax.Array,
    context: Context,
) -> tuple[jax.Array, jax.Array]:
    """Runs the UNet and tells where it looks at which token; arguments as for `denoise`.

    Returns:
        (the network's prediction, the attention that each latent pays to each token: float32 [batch, height, width,
        tokens], averaged over heads and layers; it sums to 1 over the tokens).
    """
    height, width = latents.shape[1:3]
    levels = len(module.block_out_channels)
    maps = []

    def observe(query: jax.Array, key: jax.Array, heads: int) -> None:
        # Layers work on grids that are 1, 2, 4, ... times coarser than the latents.
        grids = ((-(-height // coarser), -(-width // coarser)) for coarser in (2**level for level in range(levels)))
        grid = next(grid for grid in grids if grid[0] * grid[1] == query.shape[1])
        query, key = (x.reshape(*x.shape[:2], heads, -1).astype(jnp.float32) for x in (query, key))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        attention = jax.nn.softmax(scores).mean(axis=1).reshape(query.shape[0], *grid, -1)
        maps.append(jax.image.resize(attention, (*attention.shape[:1], height, width, attention.shape[-1]), "linear"))

    prediction = denoise(module, unet_params, latents, timesteps, context, observe)
    return prediction, sum(maps) / len(maps)


def _check_inputs(module: FlaxUNet2DConditionModel, unet_params: Params, latents: jax.Array, context: Context) -> None:
    missing = set(cross_attention_layers(unet_params)) - set(context.layers)
    if missing:
        raise InputError(f"no keys and values for the cross-attention layers {sorted(missing)}")
    if module.addition_embed_type and context.added is None:
        raise InputError("this UNet also reads a vector for the whole prompt and the picture's sizes: none are given")
    for layer, given in context.layers.items():
        if given.key.shape[0] != latents.shape[0]:
            raise InputError(
                f"{latents.shape[0]} latents, but keys and values of {given.key.shape[0]} prompts ({layer})"
            )
        if given.key.dtype != module.dtype:
            raise InputError(
                f"the UNet computes in {jnp.dtype(module.dtype)}, the keys of {layer} are {given.key.dtype}"
            )
