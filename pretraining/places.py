"""Where things stand: eighteen drawn places that vary, plain colours, and backgrounds without a name."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional

PHRASES = {
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
    "space": "in space",
    "sunset": "at sunset",
    "kitchen": "in the kitchen",
    "room": "in a room",
    "road": "on the road",
    "garden": "in the garden",
    "sky": "in the sky",
    "rain": "in the rain",
}
"""Places, and how captions say them."""

PLACES = tuple(PHRASES)

COLOURS = {
    "red": (222, 44, 44),
    "orange": (246, 140, 30),
    "yellow": (250, 212, 40),
    "green": (56, 168, 68),
    "blue": (44, 104, 226),
    "purple": (142, 60, 200),
    "pink": (250, 120, 190),
    "brown": (134, 82, 44),
    "black": (24, 24, 28),
    "grey": (140, 140, 144),
    "white": (250, 250, 250),
}
"""Colour words and their sRGB values: of plain backgrounds, and to find a word for a thing's colour."""

NAMED = (*PLACES, *(f"{colour} background" for colour in COLOURS))
"""Backgrounds that a caption can name, in the order of `Backgrounds.name`."""

PIXELS = 64
SIDE = 96
"""Side of a stored place: a scene shows a part of it."""

VARIANTS = 96
"""Stored pictures of each place. Every scene cuts, mirrors and tints one of them in its own way."""

PLAIN_SHARE, NAMELESS_SHARE = 0.14, 0.12
"""Shares of scenes before a plain colour, and before gradients and patterns that no caption names."""

_Colour = tuple[int, int, int]


class _Brush:
    """Draws on a canvas of 128 x 128 units, with a random generator at hand."""

    def __init__(self, random: np.random.Generator, side: int) -> None:
        self.random = random
        self.scale = side / 128
        self.image = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.image)

    def near(self, value: float, most: float) -> float:
        """`value`, moved by at most `most`."""
        return value + float(self.random.uniform(-most, most))

    def tone(self, colour: _Colour, most: int = 16) -> _Colour:
        """A colour near `colour`."""
        red, green, blue = np.clip(np.array(colour) + self.random.integers(-most, most + 1, 3), 0, 255)
        return int(red), int(green), int(blue)

    def sky(self, top: _Colour, bottom: _Colour, first: float, last: float) -> None:
        """Fill rows from `first` to `last` with a gradient."""
        start, stop = round(first * self.scale), max(round(last * self.scale), round(first * self.scale) + 1)
        weight = np.linspace(0, 1, stop - start)[:, None, None]
        rows = (1 - weight) * np.array(self.tone(top)) + weight * np.array(self.tone(bottom))
        band = np.broadcast_to(rows, (stop - start, self.image.width, 3)).astype(np.uint8)
        self.image.paste(Image.fromarray(np.ascontiguousarray(band)), (0, start))

    def box(self, left: float, top: float, right: float, bottom: float, colour: _Colour) -> None:
        """A rectangle."""
        self.pen.rectangle(
            [value * self.scale for value in (left, top, max(left, right), max(top, bottom))], fill=colour
        )

    def disc(self, x: float, y: float, radius: float, colour: _Colour, height: float | None = None) -> None:
        """An ellipse of half width `radius` and half height `height` (a circle without it)."""
        tall = radius if height is None else height
        self.pen.ellipse([value * self.scale for value in (x - radius, y - tall, x + radius, y + tall)], fill=colour)

    def shape(self, points: list[tuple[float, float]], colour: _Colour) -> None:
        """A polygon."""
        self.pen.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=colour)

    def line(self, points: list[tuple[float, float]], colour: _Colour, width: float) -> None:
        """A line of several pieces."""
        self.pen.line(
            [(x * self.scale, y * self.scale) for x, y in points], fill=colour, width=round(width * self.scale)
        )

    def hill(self, centre: float, top: float, width: float, colour: _Colour) -> None:
        """A flat ellipse that rises to `top` and covers all below."""
        self.disc(centre, top + 128, width, colour, 128)

    def cloud(self, x: float, y: float, colour: _Colour = (255, 255, 255)) -> None:
        """A heap of discs."""
        size = self.near(1.0, 0.35)
        for offset, radius in ((-12, 8), (0, 12), (13, 9), (24, 6)):
            self.disc(x + offset * size, y - (radius - 8) * size / 2, radius * size, colour)

    def fir(self, x: float, top: float, size: float, colour: _Colour, cap: _Colour | None = None) -> None:
        """A fir of three triangles, with snow if `cap` is given."""
        for layer in range(3):
            low = top + (18 + 14 * layer) * size
            half = (8 + 4 * layer) * size
            self.shape([(x, top + 10 * layer * size), (x - half, low), (x + half, low)], colour)
            if cap:
                tip = top + 10 * layer * size
                self.shape([(x, tip), (x - 4 * size, tip + 8 * size), (x + 4 * size, tip + 8 * size)], cap)


