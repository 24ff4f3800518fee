"""What a scene shows, before it is worded or drawn."""

import dataclasses

CELL = 8
"""Side in pixels of one latent. Objects are whole cells wide and move by whole cells, so that a drawing has one pattern
of latents in each size, not one for every offset from the grid."""

SINGLE_SIZE, PAIR_SIZE = 6 * CELL, 4 * CELL
"""Side in pixels of a lone object, and of each of two."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        category: a word of `catalogue.CATEGORIES` or `catalogue.OTHERS`.
        drawing: which of the category's drawings.
        colour: a word of `catalogue.COLOURS` if the drawing is tinted.
        headwear: a word of `catalogue.HEADWEAR` if it wears one.
        flipped: mirrored left to right.
        size: side of the square that it fits, in pixels.
        shift: columns and rows away from its standard position.
    """

    category: str
    drawing: int = 0
    colour: str | None = None
    headwear: str | None = None
    flipped: bool = False
    size: int = SINGLE_SIZE
    shift: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a scene shows.

    Attributes:
        things: objects from left to right.
        place: a word of `catalogue.PLACES` or `catalogue.BACKGROUND_COLOURS`.
        variant: which version of the place.
        style: a word of `catalogue.STYLES`, or None for an ordinary picture.
    """

    things: tuple[Thing, ...]
    place: str
    variant: int = 0
    style: str | None = None
