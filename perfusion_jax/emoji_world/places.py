"""Draw the backgrounds: ten simple places and plain colours, as pure functions of a name and a variant number."""

import functools
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from perfusion_jax.emoji_world import catalogue

PIXELS = 64
Colour = tuple[int, int, int]
Shift = Callable[[int], int]
"""Draws a whole number between -most and most: how far a detail is moved, in canvas pixels."""

CANVAS = 2 * PIXELS
"""Side of the canvas that is drawn on, halved afterwards for soft edges. Coordinates below are canvas pixels."""

VARIANTS = 16
"""How many versions of each place there are: details move by a few pixels from one to the next."""


def _vertical_gradient(canvas: Image.Image, top: Colour, bottom: Colour, first_row: int, last_row: int) -> None:
    """Fill rows first_row..last_row-1 from colour `top` to colour `bottom`."""
    weight = np.linspace(0, 1, last_row - first_row)[:, None, None]
    rows = (1 - weight) * np.array(top) + weight * np.array(bottom)
    band = np.broadcast_to(rows, (last_row - first_row, CANVAS, 3)).astype(np.uint8)
    canvas.paste(Image.fromarray(band), (0, first_row))


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour | str) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _hill(draw: ImageDraw.ImageDraw, centre: float, top: float, width: float, colour: Colour) -> None:
    """A flat ellipse whose upper part rises to row `top`; it covers everything below."""
    draw.ellipse((centre - width, top, centre + width, top + 2 * CANVAS), fill=colour)


def _beach(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (96, 190, 246), (186, 230, 250), 0, 52)
    _circle(draw, 106 + shift(6), 20 + shift(3), 11, (255, 236, 120))
    _vertical_gradient(canvas, (20, 120, 200), (50, 180, 214), 52, 82)
    draw.rectangle((0, 80, CANVAS, 84), fill=(240, 250, 250))
    draw.rectangle((0, 84, CANVAS, CANVAS), fill=(242, 214, 150))
    trunk = 14 + shift(5)
    draw.polygon([(trunk - 3, 92), (trunk + 3, 92), (trunk + 6, 36), (trunk + 2, 36)], fill=(146, 98, 56))
    for tip_x, tip_y in ((-20, 44), (-14, 24), (4, 16), (24, 26), (28, 46)):
        leaf = [(trunk + 4, 32), (trunk + tip_x / 2, tip_y - 2), (trunk + tip_x, tip_y), (trunk + 4, 40)]
        draw.polygon(leaf, fill=(40, 150, 72))


def _snow(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (150, 178, 208), (206, 220, 234), 0, CANVAS)
    for x in (8, 30, 98, 120):
        x, top = x + shift(5), 40 + shift(5)
        for layer in range(3):
            low = top + 18 + 14 * layer
            draw.polygon(
                [(x, top + 10 * layer), (x - 8 - 4 * layer, low), (x + 8 + 4 * layer, low)], fill=(72, 116, 112)
            )
            draw.polygon(
                [(x, top + 10 * layer), (x - 4, top + 8 + 10 * layer), (x + 4, top + 8 + 10 * layer)], fill="white"
            )
    _hill(draw, 40 + shift(10), 78, 130, (244, 248, 252))
    for _ in range(26):
        _circle(draw, 64 + shift(64), 60 + shift(60), 2, (255, 255, 255))


def _grass(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (110, 196, 250), (200, 234, 252), 0, CANVAS)
    cloud = 28 + shift(14)
    for offset, radius in ((-12, 8), (0, 12), (13, 9)):
        _circle(draw, cloud + offset, 24, radius, "white")
    _hill(draw, 64 + shift(24), 70, 150, (108, 196, 76))
    for column in range(8):
        x, y = 8 + 16 * column + shift(5), 104 + shift(16)
        _circle(draw, x, y, 3, (255, 255, 255))
        _circle(draw, x, y, 1, (250, 200, 40))


def _night(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (10, 14, 46), (42, 50, 104), 0, CANVAS)
    for _ in range(18):
        _circle(draw, 64 + shift(62), 40 + shift(40), 1.5, (250, 246, 210))
    moon = 26 + shift(6)
    _circle(draw, moon, 24, 13, (250, 240, 180))
    _circle(draw, moon + 7, 20, 11, (14, 19, 54))
    _hill(draw, 64 + shift(20), 88, 150, (20, 34, 50))


def _desert(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (250, 150, 70), (255, 222, 140), 0, CANVAS)
    _circle(draw, 100 + shift(8), 32 + shift(4), 15, (255, 246, 200))
    _hill(draw, 20 + shift(10), 66, 74, (222, 160, 84))
    _hill(draw, 112 + shift(10), 76, 96, (234, 178, 100))
    _hill(draw, 56 + shift(10), 94, 150, (200, 136, 66))