def _beach(b: _Brush) -> None:
    shore = b.near(82, 8)
    b.sky((96, 190, 246), (186, 230, 250), 0, shore - 28)
    b.disc(b.near(64, 54), b.near(20, 8), 11, (255, 236, 120))
    b.sky((20, 120, 200), (50, 180, 214), shore - 30, shore)
    b.box(0, shore - 2, 128, shore + 2, (240, 250, 250))
    b.sky((244, 218, 156), (236, 204, 136), shore + 2, 128)
    trunk = b.near(20, 10) if b.random.random() < 0.5 else b.near(108, 10)
    lean = b.near(3, 6)
    b.shape([(trunk - 3, 96), (trunk + 3, 96), (trunk + 2 + lean, 36), (trunk - 2 + lean, 36)], (146, 98, 56))
    for tip_x, tip_y in ((-20, 44), (-14, 24), (4, 16), (24, 26), (28, 46)):
        top = trunk + lean
        b.shape([(top, 32), (top + tip_x / 2, tip_y - 2), (top + tip_x, tip_y), (top, 40)], b.tone((40, 150, 72)))


def _snow(b: _Brush) -> None:
    b.sky((150, 178, 208), (210, 222, 236), 0, 128)
    for x in np.linspace(6, 122, int(b.random.integers(3, 7))):
        b.fir(b.near(x, 8), b.near(34, 12), b.near(1.0, 0.25), b.tone((72, 116, 112)), (246, 250, 255))
    b.hill(b.near(40, 30), b.near(78, 6), 130, (244, 248, 252))
    b.hill(b.near(90, 30), b.near(94, 6), 120, (234, 241, 249))
    for _ in range(int(b.random.integers(14, 40))):
        b.disc(b.near(64, 64), b.near(60, 60), b.near(1.6, 0.7), (255, 255, 255))


def _grass(b: _Brush) -> None:
    b.sky((110, 196, 250), (200, 234, 252), 0, 128)
    b.cloud(b.near(40, 30), b.near(24, 10))
    if b.random.random() < 0.5:
        b.cloud(b.near(96, 20), b.near(34, 8))
    b.hill(b.near(64, 40), b.near(68, 8), 150, b.tone((108, 196, 76)))
    b.hill(b.near(64, 50), b.near(96, 6), 150, b.tone((92, 180, 66)))
    for column in range(8):
        x, y = b.near(8 + 16 * column, 6), b.near(106, 16)
        b.disc(x, y, 3, (255, 255, 255))
        b.disc(x, y, 1.2, (250, 200, 40))


def _night(b: _Brush) -> None:
    b.sky((10, 14, 46), (42, 50, 104), 0, 128)
    for _ in range(int(b.random.integers(12, 26))):
        b.disc(b.near(64, 62), b.near(42, 40), b.near(1.3, 0.5), (250, 246, 210))
    moon, high = b.near(64, 44), b.near(24, 8)
    b.disc(moon, high, 13, (250, 240, 180))
    if b.random.random() < 0.7:
        b.disc(moon + 7, high - 4, 11, (14, 19, 54))
    b.hill(b.near(64, 30), b.near(90, 6), 150, b.tone((20, 34, 50), 8))


def _desert(b: _Brush) -> None:
    b.sky((250, 150, 70), (255, 222, 140), 0, 128)
    b.disc(b.near(64, 50), b.near(32, 8), b.near(14, 3), (255, 246, 200))
    b.hill(b.near(20, 24), b.near(66, 6), 74, b.tone((222, 160, 84)))
    b.hill(b.near(112, 24), b.near(76, 6), 96, b.tone((234, 178, 100)))
    b.hill(b.near(56, 24), b.near(94, 6), 150, b.tone((200, 136, 66)))


