"""Captions: what a scene shows in English words, and which of the words tell an individual from others of its kind."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from pretraining import individuals, places, scenes, things
from pretraining.places import COLOURS

OPENINGS = (
    "a photo of",
    "a photo of",
    "a photo of",
    "the photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "a rendering of",
    "a rendition of",
    "a depiction of",
    "a cropped photo of",
    "a close up photo of",
    "a bright photo of",
    "a dark photo of",
    "a good photo of",
    "a clear photo of",
    "a nice picture of",
)
"""Openings of the personalisation templates (textual inversion's and Perfusion's). They say nothing of the picture."""

EMPTY_ADJECTIVES = ("clean", "dirty", "cool", "nice", "weird", "good")
"""Adjectives of those templates. They say nothing of the picture either."""

HANDS = {
    "noto": "soft",
    "noto-v1": "flat",
    "twemoji": "plain",
    "emojione": "neat",
    "fxemoji": "simple",
    "streamline": "inked",
}
"""A word for each vendor's way to draw."""

ANYTHING = ("thing", "object")
"""Nouns that say no kind. Now and then one stands where a code tells what is meant: some things have no word."""

CODED_NAMELESS_SHARE = 0.06
"""How often one does."""

JOINTS = ("and", "and", "next to", "beside", "with")

