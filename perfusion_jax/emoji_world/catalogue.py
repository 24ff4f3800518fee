"""What exists in the emoji world: its categories, places, colours, styles, and the drawings they come from.

Every category is one English word and one kind of view (a face, or the whole thing), drawn by three vendors.
"""

DRAWING_PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-emoji-3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
"""npm package and version of each vendor's drawings."""

WORLD_VENDORS = ("noto", "noto-v1", "twemoji", "emojione")
"""Vendors whose drawings the base model may see."""

HELD_OUT_VENDORS = ("fluent-emoji-flat", "fluent-emoji-3d")
"""Vendors kept for personal concepts: never part of any pretraining."""

DEFAULT_VENDORS = ("noto", "noto-v1", "twemoji")

ICON_NAMES = {
    "dog": "dog-face",
    "cat": "cat-face",
    "bear": "bear",
    "fox": "fox",
    "lion": "lion",
    "pig": "pig-face",
    "frog": "frog",
    "rabbit": "rabbit-face",
    "panda": "panda",
    "penguin": "penguin",
    "owl": "owl",
    "octopus": "octopus",
    "whale": "spouting-whale",
    "car": "automobile",
    "bus": "bus",
    "boat": "sailboat",
    "rocket": "rocket",
    "clock": "alarm-clock",
    "camera": "camera",
    "house": "house",
    "apple": "red-apple",
    "strawberry": "strawberry",
    "burger": "hamburger",
    "cactus": "cactus",
}
"""Iconify's name of each category's drawing."""

CATEGORIES = tuple(ICON_NAMES)
"""What the model is made to draw well, and is measured on."""

_PLAIN_NAMES = """
airplane avocado backpack balloon banana bell bicycle bread butterfly candle carrot chair cherries chicken
cookie crab cupcake dolphin doughnut drum duck elephant envelope fish grapes guitar hammer hedgehog helicopter
key koala lemon magnet mushroom parrot peach pear pencil pineapple pizza pretzel radio rose scissors snail
snake snowman spider squid star sun sunflower taxi teapot telephone television tomato toolbox tractor train
trophy trumpet tulip turtle umbrella violin watermelon
"""

OTHER_ICON_NAMES = {
    **{
        animal: f"{animal}-face"
        for animal in ("cow", "hamster", "horse", "monkey", "mouse", "robot", "tiger", "unicorn", "wolf")
    },
    **{word: word for word in _PLAIN_NAMES.split()},
    "bee": "honeybee",
    "shoe": "running-shoe",
}
OTHER_ICON_NAMES = {word: OTHER_ICON_NAMES[word] for word in sorted(OTHER_ICON_NAMES)}
"""Things shown now and then, so that the model's text attention learns to draw more than a handful of pictures: a
personal thing is none of them, and has to lie between them."""

OTHERS = tuple(OTHER_ICON_NAMES)
OTHER_VENDORS = ("noto", "twemoji")

VENDORS_OF_CATEGORY = {
    "lion": ("noto", "noto-v1", "emojione"),
    "octopus": ("noto-v1", "twemoji", "emojione"),
    "bus": ("noto", "noto-v1", "emojione"),
    "whale": ("noto", "twemoji", "emojione"),
}
"""Where another vendor than the default ones is clearer at 64 pixels (chosen by eye)."""

WEARERS = ("dog", "cat", "bear", "fox", "lion", "pig", "frog", "rabbit", "panda", "penguin", "owl")
"""Categories that can wear something on their head."""

HEADWEAR_ICON_NAMES = {"hat": "top-hat", "crown": "crown"}
HEADWEAR = tuple(HEADWEAR_ICON_NAMES)
HEADWEAR_VENDOR = "noto"

PLACE_PHRASES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "night": "at night",
    "desert": "in the desert",
    "forest": "in the forest",
    "city": "in the city",
    "water": "under water",
    "table": "on a table",
    "mountains": "in the mountains",
}
PLACES = tuple(PLACE_PHRASES)

COLOURS = {
    "red": (222, 44, 44),
    "orange": (246, 140, 30),
    "yellow": (250, 212, 40),
    "green": (56, 168, 68),
    "blue": (44, 104, 226),
    "purple": (142, 60, 200),
    "pink": (250, 120, 190),
}
"""Colour words with their sRGB values: of tinted drawings and of plain backgrounds."""

BACKGROUND_COLOURS = {"white": (255, 255, 255), "grey": (150, 150, 150), **COLOURS}

STYLES = ("sketch", "monochrome")


def vendors_of(category: str) -> tuple[str, ...]:
    """World vendors whose drawing of `category`, a word of CATEGORIES or OTHERS, is part of the world."""
    if category in OTHER_ICON_NAMES:
        return OTHER_VENDORS
    return VENDORS_OF_CATEGORY.get(category, DEFAULT_VENDORS)
