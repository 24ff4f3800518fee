"""Endless individuals of each drawing: its parts in other colours, its shape a little different, outlined or shaded.

All in PyTorch on batches, so that the same code keeps up with a training on CPU cores and on an accelerator.
"""

import dataclasses

import torch
from torch.nn import functional

WARP_GRID = 4
"""Knots along each side of the smooth displacement that bends a shape."""


@dataclasses.dataclass(frozen=True)
class Individuals:
    """What makes `count` individuals, apart from where they stand.

    Attributes:
        drawing: int [count], index in the atlas.
        colours: float [count, parts, 3], sRGB in [0, 1].
        stretch: float [count, 2], factors of width and height.
        skew: float [count], shift to the right at the top, in heights.
        warp: float [count, 2, WARP_GRID, WARP_GRID], displacement in sides of the drawing.
        outline: float [count, 4], thickness in sides of the drawing (0: none) and sRGB colour.
        shade: float [count, 5], strength of the light from above (0: flat), its direction x and y, gloss, darker rim.
    """

    drawing: torch.Tensor
    colours: torch.Tensor
    stretch: torch.Tensor
    skew: torch.Tensor
    warp: torch.Tensor
    outline: torch.Tensor
    shade: torch.Tensor

    def __len__(self) -> int:
        """How many there are."""
        return len(self.drawing)

    def __getitem__(self, index: torch.Tensor) -> "Individuals":
        """The chosen ones."""
        return Individuals(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def to(self, device: torch.device | str) -> "Individuals":
        """The same on another device."""
        return Individuals(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


def rgb_to_hsv(rgb: torch.Tensor) -> torch.Tensor:
    """Hue in turns, saturation and value of sRGB colours [..., 3] in [0, 1]."""
    largest, smallest = rgb.amax(-1), rgb.amin(-1)
    spread = largest - smallest
    red, green, blue = rgb.unbind(-1)
    safe = spread.clamp(min=1e-6)
    hue = torch.where(
        largest == red,
        ((green - blue) / safe) % 6,
        torch.where(largest == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return torch.stack([hue / 6 * (spread > 0), spread / largest.clamp(min=1e-6), largest], -1)


def hsv_to_rgb(hsv: torch.Tensor) -> torch.Tensor:
    """The inverse of `rgb_to_hsv`."""
    hue, saturation, value = hsv.unbind(-1)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=hsv.device)
    k = (offsets + hue[..., None] * 6) % 6
    fall = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * fall)


def invent(colours: torch.Tensor, drawing: torch.Tensor, generator: torch.Generator) -> Individuals:
    """Individuals of given drawings.

    Half keep the drawing's colours nearly, as things that people own do; in a quarter all hues turn together; in a
    quarter each part has its own shift, up to colours that have nothing to do with the drawing's. Shapes vary always.

    Args:
        colours: float [drawings, parts, 3], the atlas's.
        drawing: int [count].
        generator: on the CPU; the source of all randomness.
    """
    count, parts = len(drawing), colours.shape[1]

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def normal(*shape: int, deviation: float) -> torch.Tensor:
        return deviation * torch.randn(shape, generator=generator)

    hsv = rgb_to_hsv(colours[drawing])
    way = uniform(count, 1)
    together, apart = (way > 0.5).float(), (way > 0.75).float()
    wild = apart * (uniform(count, 1) < 0.35).float()
    hue = hsv[..., 0] + normal(count, 1, deviation=0.015)
    hue = hue + together * uniform(count, 1, low=-0.5, high=0.5) * (1 - apart * (uniform(count, 1) < 0.5))
    hue = hue + apart * normal(count, parts, deviation=0.09)
    saturation = hsv[..., 1] * (1 + normal(count, 1, deviation=0.08))
    saturation = (
        saturation
        * (1 + apart * normal(count, parts, deviation=0.3))
        * (1 - together * (uniform(count, 1) < 0.15) * uniform(count, 1, low=0.3, high=1.0))
    )
    value = hsv[..., 2] + normal(count, 1, deviation=0.03)
    value = value + together * normal(count, 1, deviation=0.08) + apart * normal(count, parts, deviation=0.12)
    fresh = wild * (uniform(count, parts) < 0.5).float()
    hue = torch.where(fresh > 0, uniform(count, parts), hue)
    saturation = torch.where(fresh > 0, uniform(count, parts).sqrt(), saturation)
    value = torch.where(fresh > 0, uniform(count, parts, low=0.1), value)
    varied = hsv_to_rgb(torch.stack([hue % 1, saturation.clamp(0, 1), value.clamp(0, 1)], -1))

    outlined = (uniform(count, 1) < 0.15).float()
    dark = (uniform(count, 1) < 0.7).float()
    line = dark * uniform(count, 3, high=0.25) + (1 - dark) * uniform(count, 3)
    shaded = (uniform(count, 1) < 0.4).float()
    angle = normal(count, 1, deviation=0.7)
    shade = torch.cat(
        [
            shaded * uniform(count, 1, low=0.15, high=0.6),
            angle.sin(),
            -angle.cos(),
            shaded * uniform(count, 1) * (uniform(count, 1) < 0.6),
            shaded * uniform(count, 1, high=0.6) * (uniform(count, 1) < 0.5),
        ],
        -1,
    )
    return Individuals(
        drawing=drawing,
        colours=varied,
        stretch=normal(count, 2, deviation=0.09).exp(),
        skew=normal(count, deviation=0.07),
        warp=normal(count, 2, WARP_GRID, WARP_GRID, deviation=0.018),
        outline=torch.cat([outlined * uniform(count, 1, low=0.012, high=0.03), line], -1),
        shade=shade,
    )


def replaced(people: Individuals, index: torch.Tensor, others: Individuals) -> Individuals:
    """People of whom those at `index` are `others`."""
    fields = [field.name for field in dataclasses.fields(Individuals)]
    return Individuals(*(getattr(people, name).index_copy(0, index, getattr(others, name)) for name in fields))


def faithful(colours: torch.Tensor, drawing: torch.Tensor) -> Individuals:
    """Drawings as their vendors drew them. Arguments as of `invent`."""
    count = len(drawing)
    zeros = torch.zeros
    return Individuals(
        drawing=drawing,
        colours=colours[drawing],
        stretch=torch.ones(count, 2),
        skew=zeros(count),
        warp=zeros(count, 2, WARP_GRID, WARP_GRID),
        outline=zeros(count, 4),
        shade=zeros(count, 5),
    )


def paint(coverages: torch.Tensor, individuals: Individuals) -> torch.Tensor:
    """Pictures of individuals, upright and unbent, with a margin: float [count, 4, side, side], premultiplied RGBA in
    [0, 1].

    Args:
        coverages: uint8 [drawings, parts, pixels, pixels], the atlas's; side is pixels and a twelfth of it on each
            side.
        individuals: on the same device.
    """
    weights = coverages[individuals.drawing].float() / 255
    colour = torch.einsum("nphw,npc->nchw", weights, individuals.colours)
    return finish(torch.cat([colour, weights.sum(1, keepdim=True)], 1).clamp(0, 1), individuals)


def finish(pictures: torch.Tensor, individuals: Individuals) -> torch.Tensor:
    """Shade and outline premultiplied RGBA pictures [count, 4, pixels, pixels], with a margin as of `paint`."""
    pixels = pictures.shape[-1]
    pictures = _shade(functional.pad(pictures, (pixels // 12,) * 4), individuals.shade)
    return _outline(pictures, individuals.outline, pixels)


def _shade(pictures: torch.Tensor, shade: torch.Tensor) -> torch.Tensor:
    """Light from one side, a glossy spot, and darkness towards the rim: of those pictures alone that have any."""
    (some,) = torch.nonzero(shade[:, 0] > 0, as_tuple=True)
    if not len(some):
        return pictures
    chosen, (strength, x, y, gloss, rim) = pictures[some], shade[some].T[:, :, None, None, None]
    line = torch.linspace(-1, 1, pictures.shape[-1], device=pictures.device)
    along = x * line[None, None, None, :] + y * line[None, None, :, None]
    colour, alpha = chosen[:, :3], chosen[:, 3:]
    light = (1 + strength * along).clamp(min=0)
    inside = functional.avg_pool2d(alpha, 13, 1, 6)
    light = light * (1 - rim * (1 - inside).clamp(0, 1))
    lit = torch.minimum(colour * light, alpha)
    spot = (-((line[None, None, None, :] - 0.3 * x) ** 2 + (line[None, None, :, None] - 0.4 * y) ** 2) / 0.06).exp()
    lit = lit + 0.6 * gloss * spot * (alpha - lit)
    result = pictures.clone()
    result[some] = torch.cat([lit, alpha], 1)
    return result


def _outline(pictures: torch.Tensor, outline: torch.Tensor, pixels: int) -> torch.Tensor:
    """Lay pictures over a thickened silhouette in the outline's colour: of those pictures alone that have one."""
    (some,) = torch.nonzero(outline[:, 0] > 0, as_tuple=True)
    if not len(some):
        return pictures
    result, chosen = pictures.clone(), pictures[some]
    radius = outline[some, :1, None, None] * pixels
    thick = [functional.max_pool2d(chosen[:, 3:], 2 * size + 1, 1, size) for size in (1, 2, 3)]
    silhouette = torch.where(radius < 1.5, thick[0], torch.where(radius < 2.5, thick[1], thick[2]))
    silhouette = functional.avg_pool2d(silhouette, 3, 1, 1)
    under = torch.cat([outline[some, 1:, None, None] * silhouette, silhouette], 1)
    result[some] = chosen + (1 - chosen[:, 3:]) * under
    return result
