"""Captions that nobody has to collect, to measure C on: sentences of captions' forms, filled with words.

The forms and half of the words are written here. The other words are the tokeniser's own, the common ones more often:
a byte-pair vocabulary lists its words about in the order of how common they were in the captions that it was made from,
and the n-th most common word of a language is about n times rarer than the most common one (Zipf's law, here with
Mandelbrot's shift). So every direction that words can span is in C, whatever the language of the model.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

# Of Zipf's law, by which the most common words are not quite as common as it says (Mandelbrot, 1953).
_SHIFT = 2.7
# How often a word is one of the tokeniser's own.
_OWN_SHARE = 0.5

_FORMS = (
    "a {noun}",
    "a {adjective} {noun}",
    "the {noun} {place}",
    "a photo of a {noun}",
    "a photo of a {adjective} {noun} {place}",
    "a {adjective} {noun} {doing} {place}",
    "a {noun} and a {noun} {place}",
    "{number} {adjective} {noun}s {doing}",
    "close up of a {adjective} {noun}, {style}",
    "a {noun} {doing} next to a {adjective} {noun}",
    "{style} of a {adjective}, {adjective} {noun} {place}",
    "an illustration of the {noun} with a {noun}, {style}, {style}",
    "{adjective} {noun} {noun} for {noun} - {noun} {number}",
    "{noun}, {noun}, {noun} and {noun}",
    "the {adjective} {noun} of the {noun} | {noun} {noun}",
    "{noun} in {noun}, {noun}: {adjective} {noun} {place}",
    "how to {noun} a {noun} with {adjective} {noun}",
    "{noun}'s {adjective} {noun} {number}x{number} by {noun} {noun}",
    "two {noun}s {doing} {place} while a {adjective} {noun} looks at the {noun}",
    "there is a {adjective} {noun} {place}, and the {noun} behind it is {adjective}",
)

_NOUNS = """
dog cat horse bird bear lion tiger elephant rabbit fox wolf cow sheep pig chicken duck goose owl eagle fish shark whale
turtle frog snake lizard bee butterfly spider monkey mouse deer giraffe zebra penguin dragon robot toy doll teddy puppet
man woman boy girl child baby person people family couple crowd king queen soldier doctor teacher chef artist dancer
singer player rider driver worker farmer bride team band face hand eye hair head foot smile
car truck bus train plane boat ship bicycle motorcycle tractor rocket helicopter wheel engine road street bridge tower
house building castle church temple barn cabin tent door window roof wall fence stairs garden park farm room kitchen
bathroom bedroom office shop market restaurant school hospital museum station airport city town village
table chair sofa bed desk lamp clock mirror shelf box bag backpack bottle cup bowl plate vase candle basket book
newspaper pen pencil brush camera phone computer laptop keyboard screen television radio guitar piano drum violin
shirt dress jacket coat hat shoe boot glove scarf ring necklace watch glasses crown mask umbrella flag sword
apple banana orange lemon strawberry cherry grape tomato potato carrot onion bread cake cookie pizza burger sandwich
salad soup pasta rice egg cheese meat coffee tea wine beer milk juice chocolate ice cream
tree flower rose leaf grass plant forest mountain hill valley river lake sea ocean beach island desert field sky cloud
sun moon star rain snow ice fire smoke rock stone sand water wave waterfall sunset sunrise storm night winter summer
ball bat racket ski skateboard surfboard kite balloon game puzzle party wedding birthday christmas music art painting
drawing sketch sculpture statue poster logo icon pattern texture background design map sign letter number word
"""

_ADJECTIVES = """
red blue green yellow orange purple pink brown black white grey gold silver colorful dark bright pale
small big large tiny huge tall short long wide thin thick round square flat
old new young ancient modern vintage antique rustic rusty broken clean dirty wet dry empty full open closed
wooden metal plastic glass stone leather paper cotton fluffy furry soft hard smooth shiny striped spotted
happy sad angry sleepy funny cute beautiful pretty ugly scary strange lonely busy quiet
wild domestic fresh hot cold frozen sweet spicy delicious healthy
sunny cloudy foggy snowy rainy abstract simple detailed realistic minimal elegant luxury cheap traditional
american french italian japanese chinese indian african
"""

_PLACES = (
    *("on the beach", "in the snow", "under water", "in the city", "in a forest", "on a table", "in the garden"),
    *("at night", "in front of a house", "on the street", "in the mountains", "by the river", "on a white background"),
    *("in the kitchen", "on a wooden floor", "in the grass", "in space", "at the market", "on the roof", "in a box"),
    *("under a tree", "near the window", "at sunset", "in the rain", "on a boat", "in the desert", "over the sea"),
    *("between two buildings", "behind a fence", "inside a museum", "against a blue sky", "with friends", "for sale"),
)

_DOINGS = """
sitting standing lying sleeping running walking jumping flying swimming eating drinking playing working reading writing
looking smiling laughing dancing singing riding driving holding wearing carrying waiting fighting falling growing
burning
"""

_STYLES = (
    *("oil painting", "watercolor", "pencil drawing", "digital art", "3d render", "black and white photo", "cartoon"),
    *("vector illustration", "stock photo", "studio lighting", "high quality", "highly detailed", "4k", "macro photo"),
    *("portrait", "concept art", "pixel art", "line art", "film still", "aerial view", "soft light", "depth of field"),
)

_SLOT = re.compile(r"\{(\w+)\}")


def make_captions(vocabulary: Sequence[str], count: int, seed: int = 0) -> Iterator[str]:
    """Makes captions; the same ones for the same arguments.

    Args:
        vocabulary: whole words that a tokeniser has, the common ones first; may be empty.
        count: how many.
        seed: of their randomness.
    """
    random = np.random.default_rng(seed)
    known = set(vocabulary)
    lists = {
        "noun": _known(_NOUNS.split(), known),
        "adjective": _known(_ADJECTIVES.split(), known),
        "doing": _known(_DOINGS.split(), known),
        "place": _known(_PLACES, known),
        "style": _known(_STYLES, known),
    }
    cumulative = np.cumsum(1 / (np.arange(len(vocabulary)) + _SHIFT))

    def fill(match: re.Match[str]) -> str:
        if match[1] == "number":
            return str(random.integers(2, random.choice([12, 2030])))
        if vocabulary and match[1] in ("noun", "adjective") and random.random() < _OWN_SHARE:
            return vocabulary[int(np.searchsorted(cumulative, random.random() * cumulative[-1]))]
        words = lists[match[1]]
        return words[int(random.integers(len(words)))]

    for _ in range(count):
        yield _SLOT.sub(fill, _FORMS[int(random.integers(len(_FORMS)))])


def _known(phrases: Sequence[str], vocabulary: set[str]) -> Sequence[str]:
    """Those phrases of which the vocabulary has all words; all of them, if it has none."""
    return [phrase for phrase in phrases if vocabulary.issuperset(phrase.split())] or phrases
