"""From a concept's pictures to what the training step draws from: latents encoded once, masks, token ids."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import Architecture, BaseModel
from perfusion_jax.base_model.vae import LatentDistribution
from perfusion_jax.data.masks import normalise, shrink
from perfusion_jax.data.pictures import Picture
from perfusion_jax.runtime.errors import InputError

PLACEHOLDER = "<concept>"  # of a concept without a name of its own: which it is matters to people alone


class Examples(NamedTuple):
    """What a concept is learnt from; for ragged fleets, padded with pictures that are never drawn.

    Attributes:
        mean, std: of each picture's latents, as it is and mirrored: float32 [pictures, 2, height, width, channels].
        masks: weights of the loss, float32 [pictures, 2, height, width]; each mask's largest is 1.
        sizes: of each picture, before and after it was fitted, float32 [pictures, 6] (`base_model.Added`).
        prompt_ids: each picture's prompts, int32 [pictures, prompts, tokens]. The concept's token is
            `vocabulary_size`.
        num_pictures: how many of the pictures are real, int32 scalar.
        prior: pictures of its kind that the frozen model has drawn, without the concept's token; None where learning
            need not preserve what the model knows of them.
    """

    mean: jax.Array
    std: jax.Array
    masks: jax.Array
    sizes: jax.Array
    prompt_ids: jax.Array
    num_pictures: jax.Array
    prior: Optional["Examples"] = None


def with_mirrored(pictures: np.ndarray) -> np.ndarray:
    """Puts each picture and its mirror image side by side: [count, height, width, ...] to [count, 2, height, ...]."""
    return np.stack([pictures, pictures[:, :, ::-1]], axis=1)


# Compiled once for all concepts.
_encode_image = jax.jit(Architecture.encode_image, static_argnums=0)


def encode(base: BaseModel, pixels: np.ndarray) -> LatentDistribution:
    """Encodes pictures and their mirror images, one at a time.

    Args:
        base: the model.
        pixels: uint8 [count, height, width, 3].

    Returns:
        Mean and standard deviation of the latents, float32 [count, 2, height / f, width / f, channels].
    """
    both = with_mirrored(pixels).astype(np.float32) / 127.5 - 1
    each = [_encode_image(base.model, base.params["vae"], jnp.asarray(pair, base.model.vae.dtype)) for pair in both]
    return LatentDistribution(*(jnp.stack(arrays) for arrays in zip(*each, strict=True)))


def prompt_ids(
    model: Architecture,
    pictures: Sequence[Picture],
    templates: Sequence[str],
    phrase: str = PLACEHOLDER,
    placeholder: str = PLACEHOLDER,
) -> np.ndarray:
    """Tokenises the prompts of each picture: its caption, or else the templates.

    Args:
        model: for its tokeniser.
        pictures: with captions that have one `{}`, or without.
        templates: for those without, likewise.
        phrase: what stands at the `{}`.
        placeholder: the concept's, which the phrase has.

    Returns:
        int32 [pictures, prompts, tokens]; the concept's token is `vocabulary_size`.

    Raises:
        InputError: one is too long, or names another concept.
    """

    def of_picture(picture: Picture) -> np.ndarray:
        prompts = [picture.caption] * len(templates) if picture.caption else templates
        try:
            return model.tokenizer([prompt.replace("{}", phrase) for prompt in prompts], [placeholder])
        except InputError as error:
            raise InputError(f"the caption of {picture.name}: {error}" if picture.caption else str(error)) from error

    return np.stack([of_picture(picture) for picture in pictures])


def prompts_used(pictures: Sequence[Picture], templates: Sequence[str]) -> list[str]:
    """The prompts of training, each once: the captions, and the templates if a picture has no caption."""
    captions = [picture.caption for picture in pictures if picture.caption]
    return list(dict.fromkeys([*captions, *(templates if len(captions) < len(pictures) else ())]))


def on_latents(model: Architecture, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Masks of pictures, float32 [height, width] each, on the grid of latents with their mirror images.

    Returns:
        float32 [count, 2, height / f, width / f].
    """
    return with_mirrored(shrink(np.stack(masks), model.vae_factor))


def given_masks(model: Architecture, pictures: Sequence[Picture]) -> np.ndarray | None:
    """The masks that came with the pictures: float32 [count, 2, height / f, width / f], or None if there are none.

    Raises:
        InputError: some pictures have a mask and some none.
    """
    given = [picture.mask for picture in pictures if picture.mask is not None]
    if not given:
        return None
    if len(given) < len(pictures):
        without = next(picture for picture in pictures if picture.mask is None)
        raise InputError(f"{without.name}: has no mask, but other pictures have: give one for each, or none")
    return on_latents(model, given)


def make_examples(latents: LatentDistribution, masks: np.ndarray, sizes: np.ndarray, ids: np.ndarray) -> Examples:
    """Puts a concept's data together.

    Args:
        latents: float32 [count, 2, height, width, channels].
        masks: float32 [count, 2, height, width]; each is divided by its largest value.
        sizes: float32 [count, 6].
        ids: int32 [count, prompts, tokens].
    """
    return Examples(
        mean=latents.mean,
        std=latents.std,
        masks=jnp.asarray(normalise(np.asarray(masks, np.float32))),
        sizes=jnp.asarray(sizes),
        prompt_ids=jnp.asarray(ids),
        num_pictures=jnp.int32(len(ids)),
    )
