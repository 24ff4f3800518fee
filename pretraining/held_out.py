"""Drawings that no training sees: both sets of Fluent Emoji, as individuals that the world can place anywhere."""

import functools
import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image

from pretraining import drawings, individuals, places, scenes, things, vendors


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


def sprite(vendor: str, name: str, pixels: int = drawings.PIXELS) -> np.ndarray | None:
    """A held-out drawing, cropped and centred: float32 [4, pixels, pixels], premultiplied RGBA in [0, 1]; None if not
    drawn."""
    if vendor == "fluent-flat":
        svg = vendors.svg(vendor, name)
        picture = None if svg is None else drawings.rasterise(svg, 2 * pixels)
    else:
        found = solid(name)
        picture = None if found is None else found.astype(np.float32) / 255
    if picture is None:
        return None
    premultiplied = np.concatenate([picture[..., :3] * picture[..., 3:], picture[..., 3:]], -1)
    return drawings.centre(premultiplied.transpose(2, 0, 1), pixels).astype(np.float32) / 255


@functools.cache
def all_sprites(vendor: str) -> tuple[tuple[things.Entry, ...], torch.Tensor]:
    """Every thing of the table that a held-out vendor draws: entries and float [count, 4, PIXELS, PIXELS]."""
    found = [(entry, sprite(vendor, entry.name)) for entry in things.table()]
    drawn = [(entry, picture) for entry, picture in found if picture is not None]
    return tuple(entry for entry, _ in drawn), torch.from_numpy(np.stack([picture for _, picture in drawn]))


@functools.cache
def kinds(least: int = 2) -> tuple[str, ...]:
    """Common kinds of which the held-out vendors have at least `least` drawings, in the order of the table."""
    drawn = [entry.kind for vendor in vendors.HELD_OUT for entry in all_sprites(vendor)[0] if entry.common]
    return tuple(kind for kind in things.kinds() if drawn.count(kind) >= least)


def individuals_of(kind: str, count: int, seed: int, first: tuple[str, str] | None = None) -> torch.Tensor:
    """Different individuals of a kind: float [count, 4, PIXELS, PIXELS], premultiplied RGBA.

    Half of them at most are drawings as they are, of both vendors; the others are these drawings in other colours.

    Args:
        kind: a word of `kinds`.
        count: how many.
        seed: chooses drawings and colours, together with the kind.
        first: vendor and name of the drawing that comes first; at random if none is given.
    """
    generator = torch.Generator().manual_seed((seed << 32) + things.kinds().index(kind))
    known = [
        (vendor, entry.name, picture)
        for vendor in vendors.HELD_OUT
        for entry, picture in zip(*all_sprites(vendor), strict=True)
        if entry.kind == kind
    ]
    order = torch.randperm(len(known), generator=generator).tolist()
    if first is not None:
        order.sort(key=lambda number: known[number][:2] != first)
    originals = [known[number] for number in order[: max(1, count // 2)]]
    varied = [_varied(*originals[number % len(originals)], generator) for number in range(count - len(originals))]
    return torch.stack([picture for _, _, picture in originals] + varied)[:count]


def _varied(vendor: str, name: str, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A drawing in clearly other colours: by parts if it can be taken apart, all hues turned together if not."""
    if vendor == "fluent-flat":
        svg = vendors.svg(vendor, name)
        assert svg is not None
        coverages, colours = (torch.from_numpy(array) for array in drawings.take_apart(svg))
        original = colours.float() / 255
        candidates = individuals.invent(original[None], torch.zeros(32, dtype=torch.long), generator).colours
        areas = coverages.float().sum((1, 2))
        away = ((candidates - original).abs().mean(-1) * areas).sum(1) / areas.sum()
        chosen = candidates[int((away > 0.12).float().argmax()) if (away > 0.12).any() else int(away.argmax())]
        return torch.from_numpy(drawings.put_together(coverages.numpy(), 255 * chosen.numpy())).permute(2, 0, 1)
    alpha = picture[3:].clamp(min=1e-6)
    hsv = individuals.rgb_to_hsv((picture[:3] / alpha).clamp(0, 1).permute(1, 2, 0))
    turn = 0.12 + 0.76 * torch.rand((), generator=generator)
    value = 1 - 0.35 * torch.rand((), generator=generator)
    turned = torch.stack([(hsv[..., 0] + turn) % 1, hsv[..., 1], hsv[..., 2] * value], -1)
    return torch.cat([individuals.hsv_to_rgb(turned).permute(2, 0, 1) * picture[3:], picture[3:]])


def draw_alone(world: scenes.World, sprites: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sprites alone in scenes, anywhere in any place: pictures [count, 3, P, P] in [-1, 1] and masks [count, P, P].

    Args:
        world: draws them.
        sprites: float [count, 4, side, side], premultiplied RGBA.
        seed: of views and backgrounds.
    """
    generator = torch.Generator().manual_seed(seed)
    count, none = len(sprites), torch.zeros(len(sprites), dtype=torch.long)
    plan = scenes.Plan(
        things=individuals.faithful(world.planner.colours, none),
        views=world.planner.views(none + 1, none, generator),
        scene=torch.arange(count),
        slot=none,
        worn=none.bool(),
        backgrounds=places.invent(count, generator),
        styles=none,
    )
    pictures, masks = world.draw(plan, margined(sprites))
    return pictures, masks[:, 0]


def scenes_of(world: scenes.World, sprites: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` scenes of each sprite (see `draw_alone`): float [sprites, count, 3, PIXELS, PIXELS]."""
    return draw_alone(world, sprites.repeat_interleave(count, 0), seed)[0].unflatten(0, (len(sprites), count))


def margined(pictures: torch.Tensor) -> torch.Tensor:
    """Sprites [count, 4, side, side] with the margin that `individuals.paint` gives."""
    return torch.nn.functional.pad(pictures, (pictures.shape[-1] // 12,) * 4)
