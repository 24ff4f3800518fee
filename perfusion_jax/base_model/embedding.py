"""What encoders of pictures have in common: fitting pictures, unit vectors, and embedding any number of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_SIZE = 64
"""Most inputs that are embedded at once."""


CUBIC = -0.75
"""PyTorch's coefficient of bicubic interpolation (jax has -0.5)."""


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Weights of PyTorch's bicubic interpolation along one axis (align_corners=False): float32 [new, old]."""
    weights = np.zeros((new, old), np.float32)
    for row, centre in enumerate((np.arange(new) + 0.5) * old / new - 0.5):
        for column in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - column)
            if x <= 1:
                weight = (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
            else:
                weight = CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(column, 0), old - 1)] += weight
    return weights


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """Interpolates a vision transformer's position embeddings to another grid, as PyTorch transformers does.

    Args:
        table: float32 [1 + rows x rows, width], the class token's first.
        side: rows, and columns, of the grid that is wanted.

    Returns:
        float32 [1 + side x side, width].
    """
    old = round((len(table) - 1) ** 0.5)
    if old == side:
        return table
    weights = cubic_weights(old, side)
    patches = np.einsum("yi,xj,ijc->yxc", weights, weights, table[1:].reshape(old, old, -1))
    return np.concatenate([table[:1], patches.reshape(side * side, -1)])


def fit_pictures(
    images: jax.Array,
    side: int,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    scaled: int | None = None,
    method: str = "cubic",
) -> jax.Array:
    """Resizes and normalises pictures for an encoder, as transformers does it by Pillow.

    Args:
        images: [batch, height, width, 3] in [-1, 1].
        side: of the pictures that the encoder takes, in pixels.
        mean, deviation: by which the channels of pictures in [0, 1] are normalised, three numbers each.
        scaled: side to which pictures are resized; what is more than `side` is cut off around the middle. None for
            `side`.
        method: of `jax.image.resize`.

    Returns:
        [batch, side, side, 3].
    """
    scaled = scaled or side
    if images.shape[1:3] != (scaled, scaled):
        # Pillow resizes rows, then columns, and its bytes hold nothing of what cubic interpolation overshoots.
        for height in (images.shape[1], scaled):
            images = jnp.clip(jax.image.resize(images, (len(images), height, scaled, 3), method), -1, 1)
    first = (scaled - side) // 2
    images = images[:, first : first + side, first : first + side]
    return ((images + 1) / 2 - jnp.asarray(mean)) / jnp.asarray(deviation)


def unit(features: jax.Array) -> jax.Array:
    """The rows of [batch, width] at length one, float32."""
    exact = features.astype(jnp.float32)
    return exact / jnp.linalg.norm(exact, axis=-1, keepdims=True)


def embed_all(embed: Callable[[Any, np.ndarray], jax.Array], params: Any, inputs: np.ndarray) -> np.ndarray:
    """Embeds any number of inputs with few shapes to compile: batches of BATCH_SIZE, and for the rest a power of two.

    Args:
        embed: compiled function of weights and a batch, [batch, ...] to [batch, width].
        params: its weights. Devices on all of which they lie whole share each batch.
        inputs: [count, ...].

    Returns:
        [count, width].
    """
    held = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = held.mesh if isinstance(held, NamedSharding) else None
    ways = mesh.size if mesh is not None else 1
    pieces = []
    for start in range(0, len(inputs), BATCH_SIZE):
        batch = inputs[start : start + BATCH_SIZE]
        size = -(-(1 << (len(batch) - 1).bit_length()) // ways) * ways
        filled = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
        if mesh is not None:
            filled = jax.device_put(filled, NamedSharding(mesh, P(mesh.axis_names)))
        pieces.append(np.asarray(embed(params, filled))[: len(batch)])
    return np.concatenate(pieces)
