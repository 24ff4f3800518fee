"""Write captions of scenes, and split captions into the words that the tokenizer must know."""

from collections.abc import Sequence

import numpy as np

from perfusion_jax.emoji_world import catalogue
from perfusion_jax.emoji_world.descriptions import Description, Thing

PHOTO_OPENINGS = (
    "a photo of",
    "a photo of",
    "a photo of",
    "the photo of",
    "a picture of",
    "an image of",
    "a rendering of",
    "a rendition of",
    "a depiction of",
    "a cropped photo of",
    "a close-up photo of",
    "a bright photo of",
    "a dark photo of",
    "a good photo of",
    "a clear photo of",
    "a nice picture of",
)
"""Openings of the personalisation templates (textual inversion's and Perfusion's). They say nothing of the picture."""

STYLE_OPENINGS = {"sketch": "a pencil sketch of", "monochrome": "a black and white photo of"}

EMPTY_ADJECTIVES = ("clean", "dirty", "cool", "nice", "weird", "good")
"""Adjectives of those templates. They say nothing of the picture either."""

VOWELS = "aeiou"


def noun_phrase(words: str, determiner: str = "a") -> str:
    """`determiner` and `words`, with "an" where English wants it: noun_phrase("blue owl"), noun_phrase("owl", "my")."""
    if determiner == "a" and words[0] in VOWELS:
        determiner = "an"
    return f"{determiner} {words}"


def place_phrase(place: str) -> str:
    """Where a scene is, with its preposition: "on the beach", "on a red background"."""
    if place in catalogue.PLACE_PHRASES:
        return catalogue.PLACE_PHRASES[place]
    return f"on {noun_phrase(place)} background"


def describe_objects(things: Sequence[Thing]) -> str:
    """Plain noun phrase of a scene's objects from left to right: "a blue dog wearing a hat and an owl"."""
    phrases = []
    for thing in things:
        phrase = noun_phrase(f"{thing.colour} {thing.category}" if thing.colour else thing.category)
        phrases.append(f"{phrase} wearing {noun_phrase(thing.headwear)}" if thing.headwear else phrase)
    return " and ".join(phrases)


def write_caption(description: Description, random: np.random.Generator) -> str:
    """A caption of a scene, in one of many wordings.

    Args:
        description: what the scene shows.
        random: NumPy generator that chooses the wording.

    Returns:
        Lower-case English without punctuation. May leave out the place, never an object.
    """
    place = place_phrase(description.place)
    if not description.things:
        return f"a photo of {_bare_place(description.place)}" if random.random() < 0.5 else place
    what = describe_objects(description.things)
    if description.style is None and len(description.things) == 1:
        what = _vary_determiner(what, random)
    if description.style is not None:
        what = f"{STYLE_OPENINGS[description.style]} {what}"
    elif random.random() < 0.72:
        what = f"{random.choice(PHOTO_OPENINGS)} {what}"
    says_place = random.random() < (0.93 if description.place in catalogue.PLACES else 0.6)
    return f"{what} {place}" if says_place else what


def _vary_determiner(phrase: str, random: np.random.Generator) -> str:
    """Now and then replace the article by another word of the templates, or add an adjective that says nothing."""
    determiner = random.choice(("a", "the", "my", "one"), p=(0.64, 0.2, 0.08, 0.08))
    words = phrase.split(" ", 1)[1]
    if random.random() < 0.1:
        words = f"{random.choice(EMPTY_ADJECTIVES)} {words}"
    return noun_phrase(words, determiner)


def _bare_place(place: str) -> str:
    """The place as a thing of its own: "the beach", "a red background", "the night"."""
    if place in catalogue.BACKGROUND_COLOURS:
        return f"{noun_phrase(place)} background"
    return {"table": "a table", "water": "the water"}.get(place, f"the {place}")


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = [
        *PHOTO_OPENINGS,
        *STYLE_OPENINGS.values(),
        *EMPTY_ADJECTIVES,
        *catalogue.CATEGORIES,
        *catalogue.OTHERS,
        *catalogue.HEADWEAR,
        *catalogue.COLOURS,
        *(place_phrase(place) for place in (*catalogue.PLACES, *catalogue.BACKGROUND_COLOURS)),
        *(_bare_place(place) for place in catalogue.PLACES),
        "a an the my one and wearing with of",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})
