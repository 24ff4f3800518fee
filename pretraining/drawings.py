"""Take vector drawings apart: how much of each pixel each colour of a drawing makes up.

Compositing is linear in the colours, so a drawing is the sum over its colours of (coverage of that colour) x (the
colour). The coverages are read from renderings in which three colours are pure red, green and blue and all others
black. With them a drawing can be given any other colours by one product, without a vector renderer.
"""

import io
import re

import numpy as np
import resvg_py
from PIL import Image, ImageColor

PIXELS = 96
"""Side of a stored drawing: half as much again as the largest size at which a scene shows one."""

RASTER_PIXELS = 2 * PIXELS
PARTS = 10
"""Colours that a drawing is reduced to: its nearest ones are counted as one until so many are left."""

_COLOUR = re.compile(
    r"""(?P<before>(?:fill|stroke|stop-color|(?<![\w-])color)\s*[=:]\s*["']?\s*)(?P<value>\#[0-9a-fA-F]{3,8}|rgb\([^)]*\)|[a-zA-Z]+)"""
)
_NO_COLOUR = {"none", "transparent", "inherit", "url"}


def colours_of(svg: str) -> list[tuple[int, int, int]]:
    """Distinct sRGB colours that the text of an SVG names, black included (what has no fill is black)."""
    found = {_rgb(match["value"]) for match in _COLOUR.finditer(svg)} - {None}
    return sorted({(0, 0, 0), *(colour for colour in found if colour is not None)})


def _rgb(value: str) -> tuple[int, int, int] | None:
    if value in _NO_COLOUR:
        return None
    try:
        return ImageColor.getrgb("black" if value == "currentColor" else value)[:3]
    except ValueError:
        return None


def recolour(svg: str, colours: dict[tuple[int, int, int], str]) -> str:
    """The SVG with every colour replaced by what `colours` gives for it, black for those it does not name."""

    def replacement(match: re.Match[str]) -> str:
        rgb = _rgb(match["value"])
        return match[0] if rgb is None else match["before"] + colours.get(rgb, "#000")

    plain = colours.get((0, 0, 0), "#000")
    return _COLOUR.sub(replacement, svg).replace("<svg ", f'<svg fill="{plain}" color="{plain}" ', 1)


def rasterise(svg: str, pixels: int) -> np.ndarray:
    """Render an SVG with a square of `pixels` as its size: float32 [pixels, pixels, 4] in [0, 1], not premultiplied."""
    sized = svg.replace("<svg ", f'<svg width="{pixels}" height="{pixels}" ', 1)
    png = bytes(resvg_py.svg_to_bytes(svg_string=sized))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), np.float32) / 255


def take_apart(svg: str) -> tuple[np.ndarray, np.ndarray]:
    """Coverages and colours of a drawing, cropped to what is visible and centred on a square.

    Args:
        svg: SVG text with a viewBox and no size.

    Returns:
        (uint8 [PARTS, PIXELS, PIXELS], uint8 [PARTS, 3]): how much of each pixel a colour makes up, 255 being all of
        it, and the sRGB colours; the largest part first, zeros where the drawing has fewer colours.

    Raises:
        ValueError: nothing is visible.
    """
    colours = colours_of(svg)
    coverages = []
    for start in range(0, len(colours), 3):
        channels = dict(zip(colours[start : start + 3], ("#f00", "#0f0", "#00f"), strict=False))
        picture = rasterise(recolour(svg, channels), RASTER_PIXELS)
        premultiplied = picture[..., :3] * picture[..., 3:]
        coverages.extend(premultiplied[..., : len(channels)].transpose(2, 0, 1))
    parts = [
        (coverage, np.array(colour, np.float32), float(coverage.sum()))
        for coverage, colour in zip(coverages, colours, strict=True)
    ]
    parts = [part for part in parts if part[2] > 0]
    if not parts or sum(area for _, _, area in parts) < 16:
        raise ValueError("the drawing shows nothing")
    while len(parts) > PARTS:
        parts = _merge_nearest(parts)
    parts.sort(key=lambda part: -part[2])
    stack = centre(np.stack([coverage for coverage, _, _ in parts]))
    result = np.zeros((PARTS, PIXELS, PIXELS), np.uint8)
    result[: len(parts)] = stack
    palette = np.zeros((PARTS, 3), np.uint8)
    palette[: len(parts)] = np.round([colour for _, colour, _ in parts])
    return result, palette


_Part = tuple[np.ndarray, np.ndarray, float]


def _merge_nearest(parts: list[_Part]) -> list[_Part]:
    """Count as one the two parts whose common colour costs the least squared error (Ward's criterion)."""
    colours = np.stack([colour for _, colour, _ in parts])
    areas = np.array([area for _, _, area in parts])
    distances = np.square(colours[:, None] - colours[None]).sum(-1)
    costs = distances * areas[:, None] * areas[None] / (areas[:, None] + areas[None])
    np.fill_diagonal(costs, np.inf)
    first, second = sorted(np.unravel_index(np.argmin(costs), costs.shape))
    (coverage, colour, area), (other_coverage, other_colour, other_area) = parts[first], parts[second]
    whole = area + other_area
    merged = (coverage + other_coverage, (area * colour + other_area * other_colour) / whole, whole)
    return [part for number, part in enumerate(parts) if number not in (first, second)] + [merged]


def centre(coverages: np.ndarray, pixels: int = PIXELS) -> np.ndarray:
    """Crop float [parts, side, side] to what is visible, centre it on a square, scale that to `pixels`: uint8."""
    visible = coverages.sum(0) > 0.03
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    square = np.zeros((len(coverages), side, side), np.float32)
    down, across = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    square[:, down : down + bottom - top, across : across + right - left] = coverages[:, top:bottom, left:right]
    scaled = [np.asarray(Image.fromarray(part).resize((pixels, pixels), Image.Resampling.HAMMING)) for part in square]
    return np.clip(np.round(np.stack(scaled) * 255), 0, 255).astype(np.uint8)


def put_together(coverages: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The drawing with given colours: float [PIXELS, PIXELS, 4] in [0, 1], premultiplied.

    Args:
        coverages: uint8 [parts, PIXELS, PIXELS].
        colours: [parts, 3], 0 to 255.
    """
    weights = coverages.astype(np.float32) / 255
    picture = np.einsum("phw,pc->hwc", weights, np.asarray(colours, np.float32) / 255)
    return np.concatenate([picture, weights.sum(0)[..., None]], axis=-1).clip(0, 1)
