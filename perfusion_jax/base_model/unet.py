"""The frozen UNet, run on keys and values that are given.

The UNet reads the words of a prompt only through the keys and values of its cross-attention, and they depend on the
prompt alone. `keys_values` computes them once, under whatever edit is in the parameter tree; `denoise` runs the UNet on
them and never computes its own `to_k` and `to_v`. Some models (SDXL) also read one vector for the whole prompt, and the
sizes of the picture.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model.attention import attend
from perfusion_jax.base_model.convolution import Padding, convolve
from perfusion_jax.base_model.flax_classes import (
    FlaxAttention,
    FlaxBasicTransformerBlock,
    FlaxGEGLU,
    FlaxResnetBlock2D,
    FlaxTransformer2DModel,
    FlaxUNet2DConditionModel,
    FlaxUpsample2D,
)
from perfusion_jax.base_model.normalisation import group_norm_silu
from perfusion_jax.method import edit as edit_lib
from perfusion_jax.method.surgery import EDIT, TARGET_OUTPUTS, Params, cross_attention_layers
from perfusion_jax.runtime.errors import InputError


class KeyValue(NamedTuple):
    """Keys and values of one cross-attention layer for a batch of prompts, [batch, tokens, out_width] each."""

    key: jax.Array
    value: jax.Array


KeysValues = dict[str, KeyValue]


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


Observer = Callable[[jax.Array, jax.Array, int], None]


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
    batch = latents.shape[0]
    halvings = len(module.block_out_channels) - 1

    def intercept(next_fun: Any, args: Any, kwargs: Any, call: nn.module.InterceptorContext) -> Any:
        block = call.module
        if call.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if isinstance(block, FlaxBasicTransformerBlock):
            # The tokens of all samples along one axis: `jax.vmap` over members with one sample each would otherwise put
            # an axis of size 1 in the middle, around which the TPU compiler fuses less. `benchmarks/tpu_step.py`, 16
            # members with one sample each: 86.6 GB of HBM traffic with that axis, 75.3 GB without.
            tokens = args[0]
            return next_fun(tokens.reshape(-1, tokens.shape[-1]), *args[1:], **kwargs).reshape(tokens.shape)
        if isinstance(block, FlaxAttention):

            def project(projection: nn.Dense) -> jax.Array:
                return projection(args[0]).reshape(batch, -1, projection.features)

            given = context.layers.get("/".join(block.path))
            query = project(block.query)
            key, value = given if given is not None else (project(block.key), project(block.value))
            if given is not None and observe is not None:
                observe(query, key, block.heads)
            attended = attend(query, key, value, block.heads)
            return block.proj_attn(attended.reshape(*args[0].shape[:-1], -1))
        if isinstance(block, FlaxGEGLU):
            return _gated(block.proj(args[0]))
        if isinstance(block, FlaxResnetBlock2D):
            return _residual(block, *args[:2])
        if isinstance(block, nn.GroupNorm) and isinstance(block.parent, FlaxTransformer2DModel):
            # PyTorch diffusers has 1e-6 here and 1e-5 elsewhere; the Flax class has 1e-5 in both places.
            exact = nn.GroupNorm(block.num_groups, epsilon=1e-6, dtype=block.dtype, parent=None)
            return exact.apply({"params": block.variables["params"]}, args[0])
        if isinstance(block, FlaxUpsample2D):
            # Grids of an odd size were rounded up when they were halved; the Flax class can only double them.
            level = halvings - 1 - int(block.path[0].removeprefix("up_blocks_"))
            size = [-(-side // 2**level) for side in latents.shape[1:3]]
            if size != [2 * side for side in args[0].shape[1:3]]:
                return block.conv(_enlarge(args[0], *size))
        if isinstance(block, nn.Conv):
            kernel, bias = (block.variables["params"][name].astype(block.dtype) for name in ("kernel", "bias"))
            # diffusers always spells out pairs, or "VALID" for no padding.
            strides = cast(tuple[int, int], block.strides)
            padding = ((0, 0), (0, 0)) if block.padding == "VALID" else cast(Padding, block.padding)
            return convolve(args[0].astype(block.dtype), kernel, strides, padding) + bias
        return next_fun(*args, **kwargs)

    # The text enters through the intercepted attention alone; the module still wants an argument in its place.
    no_text = jnp.zeros((batch, 1, 1), latents.dtype)
    added = None
    if context.added is not None:
        added = {"text_embeds": context.added.pooled, "time_ids": context.added.sizes}
    channels_first = jnp.moveaxis(latents, -1, 1)
    with nn.intercept_methods(intercept):
        prediction = module.apply({"params": unet_params}, channels_first, timesteps, no_text, added).sample
    return jnp.moveaxis(prediction, 1, -1)


def _enlarge(hidden: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbour enlargement of [batch, ..., ..., channels] to a size, as PyTorch rounds it."""
    rows, columns = (
        jnp.asarray([position * before // after for position in range(after)])
        for before, after in zip(hidden.shape[1:3], (height, width), strict=True)
    )
    return hidden[:, rows][:, :, columns]


@jax.checkpoint
def _gated(projected: jax.Array) -> jax.Array:
    """GEGLU (arXiv 2002.05202) after its projection; for the gradient it keeps that alone."""
    # PyTorch diffusers, and so every published checkpoint, uses the exact GELU; the Flax class approximates it by a
    # tanh.
    linear, gate = jnp.split(projected, 2, axis=-1)
    return linear * nn.gelu(gate, approximate=False)


def _residual(block: FlaxResnetBlock2D, inputs: jax.Array, time_embedding: jax.Array) -> jax.Array:
    """FlaxResnetBlock2D with the block's own parameters; it keeps less for the gradient."""

    def normalise(norm: nn.GroupNorm, inputs: jax.Array) -> jax.Array:
        weights = norm.variables["params"]
        return group_norm_silu(inputs, weights["scale"], weights["bias"], norm.num_groups, norm.epsilon)

    hidden = block.conv1(normalise(block.norm1, inputs))
    hidden = hidden + block.time_emb_proj(nn.silu(time_embedding))[:, None, None]
    hidden = block.conv2(normalise(block.norm2, hidden))
    return hidden + (inputs if block.conv_shortcut is None else block.conv_shortcut(inputs))


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
