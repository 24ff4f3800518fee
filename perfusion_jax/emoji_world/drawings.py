"""Rasterise the vendors' vector drawings into square RGBA pictures (sprites)."""

import functools
import io
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from perfusion_jax.emoji_world import catalogue
from perfusion_jax.emoji_world.fetch import cache_directory, package_directory

SPRITE_PIXELS = 96
"""Side of a stored sprite: about twice the largest size at which a scene shows it."""

RASTER_PIXELS = 192


def square_sprite(picture: Image.Image, pixels: int = SPRITE_PIXELS) -> np.ndarray:
    """Crop an RGBA picture to what is visible, centre it on a transparent square, and scale that to `pixels`.

    Args:
        picture: RGBA PIL image of any size.
        pixels: side of the result.

    Returns:
        uint8 array [pixels, pixels, 4], not premultiplied.
    """
    visible = picture.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    picture = picture.crop(visible)
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.resize((pixels, pixels), Image.Resampling.LANCZOS))


@functools.cache
def icon_set(vendor: str) -> dict[str, Any]:
    """Parsed Iconify json of one vendor."""
    return json.loads((package_directory(vendor) / "icons.json").read_text())


def rasterise(vendor: str, icon_name: str) -> np.ndarray:
    """Sprite of one vector drawing: uint8 array [SPRITE_PIXELS, SPRITE_PIXELS, 4].

    Raises:
        KeyError: the vendor has no drawing of that name.
    """
    import resvg_py  # only pretraining rasterises: `pip install perfusion_jax[pretrain]`

    icons = icon_set(vendor)
    while icon_name not in icons["icons"]:
        icon_name = icons["aliases"][icon_name]["parent"]
    icon = icons["icons"][icon_name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RASTER_PIXELS}" height="{RASTER_PIXELS}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return square_sprite(Image.open(io.BytesIO(png)).convert("RGBA"))


@functools.cache
def world_sprites() -> dict[str, np.ndarray]:
    """Sprites of the world: {category or headwear: uint8 array [drawings, SPRITE_PIXELS, SPRITE_PIXELS, 4]}."""
    sprites = {
        category: np.stack([rasterise(vendor, icon_name) for vendor in catalogue.vendors_of(category)])
        for category, icon_name in {**catalogue.ICON_NAMES, **catalogue.OTHER_ICON_NAMES}.items()
    }
    for word, icon_name in catalogue.HEADWEAR_ICON_NAMES.items():
        sprites[word] = rasterise(catalogue.HEADWEAR_VENDOR, icon_name)[None]
    return sprites


_NOT_A_THING = re.compile(
    r"flag|skin-tone|keycap|button|letter|symbol|oclock|thirty|^(woman|man|person|family|couple|kiss|men|women)"
    r"|-(woman|man|person|girl|boy)"
)
"""Iconify names of signs, and of people in their many variants."""


def all_world_sprites() -> np.ndarray:
    """Sprites of every thing the world's vendors drew, for an autoencoder that must draw more than the categories.

    Returns:
        uint8 array [about 4,400, SPRITE_PIXELS, SPRITE_PIXELS, 4]. Rasterised once (40 s), then read from the cache.
    """
    path = cache_directory() / "all_world_sprites.npy"
    if not path.exists():
        names = [
            (vendor, name)
            for vendor in catalogue.WORLD_VENDORS
            for name in sorted(icon_set(vendor)["icons"])
            if not _NOT_A_THING.search(name)
        ]
        sprites = np.stack([rasterise(vendor, name) for vendor, name in names])
        partial = path.with_suffix(".partial.npy")
        np.save(partial, sprites)
        partial.replace(path)
    return np.load(path, mmap_mode="r")
