"""From a config to what a concept is learnt with: the frozen model, metric, evaluator and the concept's data."""

import zlib
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from perfusion_jax import shipped
from perfusion_jax.base_model import BaseModel, load_base_model, network_dtype
from perfusion_jax.base_model.clip import Clip, load_clip
from perfusion_jax.base_model.clipseg import load_segmenter
from perfusion_jax.covariance import load_whitening
from perfusion_jax.data import dataset
from perfusion_jax.data.examples import (
    Examples,
    encode,
    given_masks,
    make_examples,
    on_latents,
    prompt_ids,
    prompts_used,
    with_mirrored,
)
from perfusion_jax.data.masks import attention_masks, shrink
from perfusion_jax.data.pictures import Picture, fit, read_folder
from perfusion_jax.errors import InputError


class Data(NamedTuple):
    """A concept's data.

    Attributes:
        pixels: the pictures as they are shown, uint8 [count, side, side, 3].
        prompts: those of training, each once, with {} where the concept's name goes.
        examples: what the step draws from.
    """

    pixels: np.ndarray
    prompts: list[str]
    examples: Examples


def load_base(config: ConfigDict) -> BaseModel:
    """Loads the frozen model that a config names."""
    return load_base_model(
        config.base,
        dtype=network_dtype(config.dtype),
        revision=config.revision or None,
        variant=config.variant or None,
    )


def load_metric(config: ConfigDict, base: BaseModel) -> jax.Array:
    """C^-1/2 of the base model's text encoder.

    Raises:
        InputError: the config names no file of C and none came with the model.
    """
    file = config.covariance or base.covariance
    if not file:
        raise InputError(
            f"config.covariance is empty, and no covariance came with {config.base}: measure it once with "
            f"`python -m perfusion_jax.covariance --base {config.base} --captions captions.txt --out covariance.npz`"
        )
    return load_whitening(file, base.context_width)


def load_evaluator(config: ConfigDict) -> Clip | None:
    """The CLIP that scores validation pictures, or None if there is none."""
    folder = config.evaluator or (shipped.EVALUATOR if config.base == "emoji" else None)
    return load_clip(folder) if folder else None


def read_pictures(config: ConfigDict) -> list[Picture]:
    """Reads the pictures that a config names.

    Raises:
        InputError: they cannot be read, or the package has no such example.
    """
    if config.pictures.startswith(dataset.PREFIX):
        return dataset.read_split(config.pictures)
    if not config.pictures.startswith("emoji:"):
        return read_folder(config.pictures)
    name = config.pictures.removeprefix("emoji:")
    examples = sorted(folder.name for folder in shipped.EXAMPLES.iterdir() if folder.is_dir())
    if name not in examples:
        raise InputError(f"config.pictures is {config.pictures!r}; the examples are {', '.join(examples)}")
    return read_folder(shipped.EXAMPLES / name)


def load_data(config: ConfigDict, base: BaseModel, key: jax.Array) -> Data:
    """Reads, fits and encodes a concept's pictures, and finds their masks.

    Raises:
        InputError: the pictures, masks or prompts cannot be used.
    """
    side = config.size or base.unet.sample_size * base.vae_factor
    if side % base.vae_factor:
        raise InputError(f"config.size is {side}; it must be a multiple of {base.vae_factor}")
    pictures = [fit(picture, side, config.crop) for picture in read_pictures(config)]
    pixels = np.stack([picture.pixels for picture in pictures])
    latents = encode(base, pixels)
    masks = find_masks(config, base, pictures, latents.mean, key)
    whole = np.ones((side, side), np.float32)
    masks = masks * on_latents(base, [whole if picture.inside is None else picture.inside for picture in pictures])
    ids = prompt_ids(base, pictures, config.templates)
    return Data(pixels, prompts_used(pictures, config.templates), make_examples(latents, masks, ids))


def find_masks(
    config: ConfigDict, base: BaseModel, pictures: list[Picture], latents: jax.Array, key: jax.Array
) -> np.ndarray:
    """Finds masks by the first way that config.masks allows.

    Args:
        config: the run's.
        base: the model.
        pictures: square ones.
        latents: means of the pictures' and their mirror images' latents, [count, 2, height, width, channels].
        key: of the noise in which the UNet is asked.

    Returns:
        float32 [count, 2, height, width].

    Raises:
        InputError: there are no masks of the kind that the config insists on.
    """
    if config.masks == "none":
        return np.ones(latents.shape[:-1], np.float32)
    if config.masks in ("auto", "files"):
        masks = given_masks(base, pictures)
        if masks is not None:
            return masks
        if config.masks == "files":
            raise InputError(
                f"config.masks is 'files', but {config.pictures} has no masks/ folder and no picture with transparency"
            )
    if config.masks == "segmenter" and not config.segmenter:
        raise InputError("config.masks is 'segmenter', but config.segmenter names none")
    if config.segmenter and config.masks != "attention":
        segmenter = load_segmenter(config.segmenter)
        ids = segmenter.tokenizer([config.super_category] * 2)
        pairs = with_mirrored(np.stack([picture.pixels for picture in pictures])).astype(np.float32) / 127.5 - 1
        segment = jax.jit(segmenter.masks)
        masks = np.concatenate([segment(segmenter.params, ids, pair) for pair in pairs])
        return shrink(masks, base.vae_factor).reshape(latents.shape[:-1])
    find = jax.jit(partial(attention_masks, base, super_category=config.super_category))
    return np.stack([find(base.params, pair, key=key) for pair in latents])


def concept_key(config: ConfigDict) -> jax.Array:
    """The random key of a concept: it depends on its seed and its name alone."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(config.name.encode()))
