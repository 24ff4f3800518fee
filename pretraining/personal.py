"""Pictures as a person has them: one thing at free places and sizes, sometimes beside another, with its mask apart."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pretraining import held_out, individuals, places, scenes, things, training_tools, vendors

SIDE = 512
"""Side of a person's pictures, in pixels."""

_VARIANTS = 6


@dataclasses.dataclass(frozen=True)
class Thing:
    """A personal thing: the word for its kind, and the held-out drawing that it is."""

    kind: str
    vendor: str
    drawing: str

    @property
    def name(self) -> str:
        """A name for its concept."""
        return f"{self.drawing}-{self.vendor.removeprefix('fluent-')}"

    @property
    def core(self) -> bool:
        """Whether its kind is one of those that the world shows most of all."""
        return any(entry.core for entry in things.table() if entry.kind == self.kind)


def choose(count: int, seed: int) -> tuple[Thing, ...]:
    """Things at random, of different kinds, half of them by each held-out vendor in turn.

    Kinds are those that the world shows often and of which the held-out vendors have several drawings.
    """
    random = np.random.default_rng(seed)
    chosen = []
    for number, kind in enumerate(random.permutation(held_out.kinds(2))[:count]):
        vendor = vendors.HELD_OUT[number % len(vendors.HELD_OUT)]
        names = [entry.name for entry in held_out.all_sprites(vendor)[0] if entry.kind == kind]
        if names:
            chosen.append(Thing(str(kind), vendor, str(random.choice(names))))
    return tuple(chosen)


def judge_beside(model: pathlib.Path, name: str) -> str:
    """The folder of a judge, `clip` or `instance`, as export_model puts it beside a model; "" if there is none."""
    folder = model.absolute().parent / name
    return str(folder) if (folder / "config.json").exists() else ""


@functools.cache
def large_world() -> scenes.World:
    """The world at SIDE; its own drawings are not needed."""
    none = np.zeros((1, 1, 3, 3), np.uint8)
    entry = things.table()[0]
    atlas = things.Atlas(none, none[:, :, 0], (things.Drawing(entry, "", entry.name),))
    return scenes.World(atlas, places.bank(_VARIANTS, SIDE * places.SIDE // places.PIXELS))


def photographs(
    sprite: torch.Tensor, count: int, seed: int, beside: Sequence[torch.Tensor] = (), where: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures of a thing.

    Args:
        sprite: float [4, side, side], premultiplied RGBA, cropped and centred.
        count: how many.
        seed: of where it stands and in which places.
        beside: things that stand beside it in the first pictures, one in each.
        where: the places of the pictures, words of `places.NAMED`; at random if none are given.

    Returns:
        (uint8 [count, SIDE, SIDE, 3]; masks, uint8 [count, SIDE, SIDE], 255 where the thing is; the place of each, a
        word of `places.NAMED`, or "").
    """
    world, generator = large_world(), training_tools.generator(seed)
    pictures, masks, shown = [], [], []
    for number in range(count):
        company = list(beside[number : number + 1])
        total = torch.full((1 + len(company),), 1 + len(company))
        mine = int(torch.randint(len(total), (), generator=generator))
        sprites = [*company[:mine], sprite, *company[mine:]]
        slots = torch.arange(len(total))
        backgrounds = places.invent(1, generator)
        if where:
            backgrounds = places.named(backgrounds, [where[number % len(where)]])
        plan = scenes.Plan(
            things=individuals.faithful(world.planner.colours, torch.zeros_like(slots)),
            views=world.planner.views(total, slots, generator),
            scene=torch.zeros_like(slots),
            slot=slots,
            worn=torch.zeros_like(slots).bool(),
            backgrounds=backgrounds,
            styles=torch.zeros(1, dtype=torch.long),
        )
        picture, covered = world.draw(plan, held_out.margined(torch.stack(sprites)))
        pictures.append(((picture[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())
        masks.append((covered[0, mine] * 255).round().to(torch.uint8).numpy())
        background = int(backgrounds.name)
        shown.append(places.NAMED[background] if background >= 0 else "")
    return np.stack(pictures), np.stack(masks), shown


def individuals_like(thing: Thing, several: int, count: int, seed: int) -> np.ndarray:
    """Pictures of several individuals of a kind that differ in the individual alone, not in places, poses and sizes.

    Args:
        thing: comes first.
        several: how many individuals.
        count: pictures of each.
        seed: of the pictures; by that of the thing's own pictures, they are like these.

    Returns:
        uint8 [several, count, SIDE, SIDE, 3].
    """
    sprites = held_out.individuals_of(thing.kind, several, seed, (thing.vendor, thing.drawing))
    return np.stack([photographs(sprite, count, seed)[0] for sprite in sprites])


def cut_out(pictures: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Pictures uint8 [count, side, side, 3] with white where masks, uint8 [count, side, side], are 0."""
    shares = masks[..., None] / 255
    return np.round(pictures * shares + 255 * (1 - shares)).astype(np.uint8)


def write_pictures(folder: pathlib.Path, pictures: np.ndarray, masks: np.ndarray) -> None:
    """Write FOLDER/N.png and FOLDER/masks/N.png."""
    for place, several in ((folder, pictures), (folder / "masks", masks)):
        place.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(several):
            Image.fromarray(picture).save(place / f"{number}.png")
