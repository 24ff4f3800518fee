"""What encoders of pictures have in common: fitting pictures, unit vectors, and embedding any number of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BATCH_SIZE = 64
"""Most inputs that are embedded at once."""


def fit_pictures(images: jax.Array, side: int, mean: tuple[float, ...], deviation: tuple[float, ...]) -> jax.Array:
    """Resizes and normalises pictures for an encoder.

    Args:
        images: [batch, height, width, 3] in [-1, 1].
        side: of the pictures that the encoder takes, in pixels.
        mean, deviation: by which the channels of pictures in [0, 1] are normalised, three numbers each.

    Returns:
        [batch, side, side, 3].
    """
    if images.shape[1:3] != (side, side):
        images = jax.image.resize(images, (len(images), side, side, 3), "cubic")
    return ((images + 1) / 2 - jnp.asarray(mean)) / jnp.asarray(deviation)


def unit(features: jax.Array) -> jax.Array:
    """The rows of [batch, width] at length one, float32."""
    exact = features.astype(jnp.float32)
    return exact / jnp.linalg.norm(exact, axis=-1, keepdims=True)


def embed_all(embed: Callable[[Any, np.ndarray], jax.Array], params: Any, inputs: np.ndarray) -> np.ndarray:
    """Embeds any number of inputs with few shapes to compile: batches of BATCH_SIZE, and for the rest a power of two.

    Args:
        embed: compiled function of weights and a batch, [batch, ...] to [batch, width].
        params: its weights.
        inputs: [count, ...].

    Returns:
        [count, width].
    """
    pieces = []
    for start in range(0, len(inputs), BATCH_SIZE):
        batch = inputs[start : start + BATCH_SIZE]
        size = 1 << (len(batch) - 1).bit_length()
        filled = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
        pieces.append(np.asarray(embed(params, filled))[: len(batch)])
    return np.concatenate(pieces)
