"""From a config to what a concept is learnt with: the frozen model, metric, evaluator and the concept's data."""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from perfusion_jax import shipped
from perfusion_jax.base_model import BaseModel, load_base_model, network_dtype
from perfusion_jax.base_model.clip import load_clip
from perfusion_jax.base_model.clipseg import Segmenter, load_segmenter
from perfusion_jax.base_model.instance import load_instance_encoder
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
from perfusion_jax.metrics import Evaluator


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


def load_evaluator(config: ConfigDict) -> Evaluator | None:
    """What validation pictures are scored by, or None if there is no CLIP."""
    folder = config.evaluator or (shipped.EVALUATOR if config.base == "emoji" else None)
    if not folder:
        return None
    instance = load_instance_encoder(config.instance_encoder) if config.instance_encoder else None
    return Evaluator(load_clip(folder), instance)


def read_pictures(source: str, masks: str = "", captions: str = "") -> list[Picture]:
    """Reads a concept's pictures.

    Args:
        source: as `config.pictures`.
        masks, captions: folders of them, if they are not where the pictures are.

    Raises:
        InputError: they cannot be used, or the package has no such example.
        UnavailableError: storage fails.
    """
    if source.startswith(dataset.PREFIX):
        if masks or captions:
            raise InputError(f"{source}: a dataset holds its masks and captions; none can be given beside it")
        return dataset.read_split(source)
    if not source.startswith("emoji:"):
        return read_folder(source, masks or None, captions or None)
    name = source.removeprefix("emoji:")
    examples = sorted(folder.name for folder in shipped.EXAMPLES.iterdir() if folder.is_dir())
    if name not in examples:
        raise InputError(f"config.pictures is {source!r}; the examples are {', '.join(examples)}")
    return read_folder(shipped.EXAMPLES / name, masks or None, captions or None)


def prepare_data(config: ConfigDict, base: BaseModel, pictures: Sequence[Picture], key: jax.Array) -> Data:
    """Fits and encodes a concept's pictures, and finds their masks.

    Args:
        config: the concept's.
        base: the model.
        pictures: as read.
        key: of the noise in which masks are looked for.

    Raises:
        InputError: the pictures, masks or prompts cannot be used.
    """
    side = config.size or base.unet.sample_size * base.vae_factor
    if side % base.vae_factor:
        raise InputError(f"config.size is {side}; it must be a multiple of {base.vae_factor}")
    pictures = [fit(picture, side, config.crop) for picture in pictures]
    pixels = np.stack([picture.pixels for picture in pictures])
    latents = encode(base, pixels)
    masks = find_masks(config, base, pictures, latents.mean, key)
    whole = np.ones((side, side), np.float32)
    masks = masks * on_latents(base, [whole if picture.inside is None else picture.inside for picture in pictures])
    ids = prompt_ids(base, pictures, config.templates)
    return Data(pixels, prompts_used(pictures, config.templates), make_examples(latents, masks, ids))


# Loaded and compiled once for all concepts.
_segmenter = lru_cache(maxsize=1)(load_segmenter)
_segment = jax.jit(Segmenter.masks, static_argnums=0)


def find_masks(
    config: ConfigDict, base: BaseModel, pictures: Sequence[Picture], latents: jax.Array, key: jax.Array
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
        segmenter = _segmenter(config.segmenter)
        ids = segmenter.tokenizer([config.super_category] * 2)
        pairs = with_mirrored(np.stack([picture.pixels for picture in pictures])).astype(np.float32) / 127.5 - 1
        masks = np.concatenate([_segment(segmenter, segmenter.params, ids, pair) for pair in pairs])
        return shrink(masks, base.vae_factor).reshape(latents.shape[:-1])
    return np.stack([attention_masks(base, base.params, pair, config.super_category, key) for pair in latents])


def concept_key(config: ConfigDict) -> jax.Array:
    """The random key of a concept: it depends on its seed and its name alone."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(config.name.encode()))
