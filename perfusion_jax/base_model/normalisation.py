"""Group normalisation with the SiLU that follows it in the frozen UNet.

For the gradient it keeps its input alone, in the network's dtype, and computes the rest anew: what it works on in
float32 is several times as large, and on a TPU reading and writing it costs more than computing it.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.checkpoint, static_argnums=(3, 4))
def group_norm_silu(inputs: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float) -> jax.Array:
    """Normalises groups of channels (arXiv 1803.08494), then applies SiLU; both in float32.

    Args:
        inputs: [batch, height, width, channels].
        scale: [channels].
        bias: [channels].
        groups: divides the number of channels.
        epsilon: added to the variance.

    Returns:
        [batch, height, width, channels], the dtype of the inputs.
    """
    batch, _, _, channels = inputs.shape
    exact = inputs.astype(jnp.float32)

    def mean_of_group(values: jax.Array) -> jax.Array:
        # Channel by channel first: cutting the picture itself into groups would copy it into another layout.
        by_group = values.mean(axis=(1, 2)).reshape(batch, groups, channels // groups).mean(axis=-1)
        return jnp.repeat(by_group, channels // groups, axis=-1)

    mean = mean_of_group(exact)
    variance = jnp.maximum(mean_of_group(exact**2) - mean**2, 0)
    factor = jax.lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32)
    shift = bias.astype(jnp.float32) - mean * factor
    return jax.nn.silu(exact * factor[:, None, None] + shift[:, None, None]).astype(inputs.dtype)
