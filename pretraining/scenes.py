"""Scenes: up to three individuals anywhere in a place, their exact masks, and what a caption can say of them.

`Planner.plan(seed, step, size)` is a pure function: a killed run sees what an undisturbed one sees.
"""

import dataclasses

import numpy as np
import torch
from torch.nn import functional

from pretraining import individuals as individuals_
from pretraining import places, things, training_tools
from pretraining.individuals import Individuals

PIXELS = 64
"""Side of a picture."""

SLOTS = 3
"""Most things in a scene."""

STYLES = ("", "black and white", "pencil sketch")
_STYLE_SHARES = (0.95, 0.025, 0.025)


_HEADS = "bear fox lion koala panda frog wolf hamster unicorn polar-bear raccoon alien robot"
_STANDING = "teddy-bear chicken penguin snowman-without-snow ghost"
UPRIGHT = frozenset((*_HEADS.split(), *_STANDING.split()))
"""Drawings that can wear something besides those called NAME-face: heads, and what stands upright below its head."""

ON_EYES = frozenset(("glasses", "sunglasses"))
WORN = frozenset(("top-hat", "crown", "billed-cap", "womans-hat")) | ON_EYES
DRESSED_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Views:
    """Where individuals stand.

    Attributes:
        centre: float [count, 2], x and y in pixels.
        size: float [count], longer side in pixels.
        turn: float [count], radians, clockwise.
        flipped: bool [count].
    """

    centre: torch.Tensor
    size: torch.Tensor
    turn: torch.Tensor
    flipped: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> "Views":
        """The chosen ones."""
        return Views(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def to(self, device: torch.device | str) -> "Views":
        """The same on another device."""
        return Views(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a batch of scenes shows, before it is drawn or worded.

    Attributes:
        things: individuals of all scenes one after the other.
        views: where each of them stands.
        scene, slot: int [things]: the scene, and the number in it; things are named in this order, and later ones are
            in front.
        worn: bool [things]: it is worn by the thing before it.
        backgrounds: places.Backgrounds of the scenes.
        styles: int [batch], index in STYLES.
    """

    things: Individuals
    views: Views
    scene: torch.Tensor
    slot: torch.Tensor
    worn: torch.Tensor
    backgrounds: places.Backgrounds
    styles: torch.Tensor


class Planner:
    """Invents scenes of an atlas's drawings; knows nothing of pixels and devices.

    Args:
        atlas: the drawings, taken apart.

    Attributes:
        colours: float [drawings, parts, 3], sRGB in [0, 1].
        areas: float [drawings, parts], the share of a drawing that each part makes up.
        weights: float [drawings], how often each is shown.
        kind: int [drawings], index in `things.kinds()`.
    """

    def __init__(self, atlas: things.Atlas) -> None:
        self.colours = torch.from_numpy(atlas.colours).float() / 255
        kinds = [source.entry.kind for source in atlas.sources]
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        weights = [
            # Kinds with many drawings are shown more often than others, though not in proportion.
            source.entry.weight * counts[source.entry.kind] ** -0.6
            for source in atlas.sources
        ]
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.kind = torch.tensor([things.kinds().index(kind) for kind in kinds])
        names = [source.entry.name for source in atlas.sources]
        self.wearer = torch.tensor([name.endswith("-face") or name in UPRIGHT for name in names])
        self.worn = torch.tensor([number for number, name in enumerate(names) if name in WORN])
        self.on_eyes = torch.tensor([name in ON_EYES for name in names])
        self.top = torch.from_numpy(np.stack([_top(coverages) for coverages in atlas.coverages]))
        areas = torch.from_numpy(np.stack([part.sum((1, 2), dtype=np.float32) for part in atlas.coverages]))
        self.areas = areas / areas.sum(1, keepdim=True).clamp(min=1)

    def plan(self, seed: int, step: int, size: int) -> Plan:
        """Scenes number `step * size` and on of the endless sequence `seed`."""
        generator = training_tools.generator(seed, step)
        count = torch.multinomial(torch.tensor([0.03, 0.70, 0.21, 0.06]), size, replacement=True, generator=generator)
        present = torch.arange(SLOTS) < count[:, None]
        scene, slot = torch.nonzero(present, as_tuple=True)
        drawing = torch.multinomial(self.weights, len(scene), replacement=True, generator=generator)
        views = self.views(count[scene], slot, generator)
        # A single thing with a head sometimes wears something, as a second thing that goes where the head goes.
        dressed = (
            (count[scene] == 1) & self.wearer[drawing] & (torch.rand(len(scene), generator=generator) < DRESSED_SHARE)
        )
        choice = torch.randint(len(self.worn), (len(scene),), generator=generator)
        wears = self.worn[choice][dressed]
        order = torch.cat([torch.arange(len(scene)), torch.nonzero(dressed)[:, 0] + 0.5]).argsort()
        worn = torch.cat([torch.zeros(len(scene), dtype=torch.bool), torch.ones(len(wears), dtype=torch.bool)])[order]
        people = individuals_.invent(self.colours, torch.cat([drawing, wears])[order], generator)
        people = dataclasses.replace(people, **self._worn_shapes(people, worn))
        hung = self._worn_views(views[dressed], drawing[dressed], wears)
        return Plan(
            things=people,
            views=Views(
                *(torch.cat([getattr(views, f.name), getattr(hung, f.name)])[order] for f in dataclasses.fields(Views))
            ),
            scene=torch.cat([scene, scene[dressed]])[order],
            slot=torch.cat([slot, slot[dressed] + 1])[order],
            worn=worn,
            backgrounds=places.invent(size, generator),
            styles=torch.multinomial(torch.tensor(_STYLE_SHARES), size, replacement=True, generator=generator),
        )

    @staticmethod
    def views(count: torch.Tensor, slot: torch.Tensor, generator: torch.Generator) -> Views:
        """Positions of things that share a scene with `count - 1` others: anywhere, the later ones further right."""

        def uniform(low: float = 0.0, high: float = 1.0) -> torch.Tensor:
            return low + (high - low) * torch.rand(len(count), generator=generator)

        alone = count == 1
        size = torch.where(alone, uniform(28, 60), torch.where(count == 2, uniform(24, 40), uniform(20, 30)))
        cut = uniform() < 0.12
        room = ((PIXELS - size) / 2 + 1).clamp(min=0) + torch.where(cut, 0.22 * size, 0.0)
        middle = PIXELS * (slot + 0.5) / count
        spread = torch.where(alone, room, torch.where(count == 2, 8.0, 5.0))
        x = torch.where(alone, PIXELS / 2, middle) + spread * uniform(-1, 1)
        # Things stand on the ground more often than they hang in the air.
        y = PIXELS / 2 + room * torch.maximum(uniform(-1, 1), uniform(-1, 1))
        turn = 0.12 * torch.randn(len(count), generator=generator)
        return Views(torch.stack([x, y], -1), size, turn, uniform() < 0.5)

    @staticmethod
    def _worn_shapes(people: Individuals, worn: torch.Tensor) -> dict[str, torch.Tensor]:
        """Wearers and what they wear are not bent, so that a hat sits where the head ends."""
        stiff = worn | torch.cat([worn[1:], torch.zeros(1, dtype=torch.bool)]) if len(worn) else worn
        return {
            "stretch": torch.where(stiff[:, None], 1.0, people.stretch),
            "skew": torch.where(stiff, 0.0, people.skew),
            "warp": torch.where(stiff[:, None, None, None], 0.0, people.warp),
        }

    def _worn_views(self, wearer: Views, drawing: torch.Tensor, wears: torch.Tensor) -> Views:
        """Where things hang that `wearer`s of given drawings wear."""
        eyes = self.on_eyes[wears]
        share = torch.where(eyes, 0.72, 0.56)
        # From the wearer's middle: a hat's lower edge a little below the top of the head, glasses on the eyes.
        up = torch.where(eyes, 0.04, -self.top[drawing] + 0.5 * share * 0.72 - 0.09)
        offset = up * wearer.size
        across, down = offset * wearer.turn.sin(), -offset * wearer.turn.cos()
        return Views(wearer.centre + torch.stack([across, down], -1), wearer.size * share, wearer.turn, wearer.flipped)


class World:
    """The drawn world on one device.

    Args:
        atlas: the drawings, taken apart.
        bank: pictures of the places, `places.bank()`; its size is that of the scenes.
        device: where pictures are made.
    """

    def __init__(self, atlas: things.Atlas, bank: places.Bank, device: torch.device | str = "cpu") -> None:
        self.atlas = atlas
        self.planner = Planner(atlas)
        self.bank = bank.to(device)
        self.device = torch.device(device)
        self.coverages = torch.from_numpy(np.array(atlas.coverages)).to(device)

    def scenes(self, seed: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures and masks of the planner's scenes number `step * size` and on (see `draw`)."""
        return self.draw(self.planner.plan(seed, step, size))

    def paint(self, people: Individuals) -> torch.Tensor:
        """`individuals.paint` with the world's drawings, on its device."""
        return individuals_.paint(self.coverages, people.to(self.device))

    def draw(self, plan: Plan, painted: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw scenes.

        Args:
            plan: what they show.
            painted: its things as of `paint`, if they are painted already, or are drawings that cannot be taken apart.

        Returns:
            float [batch, 3, pixels, pixels] in [-1, 1]; and float [batch, SLOTS, pixels, pixels], how much of a pixel
            each thing covers, what is in front of it taken off.
        """
        size, pixels = len(plan.styles), self.bank.pixels
        canvas = self.bank.draw(plan.backgrounds.to(self.device))
        masks = torch.zeros(size, SLOTS, pixels, pixels, device=self.device)
        people, views = plan.things.to(self.device), plan.views.to(self.device)
        layers = place(self.paint(people) if painted is None else painted.to(self.device), people, views, pixels)
        for number in range(SLOTS):
            mine = plan.slot == number
            where, layer = plan.scene[mine].to(self.device), layers[mine.to(self.device)]
            alpha = layer[:, 3:]
            canvas[where] = canvas[where] * (1 - alpha) + layer[:, :3]
            masks[where] *= 1 - alpha
            masks[where, number] = alpha[:, 0]
        return apply_styles(canvas, plan.styles.to(self.device)) * 2 - 1, masks


def _top(coverages: np.ndarray) -> np.float32:
    """Where a drawing's middle third ends above, from its centre, in sides of its square: float in [-0.5, 0.5]."""
    side = coverages.shape[-1]
    middle = coverages[:, :, side // 3 : -(side // 3)].sum(0, dtype=np.int32).max(1) > 127
    return np.float32(np.argmax(middle) / side - 0.5) if middle.any() else np.float32(0)


def place(painted: torch.Tensor, people: Individuals, views: Views, pixels: int = PIXELS) -> torch.Tensor:
    """Bend, stretch, turn and scale painted individuals into pictures of the scene's size.

    Args:
        painted: float [count, 4, side, side], `individuals.paint`.
        people, views: what bends them, and where they stand, in units of which a scene is PIXELS wide.
        pixels: side of the result.

    Returns:
        float [count, 4, pixels, pixels], premultiplied RGBA.
    """
    device = painted.device
    fine = 2 * pixels  # drawn at twice the size and halved: soft edges
    line = (torch.arange(fine, device=device) + 0.5) * (PIXELS / fine)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack([columns, rows], -1)[None] - views.centre[:, None, None]
    # From the scene's pixels back to the drawing's square, which is 1 wide.
    cos, sin = views.turn.cos()[:, None, None], views.turn.sin()[:, None, None]
    x = points[..., 0] * cos + points[..., 1] * sin
    y = points[..., 1] * cos - points[..., 0] * sin
    # The longer side keeps its size.
    stretch = people.stretch / people.stretch.amax(1, keepdim=True)
    y = y / (views.size * stretch[:, 1])[:, None, None]
    x = x / (views.size * stretch[:, 0])[:, None, None] + people.skew[:, None, None] * y
    x = torch.where(views.flipped[:, None, None], -x, x)
    grid = torch.stack([x, y], -1) * (2 * 12 / 14)  # the margin is outside the square
    if people.warp.abs().max() > 0:
        bend = functional.grid_sample(people.warp, grid, mode="bilinear", padding_mode="border", align_corners=True)
        grid = grid + 2 * bend.permute(0, 2, 3, 1)
    layer = functional.grid_sample(painted, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return functional.avg_pool2d(layer, 2)


def apply_styles(pictures: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
    """Pictures float [batch, 3, side, side] in [0, 1] in their styles (int [batch], index in STYLES)."""
    result = pictures.clamp(0, 1)
    luma = torch.tensor([0.299, 0.587, 0.114], device=pictures.device)[None, :, None, None]
    for number, style in enumerate(STYLES):
        (some,) = torch.nonzero(styles == number, as_tuple=True)
        if not style or not len(some):
            continue
        chosen = result[some]
        grey = (chosen * luma).sum(1, keepdim=True)
        if style == "black and white":
            chosen = grey.expand_as(chosen)
        elif style == "pencil sketch":
            across = functional.pad(grey, (1, 1, 1, 1), mode="replicate")
            steep = torch.hypot(
                across[..., 1:-1, 2:] - across[..., 1:-1, :-2], across[..., 2:, 1:-1] - across[..., :-2, 1:-1]
            )
            chosen = (0.98 - 1.2 * steep.clamp(max=0.72)).expand_as(chosen)
        result = result.index_copy(0, some, chosen)
    return result
