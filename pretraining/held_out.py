"""Drawings that no training sees: both sets of Fluent Emoji, as individuals that the world can place anywhere."""

import functools
import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image

from pretraining import drawings, individuals, things, vendors


@functools.cache
def _code_points() -> dict[str, str]:
    """Unicode code points of the flat set's names, from the package's list of characters."""
    with tarfile.open(vendors.fetch("fluent-flat")) as archive:
        member = archive.extractfile("package/chars.json")
        assert member is not None
        return {name: points for points, name in json.load(member).items()}


@functools.cache
def _solid_files() -> dict[str, bytes]:
    """The picture files of the three-dimensional set by code points, without the mark of an emoji presentation."""
    with tarfile.open(vendors.fetch("fluent-3d")) as archive:
        return {
            member.name.rpartition("/")[2].removesuffix(".webp").removesuffix("-fe0f"): archive.extractfile(
                member
            ).read()  # type: ignore[union-attr]
            for member in archive
            if member.name.endswith(".webp")
        }


def solid(name: str) -> np.ndarray | None:
    """The rendered three-dimensional drawing of `name`: uint8 [height, width, 4]; None if the set has none."""
    points = _code_points().get(name)
    file = _solid_files().get((points or "").removesuffix("-fe0f"))
    return None if file is None else np.asarray(Image.open(io.BytesIO(file)).convert("RGBA"))


def sprite(vendor: str, name: str) -> np.ndarray | None:
    """A held-out drawing, cropped and centred: float32 [4, PIXELS, PIXELS], premultiplied RGBA in [0, 1]; None if not
    drawn."""
    if vendor == "fluent-flat":
        svg = vendors.svg(vendor, name)
        picture = None if svg is None else drawings.rasterise(svg, drawings.RASTER_PIXELS)
    else:
        found = solid(name)
        picture = None if found is None else found.astype(np.float32) / 255
    if picture is None:
        return None
    premultiplied = np.concatenate([picture[..., :3] * picture[..., 3:], picture[..., 3:]], -1)
    return drawings.centre(premultiplied.transpose(2, 0, 1)).astype(np.float32) / 255


@functools.cache
def all_sprites(vendor: str) -> tuple[tuple[things.Entry, ...], torch.Tensor]:
    """Every thing of the table that a held-out vendor draws: entries and float [count, 4, PIXELS, PIXELS]."""
    found = [(entry, sprite(vendor, entry.name)) for entry in things.table()]
    drawn = [(entry, picture) for entry, picture in found if picture is not None]
    return tuple(entry for entry, _ in drawn), torch.from_numpy(np.stack([picture for _, picture in drawn]))


def margined(pictures: torch.Tensor) -> torch.Tensor:
    """Sprites [count, 4, PIXELS, PIXELS] with the margin that `individuals.paint` gives."""
    side = drawings.PIXELS // 12
    return torch.nn.functional.pad(pictures, (side,) * 4)


def unchanged(count: int) -> individuals.Individuals:
    """Individuals that are shown as they are: for pictures that are given instead of painted."""
    colours = torch.zeros(1, drawings.PARTS, 3)
    return individuals.faithful(colours, torch.zeros(count, dtype=torch.long))