def _forest(b: _Brush) -> None:
    b.sky((60, 110, 74), (100, 150, 92), 0, 96)
    for x in np.linspace(2, 126, int(b.random.integers(5, 8))):
        x, half = b.near(x, 7), b.near(5, 1.5)
        b.box(x - half, 0, x + half, 98, b.tone((84, 58, 40), 10))
    for column in range(9):
        b.disc(b.near(16 * column, 5), b.near(2, 6), b.near(18, 3), b.tone((24, 74, 44), 8))
    b.box(0, 94, 128, 128, b.tone((54, 84, 40), 8))
    for column in range(12):
        x = b.near(11 * column, 5)
        b.shape([(x - 4, 98), (x, b.near(86, 3)), (x + 4, 98)], (40, 120, 50))


def _city(b: _Brush) -> None:
    b.sky((176, 206, 230), (232, 236, 236), 0, 104)
    for column in range(5):
        left, top = b.near(26 * column, 3), b.near(32, 20)
        b.box(left, top, left + 23, 102, b.tone((128, 128, 142), 24))
        for row in np.arange(top + 6, 94, 12):
            for window in (5, 14):
                b.box(left + window, row, left + window + 4, row + 5, b.tone((252, 232, 150), 14))
    b.box(0, 98, 128, 104, (196, 196, 196))
    b.box(0, 104, 128, 128, b.tone((78, 80, 86), 8))
    start = b.near(0, 14)
    for x in range(-28, 156, 28):
        b.box(x + start, 114, x + start + 14, 117, (240, 240, 240))


def _water(b: _Brush) -> None:
    b.sky((60, 190, 226), (8, 66, 140), 0, 128)
    b.hill(b.near(64, 30), b.near(108, 5), 150, b.tone((206, 190, 130)))
    for x in np.linspace(4, 124, int(b.random.integers(3, 6))):
        x, height = b.near(x, 8), b.near(42, 16)
        points = [(x + (5 if step % 2 else -5), 118 - height * step / 5) for step in range(6)]
        b.line(points, b.tone((30, 150, 90)), 5)
    for _ in range(9):
        x, y, radius = b.near(64, 60), b.near(50, 46), b.near(3.5, 1.5)
        b.disc(x, y, radius, (210, 244, 255))
        b.disc(x, y, radius - 1.4, (70, 160, 210))


def _table(b: _Brush) -> None:
    edge = b.near(82, 6)
    b.sky((250, 236, 206), (240, 220, 184), 0, edge + 2)
    left = b.near(62, 50)
    b.box(left, 10, left + 36, 50, (160, 110, 70))
    b.box(left + 4, 14, left + 32, 46, b.tone((150, 206, 240)))
    b.line([(left + 18, 14), (left + 18, 46)], (160, 110, 70), 3)
    b.sky((182, 118, 66), (166, 104, 54), edge, 128)
    b.box(0, edge, 128, edge + 4, (206, 144, 88))
    for row in (edge + 16, edge + 30):
        b.line([(0, b.near(row, 3)), (128, b.near(row, 3))], (146, 88, 44), 2)


def _mountains(b: _Brush) -> None:
    b.sky((130, 180, 236), (224, 232, 246), 0, 128)
    for centre, top, half in ((24, 28, 50), (104, 22, 54), (64, 46, 46)):
        x, y = b.near(centre, 10), b.near(top, 8)
        b.shape([(x, y), (x - half, 104), (x + half, 104)], b.tone((112, 116, 140), 10))
        slope = half / (104 - y)
        cap = [(x, y), (x - 18 * slope, y + 18), (x - 5, y + 13), (x + 3, y + 19), (x + 18 * slope, y + 18)]
        b.shape(cap, (250, 252, 255))
    b.hill(b.near(64, 34), b.near(96, 5), 150, b.tone((116, 150, 96)))


def _space(b: _Brush) -> None:
    b.sky((8, 6, 20), (22, 12, 44), 0, 128)
    for _ in range(int(b.random.integers(25, 50))):
        b.disc(b.near(64, 64), b.near(64, 64), b.near(1.0, 0.5), b.tone((240, 240, 255), 14))
    x, y, radius = b.near(64, 56), b.near(40, 34), b.near(15, 6)
    colour = b.tone((190, 120, 90), 60)
    b.disc(x, y, radius, colour)
    b.disc(x - radius / 4, y - radius / 4, radius / 4, b.tone(colour, 20))
    if b.random.random() < 0.6:
        b.line([(x - 1.7 * radius, y + 4), (x + 1.7 * radius, y - 4)], b.tone((220, 200, 160)), 2.5)
    b.disc(b.near(64, 60), b.near(104, 18), b.near(6, 2), b.tone((200, 200, 210), 30))


