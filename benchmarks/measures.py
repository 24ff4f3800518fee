"""What pictures and attention tell beyond the scores: variety, who is in a picture, where a word looks, open gates."""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from perfusion_jax.base_model import BaseModel
from perfusion_jax.formats.concept_file import ConceptCard
from perfusion_jax.method import edit as edit_lib
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.edit import Edit, Gate

WINDOWS = (1.0, 0.75, 0.5)
"""Sides of the parts of a picture in which things are looked for, as shares of its own."""
STRIDES = 8
"""Places of a window along a picture, were it a point."""
LIKENESS = 0.8
"""As near to a thing's own pictures as these to each other, times this: taken for the thing."""

Embed = Callable[[UInt8[np.ndarray, "count height width 3"]], Float32[np.ndarray, "count width"]]


def variety(embedded: Float[np.ndarray, "prompts seeds width"]) -> float:
    """How different the pictures of one prompt are: the mean over prompts and pairs of 1 - cosine.

    Args:
        embedded: unit vectors of pictures, at least two of each prompt.
    """
    count = embedded.shape[1]
    cosines = np.einsum("psw,ptw->pst", embedded, embedded)
    pairs = ~np.eye(count, dtype=bool)
    return float(1 - cosines[:, pairs].mean())


def likeness(own: Float[np.ndarray, "count width"]) -> float:
    """How near a thing's own pictures are to each other: the mean cosine over pairs; 1 for a single picture."""
    if len(own) == 1:
        return 1.0
    return float((own @ own.T)[~np.eye(len(own), dtype=bool)].mean())


def windows(picture: UInt8[np.ndarray, "side side 3"], share: float) -> UInt8[np.ndarray, "count part part 3"]:
    """Square parts of a picture, of one size, a STRIDES-th of its side apart."""
    side = len(picture)
    part, stride = round(side * share), max(1, side // STRIDES)
    corners = range(0, side - part + 1, stride)
    return np.stack([picture[top : top + part, left : left + part] for top in corners for left in corners])


def presence(
    embed: Embed,
    pictures: UInt8[np.ndarray, "count side side 3"],
    known: Mapping[str, Float[np.ndarray, "own width"]],
) -> dict[str, Bool[np.ndarray, " count"]]:
    """Which things are in which pictures.

    A thing is in a picture if some part of it is nearer to that thing's own pictures than to any other's that are
    known, and at least LIKENESS times as near as these are to each other.

    Args:
        embed: of an instance encoder, pictures to unit vectors.
        pictures: what to look at.
        known: things that could be there, their own pictures as `embed` gives them.
    """
    names = list(known)
    floors = np.array([LIKENESS * likeness(own) for own in known.values()])
    found = np.zeros((len(pictures), len(names)), bool)
    for share in WINDOWS:
        parts = np.stack([windows(picture, share) for picture in pictures])
        embedded = embed(parts.reshape(-1, *parts.shape[2:]))
        near = np.stack([(embedded @ own.T).mean(axis=1) for own in known.values()], axis=1)
        nearest = near.argmax(axis=1)[:, None] == np.arange(len(names))
        found |= (nearest & (near >= floors)).reshape(len(pictures), -1, len(names)).any(axis=1)
    return {name: found[:, number] for number, name in enumerate(names)}


def good_pictures(
    image: Float[np.ndarray, " count"], text: Float[np.ndarray, " count"], least_image: float, least_text: float
) -> Bool[np.ndarray, " count"]:
    """Which pictures show the thing and follow their prompt: both scores at least as high as asked for."""
    return (image >= least_image) & (text >= least_text)


def share_inside(
    attention: Float[np.ndarray, "count height width"], masks: Float[np.ndarray, "count height width"]
) -> Float[np.ndarray, " count"]:
    """The share of a word's attention that falls on the thing.

    Args:
        attention: that each place pays to the word.
        masks: 1 where the thing is, 0 elsewhere, and between.
    """
    return (attention * masks).sum(axis=(1, 2)) / attention.sum(axis=(1, 2))


def gates_by_position(
    base: BaseModel, concept: Concept, card: ConceptCard, prompts: Sequence[str]
) -> dict[int, Float[np.ndarray, " prompts"]]:
    """How far a concept's gate opens at each token, by its place from the concept's word: 0 at it, 1 after it.

    Args:
        base: the model it was learnt on.
        concept: learnt by Perfusion.
        card: its file's, with the gate that suits it.
        prompts: each with one `{}`.

    Returns:
        By place, the gates of the prompts that have a token there, between the start token and the first end token.
    """
    ids = base.model.tokenizer([prompt.replace("{}", card.placeholder) for prompt in prompts], [card.placeholder])
    encodings = base.model.encode(base.params, ids, concept.embedding[None]).tokens
    gates = Gate(*(jnp.full((1,), value) for value in (card.bias, card.temperature, 1.0)))
    edit = Edit(concept.target_input[None], concept.dual[None], gates)
    opened = np.asarray(edit_lib.gate(edit_lib.similarity(edit, encodings), gates))[..., 0]
    found: dict[int, list[float]] = {}
    for row, gate in zip(np.asarray(ids), opened, strict=True):
        word = int(np.flatnonzero(row == base.model.tokenizer.vocabulary_size)[0])
        end = int(np.flatnonzero(row == base.model.tokenizer.end)[0])
        for place in range(end + 1):
            found.setdefault(place - word, []).append(float(gate[place]))
    return {place: np.array(values) for place, values in sorted(found.items())}
