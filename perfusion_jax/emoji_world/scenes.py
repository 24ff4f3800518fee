"""Invent and draw scenes: a pure function of (seed, index) gives a picture, its caption and its object masks."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from PIL import Image

from perfusion_jax.emoji_world import captions, catalogue, places
from perfusion_jax.emoji_world.descriptions import CELL, PAIR_SIZE, SINGLE_SIZE, Description, Thing

PIXELS = places.PIXELS
HEADWEAR_SHARE = 0.5
"""A hat's width as a share of its wearer's."""

Sprites = Mapping[str, np.ndarray]
"""Drawings of each category and headwear: uint8 [drawings, side, side, 4], not premultiplied."""

GROUND = PIXELS - CELL
"""Row on which objects stand, give or take the shift."""

OTHERS_SHARE = 0.25
"""Share of one-object scenes that show a thing of `catalogue.OTHERS`."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """image: uint8 [64, 64, 3]; masks: uint8 [things, 64, 64], 255 where a thing covers the pixel; caption: text."""

    image: np.ndarray
    masks: np.ndarray
    caption: str
    description: Description


def render_scene(seed: int, index: int, sprites: Sprites) -> Scene:
    """Scene number `index` of the endless sequence `seed`.

    Args:
        seed, index: non-negative integers. The same pair always gives the same scene.
        sprites: the result of `drawings.world_sprites`.
    """
    random = np.random.default_rng([seed, index])
    description = invent(random, {name: len(stack) for name, stack in sprites.items()})
    caption = captions.write_caption(description, random)
    image, masks = draw(description, sprites)
    return Scene(image, masks, caption, description)


def invent(random: np.random.Generator, drawings: Mapping[str, int]) -> Description:
    """Draw a scene's description at random.

    Args:
        random: NumPy generator.
        drawings: {category: number of its drawings}.
    """
    count = random.choice((0, 1, 2), p=(0.03, 0.75, 0.22))
    other = count == 1 and random.random() < OTHERS_SHARE
    categories = random.choice(catalogue.OTHERS if other else catalogue.CATEGORIES, size=count, replace=False)
    things = tuple(_invent_thing(str(category), count, random, drawings) for category in categories)
    backgrounds = catalogue.PLACES if random.random() < 0.82 else tuple(catalogue.BACKGROUND_COLOURS)
    place = str(random.choice(backgrounds))
    style = str(random.choice(catalogue.STYLES)) if count == 1 and random.random() < 0.05 else None
    return Description(things, place, int(random.integers(places.VARIANTS)), style)


def _invent_thing(category: str, count: int, random: np.random.Generator, drawings: Mapping[str, int]) -> Thing:
    alone = count == 1
    tinted = random.random() < (0.15 if alone else 0.08)
    dressed = alone and category in catalogue.WEARERS and random.random() < 0.12
    columns, rows = (random.integers(-1, 2), 0) if alone else (0, random.integers(-1, 1))
    return Thing(
        category=category,
        drawing=int(random.integers(drawings[category])),
        colour=str(random.choice(tuple(catalogue.COLOURS))) if tinted else None,
        headwear=str(random.choice(catalogue.HEADWEAR)) if dressed else None,
        flipped=bool(random.random() < 0.5),
        size=SINGLE_SIZE if alone else PAIR_SIZE,
        shift=(CELL * int(columns), CELL * int(rows)),
    )


def draw(description: Description, sprites: Sprites) -> tuple[np.ndarray, np.ndarray]:
    """Draw a description.

    Returns:
        (uint8 image [64, 64, 3], uint8 masks [things, 64, 64]). A mask includes what its thing wears.
    """
    if description.place in catalogue.PLACES:
        background = places.draw_place(description.place, description.variant)
    else:
        background = places.draw_plain(description.place)
    image = background.astype(np.float32)
    masks = np.zeros((len(description.things), PIXELS, PIXELS), np.float32)
    for number, thing in enumerate(description.things):
        centre = PIXELS * (2 * number + 1) / (2 * len(description.things))
        left = round(centre - thing.size / 2) + thing.shift[0]
        top = GROUND - thing.size + thing.shift[1]
        sprite = sprites[thing.category][thing.drawing]
        sprite = tint(sprite, catalogue.COLOURS[thing.colour]) if thing.colour else sprite
        if thing.headwear:
            top += CELL
        _paste(image, masks[number], sprite, thing.size, left, top, thing.flipped)
        if thing.headwear:
            size = round(HEADWEAR_SHARE * thing.size)
            middle = left + (thing.size - size) // 2
            _paste(image, masks[number], sprites[thing.headwear][0], size, middle, top - size + 8, thing.flipped)
    return apply_style(image, description.style), np.round(masks * 255).astype(np.uint8)


def tint(sprite: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Repaint a sprite in shades of one colour, dark and light parts staying dark and light.

    Args:
        sprite: uint8 [height, width, 4].
        colour: sRGB triple, 0 to 255.
    """
    luminance = sprite[..., :3] @ np.array((0.299, 0.587, 0.114)) / 255
    middle = 0.62
    towards_black = np.minimum(luminance / middle, 1)[..., None]
    towards_white = np.maximum((luminance - middle) / (1 - middle), 0)[..., None]
    shades = np.array(colour) * towards_black
    shades += (255 - shades) * 0.85 * towards_white
    return np.concatenate([shades.astype(np.uint8), sprite[..., 3:]], axis=-1)


def apply_style(image: np.ndarray, style: str | None) -> np.ndarray:
    """Turn a float image [height, width, 3] (0 to 255) into uint8, through a style filter if one is named."""
    if style is not None:
        grey = image @ np.array((0.299, 0.587, 0.114), np.float32)
        if style == "sketch":
            rows, columns = np.gradient(grey)
            grey = 250 - np.clip(2.4 * np.hypot(rows, columns), 0, 220)
        image = np.repeat(grey[..., None], 3, axis=-1)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _paste(
    image: np.ndarray, mask: np.ndarray, sprite: np.ndarray, size: int, left: int, top: int, flipped: bool
) -> None:
    """Scale a sprite to `size` and lay it over `image` and `mask` in place; what sticks out is cut off."""
    scaled = _scale(sprite.tobytes(), sprite.shape[0], size)
    scaled = scaled[:, ::-1] if flipped else scaled
    first_row, first_column = max(-top, 0), max(-left, 0)
    rows = slice(max(top, 0), min(top + size, PIXELS))
    columns = slice(max(left, 0), min(left + size, PIXELS))
    scaled = scaled[first_row:, first_column:][: rows.stop - rows.start, : columns.stop - columns.start]
    alpha = scaled[..., 3:] / np.float32(255)
    image[rows, columns] += alpha * (scaled[..., :3] - image[rows, columns])
    mask[rows, columns] = np.maximum(mask[rows, columns], alpha[..., 0])


@functools.lru_cache(maxsize=4096)
def _scale(sprite_bytes: bytes, side: int, size: int) -> np.ndarray:
    picture = Image.frombuffer("RGBA", (side, side), sprite_bytes)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX), np.float32)