def _forest(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (60, 110, 74), (100, 150, 92), 0, 90)
    for x in (4, 28, 52, 76, 100, 124):
        x = x + shift(5)
        draw.rectangle((x - 5, 0, x + 5, 96), fill=(84, 58, 40))
    for column in range(9):
        _circle(draw, 16 * column + shift(4), 2 + shift(4), 18, (24, 74, 44))
    draw.rectangle((0, 94, CANVAS, CANVAS), fill=(54, 84, 40))
    for column in range(12):
        x = 11 * column + shift(4)
        draw.polygon([(x - 4, 98), (x, 86), (x + 4, 98)], fill=(40, 120, 50))


def _city(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (176, 206, 230), (232, 236, 236), 0, 100)
    greys = ((122, 130, 150), (150, 140, 140), (104, 116, 140), (140, 150, 164), (116, 108, 124))
    for column in range(5):
        left, top = 26 * column + shift(2), 30 + shift(18)
        draw.rectangle((left, top, left + 23, 102), fill=greys[column])
        for row in range(top + 6, 94, 12):
            for window in (5, 14):
                draw.rectangle((left + window, row, left + window + 4, row + 5), fill=(252, 232, 150))
    draw.rectangle((0, 98, CANVAS, 104), fill=(196, 196, 196))
    draw.rectangle((0, 104, CANVAS, CANVAS), fill=(78, 80, 86))
    start = shift(12)
    for x in range(-12, CANVAS + 12, 28):
        draw.rectangle((x + start, 114, x + start + 14, 117), fill=(240, 240, 240))


def _water(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (60, 190, 226), (8, 66, 140), 0, CANVAS)
    _hill(draw, 64 + shift(24), 108, 150, (206, 190, 130))
    for x in (8, 24, 104, 120):
        x, height = x + shift(4), 46 + shift(10)
        points = [(x + (5 if step % 2 else -5), 118 - height * step / 5) for step in range(6)]
        draw.line(points, fill=(30, 150, 90), width=6, joint="curve")
    for _ in range(9):
        x, y, radius = 64 + shift(60), 50 + shift(46), 4 + shift(1)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(210, 244, 255), width=2)


def _table(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (250, 236, 206), (240, 220, 184), 0, 84)
    left = 80 + shift(8)
    draw.rectangle((left, 10, left + 36, 50), fill=(160, 110, 70))
    draw.rectangle((left + 4, 14, left + 32, 46), fill=(150, 206, 240))
    draw.line((left + 18, 14, left + 18, 46), fill=(160, 110, 70), width=3)
    draw.rectangle((0, 82, CANVAS, CANVAS), fill=(176, 112, 60))
    draw.rectangle((0, 82, CANVAS, 86), fill=(206, 144, 88))
    for row in (98, 112):
        draw.line((0, row + shift(2), CANVAS, row + shift(2)), fill=(146, 88, 44), width=2)


def _mountains(canvas: Image.Image, draw: ImageDraw.ImageDraw, shift: Shift) -> None:
    _vertical_gradient(canvas, (130, 180, 236), (224, 232, 246), 0, CANVAS)
    for centre, top, half in ((24, 26, 50), (104, 20, 54), (64, 46, 46)):
        x, y = centre + shift(6), top + shift(4)
        draw.polygon([(x, y), (x - half, 100), (x + half, 100)], fill=(112, 116, 140))
        slope = half / (100 - y)
        cap = [(x, y), (x - 18 * slope, y + 18), (x - 5, y + 13), (x + 3, y + 19), (x + 18 * slope, y + 18)]
        draw.polygon(cap, fill=(250, 252, 255))
    _hill(draw, 64 + shift(24), 96, 150, (116, 150, 96))


_DRAWERS = {
    "beach": _beach,
    "snow": _snow,
    "grass": _grass,
    "night": _night,
    "desert": _desert,
    "forest": _forest,
    "city": _city,
    "water": _water,
    "table": _table,
    "mountains": _mountains,
}


@functools.cache
def draw_place(place: str, variant: int) -> np.ndarray:
    """One version of a place.

    Args:
        place: a word of `catalogue.PLACES`.
        variant: 0 <= variant < VARIANTS.

    Returns:
        uint8 array [PIXELS, PIXELS, 3], sRGB, read-only.
    """
    random = np.random.default_rng([zlib.crc32(place.encode()), variant])
    canvas = Image.new("RGB", (CANVAS, CANVAS))

    def shift(most: int) -> int:
        return int(random.integers(-most, most + 1))

    _DRAWERS[place](canvas, ImageDraw.Draw(canvas), shift)
    if variant % 2:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _frozen(canvas.reduce(CANVAS // PIXELS))


@functools.cache
def draw_plain(colour: str) -> np.ndarray:
    """A background of one colour, a little darker towards the ground: uint8 array [PIXELS, PIXELS, 3], read-only."""
    base = np.array(catalogue.BACKGROUND_COLOURS[colour], np.float64)
    pale = base if colour in ("white", "grey") else 0.55 * base + 0.45 * 255
    shade = np.ones((PIXELS, PIXELS, 1))
    shade[int(0.8 * PIXELS) :] = 0.93
    return _frozen(Image.fromarray((pale * shade).astype(np.uint8)))


def _frozen(picture: Image.Image) -> np.ndarray:
    pixels = np.array(picture)
    pixels.setflags(write=False)
    return pixels
