"""Attention kernels of the frozen UNet."""

import jax


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

    return jax.nn.dot_product_attention(split(query), split(key), split(value)).reshape(query.shape)