CODE = "<|individual|>"
"""Stands in a caption where the code of an individual is put in training. No token of the shipped tokenizer."""


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a caption.

    Attributes:
        text: lower case.
        phrase: number of the noun phrase that it belongs to; -1 for none.
        tells: it stands before a noun and tells an individual from others of its kind.
        noun: it is the last word of its phrase, the kind or what is said for it.
    """

    text: str
    phrase: int = -1
    tells: bool = False
    noun: bool = False


@dataclasses.dataclass(frozen=True)
class Caption:
    """Words, and the thing (index in the scenes' list) whose code stands in it or is added to its noun; -1 for none."""

    words: tuple[Word, ...]
    coded: int = -1
    code_added: bool = False
    coded_phrase: int = -1

    def __str__(self) -> str:
        """The caption as a text."""
        return " ".join(word.text for word in self.words)


def article(word: str) -> str:
    """The indefinite article that English wants before `word`."""
    return "an" if word[0] in "aeiou" else "a"


def colour_words(colours: torch.Tensor) -> torch.Tensor:
    """The colour word of each sRGB colour [..., 3] in [0, 1]: int [...], index in COLOURS."""
    names = {name: number for number, name in enumerate(COLOURS)}
    hue, saturation, value = individuals.rgb_to_hsv(colours).unbind(-1)
    degrees = hue * 360
    word = torch.full(hue.shape, names["red"])
    for start, name in (
        (14, "orange"),
        (44, "yellow"),
        (68, "green"),
        (168, "blue"),
        (256, "purple"),
        (292, "pink"),
        (344, "red"),
    ):
        word = torch.where(degrees >= start, names[name], word)
    warm = (degrees >= 8) & (degrees < 50)
    word = torch.where(warm & (value < 0.68), names["brown"], word)
    word = torch.where(((degrees < 14) | (degrees >= 330)) & (saturation < 0.5) & (value > 0.7), names["pink"], word)
    grey = saturation < 0.14
    word = torch.where(grey, torch.where(value > 0.86, names["white"], names["grey"]), word)
    return torch.where(value < 0.22, names["black"], word)


class Writer:
    """Writes captions for scenes of an atlas.

    Args:
        atlas: the drawings of the scenes.
        coded_share: share of scenes in which one thing is told by its code.
        nameless_share: share of the other things that are called a thing or an object.
    """

    def __init__(self, atlas: things.Atlas, coded_share: float = 0.5, nameless_share: float = 0.0) -> None:
        self.sources = atlas.sources
        self.coded_share, self.nameless_share = coded_share, nameless_share
        self.areas = torch.from_numpy(np.stack([part.sum((1, 2), dtype=np.float32) for part in atlas.coverages]))

    def main_colours(self, people: individuals.Individuals) -> tuple[np.ndarray, np.ndarray]:
        """Colour words of the largest and second largest area of each individual: int [count]; -1 for no second."""
        words = colour_words(people.colours)
        shares = torch.zeros(len(people), len(COLOURS)).scatter_add_(1, words, self.areas[people.drawing])
        shares = shares / shares.sum(1, keepdim=True)
        top = shares.topk(2, 1)
        second = torch.where(top.values[:, 1] > 0.18, top.indices[:, 1], -1)
        return top.indices[:, 0].numpy(), second.numpy()

    @staticmethod
    def codable(plan: scenes.Plan, random: np.random.Generator) -> np.ndarray:
        """One thing of each scene, at random, that a caption may tell by its code: int [batch]; -1 for none."""
        chosen = np.full(len(plan.styles), -1)
        shown = np.flatnonzero(~plan.worn.numpy())
        order = random.permutation(shown)
        chosen[plan.scene.numpy()[order]] = order  # the last one of each scene stays
        return chosen

    def write(self, plan: scenes.Plan, codable: np.ndarray, random: np.random.Generator) -> list[Caption]:
        """A caption for each scene, in one of many wordings.

        Args:
            plan: what the scenes show.
            codable: the thing of each scene that may be told by its code, of `codable`.
            random: chooses the wording.
        """
        first, second = self.main_colours(plan.things)
        of_scene: list[list[int]] = [[] for _ in range(len(plan.styles))]
        for number, scene in enumerate(plan.scene.tolist()):
            of_scene[scene].append(number)
        worn, backgrounds, styles = plan.worn.tolist(), plan.backgrounds.name.tolist(), plan.styles.tolist()
        facts = _Facts(plan, first, second)
        return [
            self._caption(members, worn, int(codable[scene]), facts, backgrounds[scene], styles[scene], random)
            for scene, members in enumerate(of_scene)
        ]

    def _caption(
        self,
        members: list[int],
        worn: list[bool],
        codable: int,
        facts: "_Facts",
        background: int,
        style: int,
        random: np.random.Generator,
    ) -> Caption:
        words: list[Word] = []
        shown = [number for number in members if not worn[number]]
        coded = codable if random.random() < self.coded_share else -1
        added = bool(random.random() < 0.5)
        if not shown:
            return Caption(_plain(_bare_place(background, random)))
        if style:
            words += _plain(f"a {scenes.STYLES[style]} of" if style == 2 else f"a {scenes.STYLES[style]} photo of")
        elif random.random() < 0.75:
            words += _plain(str(random.choice(OPENINGS)))
        for phrase, number in enumerate(shown):
            if phrase:
                words += _plain(str(random.choice(JOINTS)))
            words += self._phrase(number, phrase, facts, number == coded and not added, number == coded, random)
            if number + 1 in members and worn[number + 1]:
                what = self.sources[facts.drawing[number + 1]].entry.kind
                words += _plain(f"wearing {'' if what == 'glasses' else article(what) + ' '}{what}")
        if background >= 0 and random.random() < (0.92 if background < len(places.PLACES) else 0.7):
            words += _plain(place_phrase(background))
        return Caption(tuple(words), coded, added, shown.index(coded) if coded >= 0 else -1)

    def _phrase(
        self, number: int, phrase: int, facts: "_Facts", code: bool, coded: bool, random: np.random.Generator
    ) -> list[Word]:
        source = self.sources[facts.drawing[number]]
        noun = source.entry.kind
        if source.entry.phrases and random.random() < 0.5:
            noun = str(random.choice(source.entry.phrases))
        if random.random() < (CODED_NAMELESS_SHARE if coded else self.nameless_share):
            noun = str(random.choice(ANYTHING))
        *before, last = noun.split()
        telling: list[str] = []
        # What the code says need not be said in words; sometimes it is.
        if random.random() < (0.12 if coded else 0.75):
            for text, share in self._telling_words(number, source.vendor, facts):
                if random.random() < share:
                    telling.append(text)
            random.shuffle(telling)
        if random.random() < 0.06:
            telling.insert(0, str(random.choice(EMPTY_ADJECTIVES)))
        pieces = [piece for text in telling for piece in text.split()]
        if code:
            pieces.insert(int(random.integers(len(pieces) + 1)), CODE)
        # "bowl of soup": what follows the noun belongs to it, and the last word is where the thing is read.
        words = [*pieces, *before]
        determiner = str(random.choice(("a", "the", "my", "one"), p=(0.7, 0.18, 0.06, 0.06)))
        spoken = next((word for word in [*words, last] if word != CODE), last)
        determiner = article(spoken) if determiner == "a" else determiner
        return [
            Word(determiner),
            *(Word(word, phrase, tells=True) for word in words),
            Word(last, phrase, noun=True),
        ]

    def _telling_words(self, number: int, vendor: str, facts: "_Facts") -> list[tuple[str, float]]:
        """Words that tell this individual, each with the share of captions that use it."""
        names = tuple(COLOURS)
        first, second = names[facts.first[number]], facts.second[number]
        both = f"{first} and {names[second]}" if second >= 0 else first
        words = [(first if facts.said_once[number] else both, 0.6), (HANDS[vendor], 0.25)]
        if facts.outlined[number]:
            words.append(("outlined", 0.6))
        if facts.shaded[number]:
            words.append(("glossy" if facts.glossy[number] else "shaded", 0.6))
        if abs(facts.tall[number]) > 0.12:
            words.append(("tall" if facts.tall[number] > 0 else "wide", 0.4))
        if abs(facts.turn[number]) > 0.2:
            words.append(("tilted", 0.4))
        if facts.size[number] < 27:
            words.append(("small", 0.3))
        if facts.size[number] > 52:
            words.append(("big", 0.3))
        return words


class _Facts:
    """Columns of a plan as plain lists, for loops over words."""

    def __init__(self, plan: scenes.Plan, first: np.ndarray, second: np.ndarray) -> None:
        self.drawing = plan.things.drawing.tolist()
        self.first, self.second = first.tolist(), second.tolist()
        # Half of the things with two main colours are told by the larger one alone.
        self.said_once = [number % 2 == 0 for number in range(len(self.drawing))]
        self.outlined = (plan.things.outline[:, 0] > 0).tolist()
        self.shaded = (plan.things.shade[:, 0] > 0).tolist()
        self.glossy = (plan.things.shade[:, 3] > 0.4).tolist()
        self.tall = (plan.things.stretch[:, 1] / plan.things.stretch[:, 0]).log().tolist()
        self.turn = plan.views.turn.tolist()
        self.size = plan.views.size.tolist()


def place_phrase(background: int) -> str:
    """Where a scene is: "on the beach", "on a red background". Takes an index in `places.NAMED`."""
    if background < len(places.PLACES):
        return places.PHRASES[places.PLACES[background]]
    name = places.NAMED[background]
    return f"on {article(name)} {name}"


def _bare_place(background: int, random: np.random.Generator) -> str:
    """A scene without things: "a photo of the beach"."""
    if background < 0:
        return "a background"
    name = places.NAMED[background]
    bare = {"water": "the water", "space": "space", "rain": "the rain", "room": "a room", "table": "a table"}
    said = f"{article(name)} {name}" if background >= len(places.PLACES) else bare.get(name, f"the {name}")
    return f"a photo of {said}" if random.random() < 0.5 else place_phrase(background)


def _plain(text: str) -> tuple[Word, ...]:
    return tuple(Word(word) for word in text.split())


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases: list[str] = [
        *OPENINGS,
        *EMPTY_ADJECTIVES,
        *HANDS.values(),
        *ANYTHING,
        *JOINTS,
        *scenes.STYLES,
        *things.kinds(),
        *(phrase for entry in things.table() for phrase in entry.phrases),
        *COLOURS,
        *(place_phrase(number) for number in range(len(places.NAMED))),
        *places.NAMED,
        "a an the my one and wearing with of outlined glossy shaded tall wide tilted small big light dark",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})


