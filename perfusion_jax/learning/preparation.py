"""What each concept is learnt from: its pictures, encoded, with masks and prompts."""

import threading
import traceback
import zlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from perfusion_jax.base_model import BaseModel
from perfusion_jax.base_model.clipseg import load_segmenter
from perfusion_jax.config import KEYS
from perfusion_jax.data.captions import with_slots
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
from perfusion_jax.data.pictures import Picture, fit
from perfusion_jax.data.sources import read_pictures
from perfusion_jax.learning.resources import Resources
from perfusion_jax.learning.rounds import Round
from perfusion_jax.learning.scoring import check_validation
from perfusion_jax.learning.step import Learning, start
from perfusion_jax.learning.workdir import phrase
from perfusion_jax.method import baselines
from perfusion_jax.method.baselines import BASELINES, Learnt
from perfusion_jax.runtime.errors import InputError, UnavailableError, is_runtime_error


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
    side = config.size or base.model.picture_side
    if side % base.model.vae_factor:
        raise InputError(f"config.size is {side}; it must be a multiple of {base.model.vae_factor}")
    check_validation(config, base.model)
    placeholder = f"<{config.name}>"
    named = phrase(config, placeholder)
    longest = named.replace(placeholder, config.super_category)
    shorten = partial(base.model.tokenizer.shorten, phrase=longest)
    chosen = config.name != KEYS["name"].default
    pictures = with_slots(pictures, config.name, config.super_category, shorten, chosen)
    pictures = [fit(picture, side, config.crop) for picture in pictures]
    pixels = np.stack([picture.pixels for picture in pictures])
    latents = encode(base, pixels)
    masks = find_masks(config, base, pictures, latents.mean, key)
    whole = np.ones((side, side), np.float32)
    masks = masks * on_latents(
        base.model, [whole if picture.inside is None else picture.inside for picture in pictures]
    )
    sizes = np.array([picture.sizes for picture in pictures], np.float32)
    ids = prompt_ids(base.model, pictures, config.templates, named, placeholder)
    return Data(pixels, prompts_used(pictures, config.templates), make_examples(latents, masks, sizes, ids))


# Loaded and compiled once for all concepts.
_segmenter = lru_cache(maxsize=1)(load_segmenter)


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
        masks = given_masks(base.model, pictures)
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
        pairs = with_mirrored(np.stack([picture.pixels for picture in pictures])).astype(np.float32) / 127.5 - 1
        masks = np.concatenate([segmenter.segment(config.super_category, pair) for pair in pairs])
        return shrink(masks, base.model.vae_factor).reshape(latents.shape[:-1])
    return np.stack([attention_masks(base.model, base.params, pair, config.super_category, key) for pair in latents])


def concept_key(config: ConfigDict) -> jax.Array:
    """The random key of a concept: it depends on its seed and its name alone."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(config.name.encode()))


class Prepared(NamedTuple):
    """What this process has read for its slots of a round.

    Attributes:
        examples, learning, keys: by slot, on the host.
        pixels: the concepts' pictures by slot.
        failures: by slot, what is wrong with those that cannot be used.
    """

    examples: dict[int, Examples]
    learning: dict[int, Learning]
    keys: dict[int, np.ndarray]
    pixels: dict[int, np.ndarray]
    failures: dict[int, Exception]


def prepare(resources: Resources, current: Round, held: Sequence[int], cancelled: threading.Event) -> Prepared:
    """Reads, decodes and encodes the pictures of a round, and begins its concepts.

    Args:
        resources: what all rounds share.
        current: the round.
        held: slots of this process.
        cancelled: set when the rest is not needed any more.

    Raises:
        UnavailableError: storage fails, or the hub, from which a segmenter comes, cannot be reached.
        jax.errors.JaxRuntimeError: the first device fails, or its memory does not suffice.
        MemoryError: the host's does not.
    """
    prepared = Prepared({}, {}, {}, {}, {})
    for slot in held:
        member = current.members[slot]
        if member is None or cancelled.is_set():
            continue
        config, row = member.config, member.row
        try:
            key, mask_key = jax.random.split(concept_key(config))
            pictures = read_pictures(row.pictures, row.masks, row.captions)
            data = prepare_data(config, resources.base, pictures, mask_key)
            if config.prior_pictures:
                kind = (config.super_category, tuple(config.templates), config.prior_pictures)
                drawn_as = (resources.side_of(config), config.sampling_steps, config.guidance_scale)
                prior = resources.prior(*kind, *drawn_as, cancelled)
                data = data._replace(examples=data.examples._replace(prior=prior))
            concept = _begin(resources, config, data.prompts, jax.random.fold_in(mask_key, 1))
            _warn_of_pieces(resources.base, config)
        except Exception as error:  # storage raises what it likes; one concept must not end the others
            if isinstance(error, (UnavailableError, MemoryError)) or is_runtime_error(
                error
            ):  # no fault of the concept's
                raise
            traceback.clear_frames(error.__traceback__)  # which hold the pictures
            prepared.failures[slot] = error
            continue
        examples = data.examples if config.flip else _without_mirrored(data.examples)
        prepared.examples[slot] = jax.device_get(examples)
        prepared.learning[slot] = jax.device_get(start(concept, current.settings))
        prepared.keys[slot] = np.asarray(jax.random.key_data(key))
        prepared.pixels[slot] = data.pixels
    return prepared


def _begin(resources: Resources, config: ConfigDict, prompts: Sequence[str], key: jax.Array) -> Learnt:
    """What a method has before training."""
    base = resources.base
    if config.method in BASELINES:
        embedding = base.super_category_embedding(config.identifier or config.super_category)
        return baselines.begin(config.method, base.params["unet"], embedding, key, config.rank)
    assert resources.whitening is not None
    return base.new_concept(config.super_category, resources.whitening, prompts)


def _warn_of_pieces(base: BaseModel, config: ConfigDict) -> None:
    for word, near in base.model.tokenizer.in_pieces(config.super_category).items():
        logging.warning(
            "%s: the base model has no word %r, of which its super-category is made, and spells it in pieces%s",
            config.name,
            word,
            f"; near words are {', '.join(near)}" if near else ": take a common word for this kind of thing",
        )


def _without_mirrored(examples: Examples) -> Examples:
    """Puts each picture as it is where its mirror image stands: a flip then changes nothing."""
    prior = examples.prior and _without_mirrored(examples.prior)
    as_they_are = {name: getattr(examples, name)[:, [0, 0]] for name in ("mean", "std", "masks")}
    return examples._replace(**as_they_are, prior=prior)
