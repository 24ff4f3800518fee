"""What the blocks of diffusers' Flax UNet compute here instead of what their classes do.

The classes hold the parameters and the wiring. Where they are inexact against PyTorch diffusers, for which every
published checkpoint was trained, or keep too much memory, or would compute keys and values by themselves, a function of
this module stands in for their call: it is given the block, the call that it replaces, and that call's arguments.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from perfusion_jax.base_model.attention import attend
from perfusion_jax.base_model.convolution import Padding, convolve
from perfusion_jax.base_model.flax_classes import (
    FlaxAttention,
    FlaxBasicTransformerBlock,
    FlaxGEGLU,
    FlaxResnetBlock2D,
    FlaxTransformer2DModel,
    FlaxUpsample2D,
)
from perfusion_jax.base_model.normalisation import group_norm_silu


class KeyValue(NamedTuple):
    """Keys and values of one cross-attention layer for a batch of prompts, [batch, tokens, out_width] each."""

    key: jax.Array
    value: jax.Array


KeysValues = dict[str, KeyValue]

Observer = Callable[[jax.Array, jax.Array, int], None]

Call = Callable[..., Any]


def interceptor(latents: jax.Array, halvings: int, layers: KeysValues, observe: Observer | None) -> Call:
    """The interceptor of method calls (`flax.linen.intercept_methods`) under which the UNet runs.

    Args:
        latents: what the UNet is given, [batch, height, width, channels].
        halvings: how often it halves their grid.
        layers: keys and values of its cross-attention.
        observe: called for every cross-attention layer, in order, with its queries, keys and number of heads.
    """
    stand_ins: Mapping[type[nn.Module], Call] = {
        FlaxAttention: partial(_attention, batch=latents.shape[0], layers=layers, observe=observe),
        FlaxBasicTransformerBlock: _transformer_block,
        FlaxGEGLU: _geglu,
        FlaxResnetBlock2D: _residual,
        FlaxUpsample2D: partial(_upsample, grid=latents.shape[1:3], halvings=halvings),
        nn.Conv: _convolution,
        nn.GroupNorm: _group_norm,
    }

    def intercept(replaced: Call, args: Any, kwargs: Any, call: nn.module.InterceptorContext) -> Any:
        stand_in = stand_ins.get(type(call.module)) if call.method_name == "__call__" else None
        return replaced(*args, **kwargs) if stand_in is None else stand_in(call.module, replaced, *args, **kwargs)

    return intercept


def _attention(
    block: FlaxAttention,
    _: Call,
    hidden: jax.Array,
    *ignored: Any,
    batch: int,
    layers: KeysValues,
    observe: Observer | None,
    **also_ignored: Any,
) -> jax.Array:
    """Attention over tokens in one row, [batch * tokens, width]; by keys and values that are given, where there are."""

    def project(projection: nn.Dense) -> jax.Array:
        return projection(hidden).reshape(batch, -1, projection.features)

    given = layers.get("/".join(block.path))
    query = project(block.query)
    key, value = given if given is not None else (project(block.key), project(block.value))
    if given is not None and observe is not None:
        observe(query, key, block.heads)
    attended = attend(query, key, value, block.heads)
    return block.proj_attn(attended.reshape(*hidden.shape[:-1], -1))


def _transformer_block(
    _: FlaxBasicTransformerBlock, replaced: Call, tokens: jax.Array, *args: Any, **kwargs: Any
) -> jax.Array:
    """The same, with the tokens of all samples along one axis.

    `jax.vmap` over members with one sample each would otherwise put an axis of size 1 in the middle, around which the
    TPU compiler fuses less. `benchmarks/tpu_step.py`, 16 members with one sample each: 86.6 GB of HBM traffic with that
    axis, 75.3 GB without.
    """
    return replaced(tokens.reshape(-1, tokens.shape[-1]), *args, **kwargs).reshape(tokens.shape)


def _geglu(block: FlaxGEGLU, _: Call, hidden: jax.Array, **ignored: Any) -> jax.Array:
    return _gated(block.proj(hidden))


@jax.checkpoint
def _gated(projected: jax.Array) -> jax.Array:
    """GEGLU (arXiv 2002.05202) after its projection; for the gradient it keeps that alone."""
    # PyTorch diffusers, and so every published checkpoint, uses the exact GELU; the Flax class approximates it by a
    # tanh.
    linear, gate = jnp.split(projected, 2, axis=-1)
    return linear * nn.gelu(gate, approximate=False)


def _residual(
    block: FlaxResnetBlock2D, _: Call, inputs: jax.Array, time_embedding: jax.Array, **ignored: Any
) -> jax.Array:
    """The same with the block's own parameters; it keeps less for the gradient."""

    def normalise(norm: nn.GroupNorm, inputs: jax.Array) -> jax.Array:
        weights = norm.variables["params"]
        return group_norm_silu(inputs, weights["scale"], weights["bias"], norm.num_groups, norm.epsilon)

    hidden = block.conv1(normalise(block.norm1, inputs))
    hidden = hidden + block.time_emb_proj(nn.silu(time_embedding))[:, None, None]
    hidden = block.conv2(normalise(block.norm2, hidden))
    return hidden + (inputs if block.conv_shortcut is None else block.conv_shortcut(inputs))


def _group_norm(block: nn.GroupNorm, replaced: Call, inputs: jax.Array, **kwargs: Any) -> jax.Array:
    """PyTorch diffusers has an epsilon of 1e-6 before transformers and 1e-5 elsewhere; the Flax class always 1e-5."""
    if not isinstance(block.parent, FlaxTransformer2DModel):
        return replaced(inputs, **kwargs)
    exact = nn.GroupNorm(block.num_groups, epsilon=1e-6, dtype=block.dtype, parent=None)
    return cast(jax.Array, exact.apply({"params": block.variables["params"]}, inputs))


def _upsample(
    block: FlaxUpsample2D, replaced: Call, hidden: jax.Array, *, grid: tuple[int, ...], halvings: int, **kwargs: Any
) -> jax.Array:
    """Grids of an odd size were rounded up when they were halved; the Flax class can only double them."""
    level = halvings - 1 - int(block.path[0].removeprefix("up_blocks_"))
    size = [-(-side // 2**level) for side in grid]
    if size == [2 * side for side in hidden.shape[1:3]]:
        return replaced(hidden, **kwargs)
    return block.conv(_enlarge(hidden, *size))


def _enlarge(hidden: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbour enlargement of [batch, ..., ..., channels] to a size, as PyTorch rounds it."""
    rows, columns = (
        jnp.asarray([position * before // after for position in range(after)])
        for before, after in zip(hidden.shape[1:3], (height, width), strict=True)
    )
    return hidden[:, rows][:, :, columns]


def _convolution(block: nn.Conv, _: Call, inputs: jax.Array) -> jax.Array:
    """The same as one product of matrices where that is faster (`convolution.convolve`)."""
    kernel, bias = (block.variables["params"][name].astype(block.dtype) for name in ("kernel", "bias"))
    # diffusers always spells out pairs, or "VALID" for no padding.
    strides = cast(tuple[int, int], block.strides)
    padding = ((0, 0), (0, 0)) if block.padding == "VALID" else cast(Padding, block.padding)
    return convolve(inputs.astype(block.dtype), kernel, strides, padding) + bias
