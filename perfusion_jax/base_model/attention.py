"""Attention of the frozen UNet."""

import math

import jax
import jax.numpy as jnp

from perfusion_jax.base_model.flash_attention import LANES, flash_attention

# Queries whose scores against all keys are computed at once on a CPU: few enough that they stay in its cache.
QUERY_CHUNK = 256
SMALLEST_CHUNK = 32
# Tokens from which on self-attention on a TPU keeps its scores off the HBM.
MANY_TOKENS = 512


def attend(query: jax.Array, key: jax.Array, value: jax.Array, heads: int) -> jax.Array:
    """Multi-head softmax attention, logits and softmax in float32.

    Args:
        query: [batch, queries, width].
        key: [batch, keys, width].
        value: [batch, keys, width].
        heads: number of heads; divides the width.

    Returns:
        [batch, queries, width], the dtype of the query.
    """

    def split(tokens: jax.Array) -> jax.Array:
        return tokens.reshape(*tokens.shape[:-1], heads, tokens.shape[-1] // heads)

    dense = jax.nn.dot_product_attention
    flash = query.shape[1] % LANES == 0 and min(query.shape[1], key.shape[1]) >= MANY_TOKENS
    attended = jax.lax.platform_dependent(
        split(query), split(key), split(value), cpu=_in_chunks, tpu=flash_attention if flash else dense, default=dense
    )
    return attended.reshape(query.shape)


def _in_chunks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention over [batch, tokens, heads, width], a chunk of queries at a time.

    Neither the scores nor anything of their size is kept for the gradient, which computes them anew.
    """
    batch, queries, *rest = query.shape
    chunk = math.gcd(queries, QUERY_CHUNK)
    if queries <= QUERY_CHUNK or chunk < SMALLEST_CHUNK:
        return _softmax_attention(query, key, value)
    chunks = jnp.moveaxis(query.reshape(batch, -1, chunk, *rest), 1, 0)
    attended = jax.lax.map(jax.checkpoint(lambda chunk: _softmax_attention(chunk, key, value)), chunks)
    return jnp.moveaxis(attended, 0, 1).reshape(query.shape)


def _softmax_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention over [batch, tokens, heads, width]; normalised after the values, which are smaller than the scores."""
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    exponentials = jnp.exp(scale * (scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))))
    weighted = jnp.einsum(
        "bhqk,bkhd->bqhd", exponentials.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    totals = jnp.swapaxes(exponentials.sum(axis=-1), 1, 2)
    return (weighted / totals[..., None]).astype(query.dtype)
