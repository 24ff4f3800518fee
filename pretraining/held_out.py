"""Drawings that no training sees: both sets of Fluent Emoji, as individuals that the world can place anywhere."""

import functools
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from pretraining import drawings, individuals, places, scenes, things, training_tools, vendors

LEAST_APART = 0.12
"""Mean difference of colours, of 1, that makes two colourings of one drawing two individuals."""

TRIES = 48
"""Colourings of a drawing that are tried before the most different of them is taken."""


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


def source(vendor: str, name: str) -> str | bytes | None:
    """A drawing's SVG text in the flat set, its picture file in the three-dimensional one; None if not drawn."""
    if vendor == "fluent-flat":
        return vendors.svg(vendor, name)
    return _solid_files().get(_code_points().get(name, "").removesuffix("-fe0f"))


def sprite(vendor: str, name: str, pixels: int = drawings.PIXELS) -> np.ndarray | None:
    """A held-out drawing, cropped and centred: float32 [4, pixels, pixels], premultiplied RGBA in [0, 1]; None if not
    drawn."""
    found = source(vendor, name)
    if found is None:
        return None
    if isinstance(found, str):
        picture = drawings.rasterise(found, 2 * pixels)
    else:
        picture = np.asarray(Image.open(io.BytesIO(found)).convert("RGBA"), np.float32) / 255
    premultiplied = np.concatenate([picture[..., :3] * picture[..., 3:], picture[..., 3:]], -1)
    return drawings.centre(premultiplied.transpose(2, 0, 1), pixels).astype(np.float32) / 255


@functools.cache
def all_sprites(vendor: str) -> tuple[tuple[things.Entry, ...], torch.Tensor]:
    """Every thing of the table that a held-out vendor draws: entries and float [count, 4, PIXELS, PIXELS].

    What it draws alike under two names is there once.
    """
    found: dict[str | bytes | None, things.Entry] = {}
    for entry in things.table():
        found.setdefault(source(vendor, entry.name), entry)
    entries = tuple(entry for text, entry in found.items() if text is not None)
    return entries, torch.from_numpy(np.stack([sprite(vendor, entry.name) for entry in entries]))


def prepare() -> None:
    """Fetches and draws all sprites, so that a run that needs them later does not begin without them."""
    for vendor in vendors.HELD_OUT:
        all_sprites(vendor)


@functools.cache
def kinds(least: int = 2) -> tuple[str, ...]:
    """Common kinds of which the held-out vendors have at least `least` drawings, in the order of the table."""
    drawn = [entry.kind for vendor in vendors.HELD_OUT for entry in all_sprites(vendor)[0] if entry.common]
    return tuple(kind for kind in things.kinds() if drawn.count(kind) >= least)


def individuals_of(kind: str, count: int, seed: int, first: tuple[str, str] | None = None) -> torch.Tensor:
    """Different individuals of a kind: float [count, 4, PIXELS, PIXELS], premultiplied RGBA.

    Half of them at most are drawings as they are, of both vendors; the others are these drawings in colours that are
    LEAST_APART from those of all others of the same drawing.

    Args:
        kind: a word of `kinds`.
        count: how many.
        seed: chooses drawings and colours, together with the kind.
        first: vendor and name of the drawing that comes first; at random if none is given.
    """
    generator = training_tools.generator(seed, things.kinds().index(kind))
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
    shown = [picture for _, _, picture in originals]
    for number in range(len(originals), count):
        alike = number % len(originals)
        shown.append(farthest(colourings(*originals[alike], generator), shown[alike :: len(originals)]))
    return torch.stack(shown)


def colours_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean difference of the colours of two sprites of one shape, in [0, 1]."""
    return float((one[:3] - other[:3]).abs().mean(0).sum() / one[3].sum())


def farthest(candidates: Iterable[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """The first sprite whose colours are LEAST_APART from those of all others; if there is none, the one nearest to
    that."""
    best, most = None, -1.0
    for candidate in candidates:
        away = min(colours_apart(candidate, other) for other in others)
        if away > most:
            best, most = candidate, away
        if most >= LEAST_APART:
            break
    assert best is not None
    return best


def colourings(vendor: str, name: str, picture: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """A drawing in other colours, TRIES times: by parts if it can be taken apart, all pixels alike if not."""
    if vendor == "fluent-flat":
        svg = vendors.svg(vendor, name)
        assert svg is not None
        coverages, colours = drawings.take_apart(svg)
        original = torch.from_numpy(colours).float()[None] / 255
        for each in individuals.invent(original, torch.zeros(TRIES, dtype=torch.long), generator).colours:
            yield torch.from_numpy(drawings.put_together(coverages, 255 * each.numpy())).permute(2, 0, 1)
        return
    alpha = picture[3:].clamp(min=1e-6)
    hue, saturation, value = individuals.rgb_to_hsv((picture[:3] / alpha).clamp(0, 1).permute(1, 2, 0)).unbind(-1)
    for number in range(TRIES):
        turn, lighter, amount = torch.rand(3, generator=generator)
        # What is grey has no hue to turn, and is made lighter or darker by more and more.
        factor = 1 - (0.35 + 0.5 * number / TRIES) * amount
        changed = 1 - (1 - value) * factor if lighter < 0.5 else value * factor
        turned = individuals.hsv_to_rgb(torch.stack([(hue + 0.12 + 0.76 * turn) % 1, saturation, changed], -1))
        yield torch.cat([turned.permute(2, 0, 1) * picture[3:], picture[3:]])


def draw_alone(world: scenes.World, sprites: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sprites alone in scenes, anywhere in any place: pictures [count, 3, P, P] in [-1, 1] and masks [count, P, P].

    Args:
        world: draws them.
        sprites: float [count, 4, side, side], premultiplied RGBA.
        seed: of views and backgrounds.
    """
    generator = training_tools.generator(seed)
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


def some_alone(world: scenes.World, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawings at random, by both vendors, as of `draw_alone`."""
    sprites = torch.cat([all_sprites(vendor)[1] for vendor in vendors.HELD_OUT])
    chosen = torch.randint(len(sprites), (count,), generator=training_tools.generator(seed))
    return draw_alone(world, sprites[chosen], seed + 1)


def scenes_of(world: scenes.World, sprites: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` scenes of each sprite (see `draw_alone`): float [sprites, count, 3, PIXELS, PIXELS]."""
    return draw_alone(world, sprites.repeat_interleave(count, 0), seed)[0].unflatten(0, (len(sprites), count))


def margined(pictures: torch.Tensor) -> torch.Tensor:
    """Sprites [count, 4, side, side] with the margin that `individuals.paint` gives."""
    return torch.nn.functional.pad(pictures, (pictures.shape[-1] // 12,) * 4)
