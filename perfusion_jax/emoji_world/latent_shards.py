"""Scenes as the diffusion model sees them: encoded once, kept on disk in shards of latents, tokens and masks."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from perfusion_jax.emoji_world import drawings, scenes, tokenizer, torch_training
from perfusion_jax.emoji_world.model_folder import LATENT_PIXELS

SHARD_SCENES = 16_384
SHARDS = 8
"""The training set: 131,072 scenes, revisited in another order on every pass."""


def encode_scenes(
    seed: int,
    first: int,
    count: int,
    sprites: scenes.Sprites,
    autoencoder: AutoencoderKL,
    text_tokenizer: CLIPTokenizer,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Render and encode scenes first..first+count-1 of a sequence.

    Returns:
        Dictionary of arrays: latents float16 [count, channels, 8, 8]; tokens int16 [count, 24];
        masks uint8 [count, 8, 8], 255 where objects cover the whole cell.
    """
    latents, tokens, masks = [], [], []
    for start in range(first, first + count, batch_size):
        indices = range(start, min(start + batch_size, first + count))
        batch = [scenes.render_scene(seed, index, sprites) for index in indices]
        images = torch_training.from_pixels(np.stack([scene.image for scene in batch]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents.append(autoencoder.encode(images).latent_dist.mean.to(torch.float16).numpy())
        tokens.append(np.array(tokenizer.encode(text_tokenizer, [scene.caption for scene in batch]), np.int16))
        masks.append(np.stack([shrink_mask(scene.masks) for scene in batch]))
    return {"latents": np.concatenate(latents), "tokens": np.concatenate(tokens), "masks": np.concatenate(masks)}


def shrink_mask(masks: np.ndarray) -> np.ndarray:
    """Share of each latent cell that any object covers: uint8 [things, 64, 64] to uint8 [8, 8]."""
    union = masks.max(axis=0, initial=0)
    cell = scenes.PIXELS // LATENT_PIXELS
    shares = union.reshape(LATENT_PIXELS, cell, LATENT_PIXELS, cell).mean(axis=(1, 3))
    return np.round(shares).astype(np.uint8)


def load_shard(
    folder: Path, seed: int, number: int, autoencoder: AutoencoderKL, text_tokenizer: CLIPTokenizer
) -> dict[str, np.ndarray]:
    """Shard `number`, encoded now if it is not in `folder` yet. Returns what `encode_scenes` returns."""
    path = folder / f"shard_{seed}_{number:03d}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sprites = drawings.world_sprites()
        arrays = encode_scenes(seed, number * SHARD_SCENES, SHARD_SCENES, sprites, autoencoder, text_tokenizer)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, latents=arrays["latents"], tokens=arrays["tokens"], masks=arrays["masks"])
        partial.replace(path)
    with np.load(path) as file:
        return dict(file)


def batches(
    folder: Path, seed: int, first_step: int, batch_size: int, autoencoder: AutoencoderKL, text_tokenizer: CLIPTokenizer
) -> Iterator[dict[str, np.ndarray]]:
    """The scenes of training steps first_step, first_step + 1, ..., without end. See `encode_scenes`."""
    loaded = -1
    for step in itertools.count(first_step):
        number, indices = batch_indices(seed, step, batch_size)
        if number != loaded:
            shard, loaded = load_shard(folder, seed, number, autoencoder, text_tokenizer), number
        yield {name: array[indices] for name, array in shard.items()}


def batch_indices(seed: int, step: int, batch_size: int) -> tuple[int, np.ndarray]:
    """Which scenes training step `step` sees: (shard number, indices within it).

    Each pass over a shard has an order of its own. `batch_size` must divide SHARD_SCENES.
    """
    steps_a_shard = SHARD_SCENES // batch_size
    visit, position = divmod(step, steps_a_shard)
    order = np.random.default_rng([seed, visit]).permutation(SHARD_SCENES)
    return visit % SHARDS, order[position * batch_size : (position + 1) * batch_size]