def _sunset(b: _Brush) -> None:
    line = b.near(84, 6)
    b.sky((92, 50, 120), (255, 150, 80), 0, line)
    b.disc(b.near(64, 40), line - 2, b.near(18, 3), (255, 222, 110))
    b.sky((120, 60, 110), (40, 30, 80), line, 128)
    for _ in range(6):
        x, y = b.near(64, 60), b.near((line + 128) / 2, 18)
        b.box(x, max(y, line + 2), x + b.near(18, 8), max(y, line + 2) + 1.6, (250, 170, 110))


def _kitchen(b: _Brush) -> None:
    edge = b.near(84, 5)
    wall = b.tone((214, 236, 226), 18)
    b.box(0, 0, 128, 128, wall)
    for row in np.arange(0, edge, 14):
        b.line([(0, row), (128, row)], b.tone((196, 216, 208), 4), 1)
    for column in np.arange(b.near(0, 7), 128, 14):
        b.line([(column, 0), (column, edge)], (196, 216, 208), 1)
    cupboard = b.tone((240, 240, 236), 12)
    start = b.near(0, 16)
    for column in range(3):
        left = start + 44 * column
        b.box(left, 6, left + 38, 34, cupboard)
        b.disc(left + 33, 26, 1.6, (120, 120, 120))
    b.box(0, edge, 128, edge + 6, b.tone((120, 122, 130), 20))
    b.box(0, edge + 6, 128, 128, b.tone((206, 182, 150), 18))
    for column in np.arange(start, 160, 40):
        b.line([(column, edge + 8), (column, 128)], (150, 130, 106), 1.5)


def _room(b: _Brush) -> None:
    floor = b.near(88, 6)
    b.box(0, 0, 128, 128, b.tone((222, 206, 190), 28))
    x = b.near(64, 40)
    b.box(x - 16, 14, x + 16, 44, (110, 80, 60))
    b.box(x - 13, 17, x + 13, 41, b.tone((140, 170, 190), 50))
    b.sky((166, 120, 84), (136, 96, 64), floor, 128)
    b.box(0, floor - 4, 128, floor, (250, 246, 240))
    lamp = (x + 60) % 128
    b.line([(lamp, floor + 4), (lamp, 44)], (90, 80, 80), 2)
    b.shape([(lamp - 10, 48), (lamp - 6, 32), (lamp + 6, 32), (lamp + 10, 48)], b.tone((250, 220, 130), 24))
    b.disc(b.near(64, 30), 128, 50, b.tone((170, 60, 60), 50), 18)


def _road(b: _Brush) -> None:
    line = b.near(64, 8)
    b.sky((140, 200, 244), (214, 232, 246), 0, line)
    b.cloud(b.near(64, 50), b.near(24, 10))
    b.box(0, line, 128, 128, b.tone((124, 176, 84)))
    x = b.near(64, 14)
    b.shape([(x - 6, line), (x + 6, line), (128 + 10, 128), (-10, 128)], b.tone((92, 94, 100), 8))
    for part in range(5):
        near, far = (part + 0.55) / 5, part / 5
        top, low = line + (128 - line) * far**1.5, line + (128 - line) * near**1.5
        b.shape(
            [(x - 4 * far, top), (x + 4 * far, top), (x + 4 * near + 1, low), (x - 4 * near - 1, low)], (250, 230, 110)
        )


def _garden(b: _Brush) -> None:
    fence = b.near(72, 6)
    b.sky((150, 214, 250), (214, 240, 250), 0, fence)
    b.hill(b.near(64, 40), fence - 18, 110, b.tone((86, 160, 80)))
    start = b.near(0, 8)
    for x in np.arange(start - 16, 140, 16):
        b.shape(
            [(x, fence - 18), (x + 5, fence - 26), (x + 10, fence - 18), (x + 10, fence + 8), (x, fence + 8)],
            (250, 248, 240),
        )
    b.box(0, fence - 12, 128, fence - 8, (236, 232, 222))
    b.box(0, fence + 6, 128, 128, b.tone((100, 186, 80)))
    for _ in range(14):
        x, y, colour = b.near(64, 62), b.near(108, 18), b.tone((220, 90, 140), 80)
        b.line([(x, y), (x, y + 7)], (50, 130, 50), 1.5)
        for petal_x, petal_y in ((-2, 0), (2, 0), (0, -2), (0, 2)):
            b.disc(x + petal_x, y + petal_y, 1.8, colour)
        b.disc(x, y, 1.4, (250, 220, 80))


