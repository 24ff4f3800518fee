"""From a concept's pictures to what the training step draws from: latents encoded once, masks, token ids."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import BaseModel
from perfusion_jax.base_model.vae import LatentDistribution
from perfusion_jax.data.masks import normalise, shrink
from perfusion_jax.data.pictures import Picture
from perfusion_jax.errors import InputError
from perfusion_jax.training import Examples

PLACEHOLDER = "<concept>"  # the concept's own name matters to people alone: in training there is one concept


def with_mirrored(pictures: np.ndarray) -> np.ndarray:
    """Puts each picture and its mirror image side by side: [count, height, width, ...] to [count, 2, height, ...]."""
    return np.stack([pictures, pictures[:, :, ::-1]], axis=1)


def encode(base: BaseModel, pixels: np.ndarray) -> LatentDistribution:
    """Encodes pictures and their mirror images, one at a time.

    Args:
        base: the model.
        pixels: uint8 [count, height, width, 3].

    Returns:
        Mean and standard deviation of the latents, float32 [count, 2, height / f, width / f, channels].
    """
    compiled = jax.jit(base.encode_image)
    both = with_mirrored(pixels).astype(np.float32) / 127.5 - 1
    each = [compiled(base.params["vae"], jnp.asarray(pair, base.vae.dtype)) for pair in both]
    return LatentDistribution(*(jnp.stack(arrays) for arrays in zip(*each, strict=True)))


def prompt_ids(base: BaseModel, pictures: Sequence[Picture], templates: Sequence[str]) -> np.ndarray:
    """Tokenises the prompts of each picture: its caption, or else the templates.

    Returns:
        int32 [pictures, prompts, tokens]; the concept's token is `vocabulary_size`.
    """
    rows = [[picture.caption] * len(templates) if picture.caption else templates for picture in pictures]
    return np.stack([base.tokenizer([t.replace("{}", PLACEHOLDER) for t in row], [PLACEHOLDER]) for row in rows])


def given_masks(base: BaseModel, pictures: Sequence[Picture]) -> np.ndarray | None:
    """The masks that came with the pictures, on the grid of latents: float32 [count, 2, height, width].

    None if no picture has one.

    Raises:
        InputError: some pictures have a mask and some none, or one is empty.
    """
    without = [picture.name for picture in pictures if picture.mask is None]
    if len(without) == len(pictures):
        return None
    if without:
        raise InputError(f"{without[0]}: has no mask, but other pictures have: give one for each, or none")
    masks = shrink(np.stack([picture.mask for picture in pictures if picture.mask is not None]), base.vae_factor)
    return with_mirrored(masks)


def make_examples(latents: LatentDistribution, masks: np.ndarray, ids: np.ndarray) -> Examples:
    """Puts a concept's data together.

    Args:
        latents: float32 [count, 2, height, width, channels].
        masks: float32 [count, 2, height, width]; each is divided by its largest value.
        ids: int32 [count, prompts, tokens].
    """
    return Examples(
        mean=latents.mean,
        std=latents.std,
        masks=jnp.asarray(normalise(np.asarray(masks, np.float32))),
        prompt_ids=jnp.asarray(ids),
        num_pictures=jnp.int32(len(ids)),
    )