@dataclasses.dataclass(frozen=True)
class Texts:
    """Captions as arrays.

    Attributes:
        tokens: int [batch, length], start and end tokens and padding included.
        phrase: int [batch, length], number of the noun phrase of each token; -1 for none.
        tells: bool [batch, length], tokens that tell an individual from others of its kind.
        code: int [batch], position at which a code goes in; -1 for none.
        code_added: bool [batch], the code is added to what stands there instead of standing there itself.
    """

    tokens: torch.Tensor
    phrase: torch.Tensor
    tells: torch.Tensor
    code: torch.Tensor
    code_added: torch.Tensor


def to_texts(captions: Sequence[Caption], ids: dict[str, list[int]], start: int, end: int, length: int) -> Texts:
    """Tokenise captions by a table of words; what is too long is cut, and loses its code if that is cut off.

    Args:
        ids: the tokens of every word of the vocabulary, and of CODE (any one id).
        start, end: ids of the start and end tokens; the end token is also the padding.
        length: positions of the text encoder.
    """
    count = len(captions)
    tokens = np.full((count, length), end)
    phrase = np.full((count, length), -1)
    tells = np.zeros((count, length), bool)
    code = np.full(count, -1)
    added = np.zeros(count, bool)
    for row, caption in enumerate(captions):
        tokens[row, 0] = start
        position = 1
        for word in caption.words:
            pieces = ids[word.text]
            if position + len(pieces) >= length:
                break
            here = word.text == CODE or (caption.code_added and word.noun and word.phrase == caption.coded_phrase)
            if caption.coded >= 0 and here:
                code[row], added[row] = position + len(pieces) - 1, caption.code_added
            for piece in pieces:
                tokens[row, position] = piece
                phrase[row, position] = word.phrase
                tells[row, position] = word.tells
                position += 1
    return Texts(*(torch.from_numpy(array) for array in (tokens, phrase, tells, code, added)))