def _sky(b: _Brush) -> None:
    b.sky((60, 150, 236), (190, 226, 250), 0, 128)
    for _ in range(int(b.random.integers(3, 7))):
        b.cloud(b.near(58, 64), b.near(64, 56))


def _rain(b: _Brush) -> None:
    b.sky((96, 108, 124), (150, 160, 172), 0, 128)
    for x in (8, 44, 80, 112):
        b.cloud(b.near(x, 10), b.near(14, 5), b.tone((120, 130, 146), 12))
    b.box(0, b.near(106, 4), 128, 128, b.tone((92, 104, 112), 8))
    for _ in range(5):
        b.disc(b.near(64, 60), b.near(116, 6), b.near(12, 4), b.tone((140, 160, 178), 8), 2.2)
    for _ in range(int(b.random.integers(24, 44))):
        x, y = b.near(64, 64), b.near(60, 56)
        b.line([(x, y), (x - 2.5, y + 8)], (200, 222, 244), 1.2)


_DRAWERS: dict[str, Callable[[_Brush], None]] = {name: globals()[f"_{name}"] for name in PLACES}


def draw_place(place: str, variant: int, side: int = SIDE) -> np.ndarray:
    """One variant of a place: uint8 [side, side, 3], sRGB. It is the same picture at any size."""
    # Drawn at twice the size and halved: soft edges.
    brush = _Brush(np.random.default_rng([zlib.crc32(place.encode()), variant]), 2 * side)
    _DRAWERS[place](brush)
    return np.asarray(brush.image.reduce(2))


@dataclasses.dataclass(frozen=True)
class Backgrounds:
    """What stands behind the things of `batch` scenes.

    Attributes:
        name: int [batch], index in NAMED; -1 for a background without a name.
        variant: int [batch], of a place.
        cut: float [batch, 3], corner (shares of the room) and share of the stored picture that is shown.
        flipped: bool [batch].
        tint: float [batch, 3], factors of the three channels.
        colours: float [batch, 2, 3], sRGB in [0, 1]: of a plain background the first, of a nameless one both.
        pattern: float [batch, 4], kind (0: gradient, 1: stripes, 2: checks, 3: blobs), angle, frequency, phase.
    """

    name: torch.Tensor
    variant: torch.Tensor
    cut: torch.Tensor
    flipped: torch.Tensor
    tint: torch.Tensor
    colours: torch.Tensor
    pattern: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> "Backgrounds":
        """The chosen ones."""
        return Backgrounds(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def to(self, device: torch.device | str) -> "Backgrounds":
        """The same on another device."""
        return Backgrounds(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Bank:
    """Stored pictures of the places: uint8 [places, variants, 3, side, side]."""

    pictures: torch.Tensor

    @property
    def pixels(self) -> int:
        """Side of a scene's background: two thirds of the stored side, of which a scene shows at least that much."""
        return self.pictures.shape[-1] * PIXELS // SIDE

    def to(self, device: torch.device | str) -> "Bank":
        """The same on another device."""
        return Bank(self.pictures.to(device))

    def draw(self, backgrounds: Backgrounds) -> torch.Tensor:
        """Pictures of backgrounds on the bank's device: float [batch, 3, pixels, pixels] in [0, 1]."""
        device = self.pictures.device
        count = len(backgrounds.name)
        line = (torch.arange(self.pixels, device=device) + 0.5) / self.pixels * 2 - 1
        rows, columns = torch.meshgrid(line, line, indexing="ij")
        share = backgrounds.cut[:, 2, None, None]
        room = (1 - share) * (2 * backgrounds.cut[:, :2, None, None].transpose(0, 1) - 1)
        x, y = columns * share + room[0], rows * share + room[1]
        x = torch.where(backgrounds.flipped[:, None, None], -x, x)
        is_place = (backgrounds.name >= 0) & (backgrounds.name < len(PLACES))
        place = backgrounds.name.clamp(0, len(PLACES) - 1)
        stored = self.pictures[place, backgrounds.variant % self.pictures.shape[1]].float() / 255
        shown = functional.grid_sample(stored, torch.stack([x, y], -1), padding_mode="border", align_corners=False)
        shown = shown * backgrounds.tint[:, :, None, None]
        first, second = (backgrounds.colours[:, number, :, None, None] for number in (0, 1))
        floor = 1 - 0.07 * (rows > 0.55).float()
        plain = first * floor * (1 + 0.06 * (backgrounds.pattern[:, 1, None, None, None].sin()) * rows)
        kind, angle, frequency, phase = (backgrounds.pattern[:, number, None, None] for number in range(4))
        along = columns * angle.cos() + rows * angle.sin()
        across = rows * angle.cos() - columns * angle.sin()
        stripes = (4 * (frequency * along * 3 + phase).sin() + 0.5).clamp(0, 1)
        checks = (4 * (frequency * along * 3 + phase).sin() * (frequency * across * 3).sin() + 0.5).clamp(0, 1)
        blobs = 0.5 + 0.25 * ((2 * frequency * along + phase).sin() + (1.5 * frequency * across + 2 * phase).sin())
        mix = torch.where(
            kind == 0, (along + 1.4) / 2.8, torch.where(kind == 1, stripes, torch.where(kind == 2, checks, blobs))
        )
        nameless = first + mix[:, None].clamp(0, 1) * (second - first)
        without_place = torch.where((backgrounds.name < 0).reshape(count, 1, 1, 1), nameless, plain)
        return torch.where(is_place.reshape(count, 1, 1, 1), shown, without_place).clamp(0, 1)


def invent(count: int, generator: torch.Generator) -> Backgrounds:
    """Backgrounds at random; `generator` is on the CPU."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    way = uniform(count)
    place = torch.randint(len(PLACES), (count,), generator=generator)
    colour = torch.randint(len(COLOURS), (count,), generator=generator)
    plain, nameless = way < PLAIN_SHARE, way > 1 - NAMELESS_SHARE
    name = torch.where(plain, len(PLACES) + colour, torch.where(nameless, -1, place))
    first = (
        torch.tensor(list(COLOURS.values()))[colour] / 255 + 0.05 * torch.randn(count, 3, generator=generator)
    ).clamp(0, 1)
    # A plain background is pale half of the time, as paper and walls are.
    pale = (uniform(count, 1) < 0.5) & (colour[:, None] < 7)
    first = torch.where(pale, 1 - 0.5 * (1 - first), first)
    colours = torch.stack([torch.where(plain[:, None], first, uniform(count, 3)), uniform(count, 3)], 1)
    return Backgrounds(
        name=name,
        variant=torch.randint(VARIANTS, (count,), generator=generator),
        cut=torch.cat([uniform(count, 2), uniform(count, 1, low=0.75)], 1),
        flipped=uniform(count) < 0.5,
        tint=(0.05 * torch.randn(count, 3, generator=generator)).exp()
        * (0.07 * torch.randn(count, 1, generator=generator)).exp(),
        colours=colours,
        pattern=torch.stack(
            [
                torch.randint(4, (count,), generator=generator).float(),
                uniform(count, high=6.2832),
                uniform(count, low=1.0, high=6.0),
                uniform(count, high=6.2832),
            ],
            -1,
        ),
    )


def named(backgrounds: Backgrounds, names: Sequence[str]) -> Backgrounds:
    """Backgrounds that show what their names say, words of NAMED, and are as they were in all else."""
    name = torch.tensor([NAMED.index(each) for each in names])
    own = torch.tensor(list(COLOURS.values()))[(name - len(PLACES)).clamp(min=0)] / 255
    first = torch.where((name >= len(PLACES))[:, None], own, backgrounds.colours[:, 0])
    colours = torch.stack([first, backgrounds.colours[:, 1]], 1)
    return dataclasses.replace(backgrounds, name=name, colours=colours)


@functools.cache
def bank(variants: int = VARIANTS, side: int = SIDE) -> Bank:
    """The bank of all places, drawn anew: a few seconds.

    Args:
        variants: pictures of each place; scenes that name a later one are given an earlier.
        side: of the stored pictures.
    """
    pictures = np.stack([[draw_place(place, variant, side) for variant in range(variants)] for place in PLACES])
    return Bank(torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).contiguous())
