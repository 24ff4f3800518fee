"""Codes of individuals: what a proper name would be, for endlessly many of them.

Personalisation moves the encoding and the values of one token. It can only draw individuals that some value at the
noun's position draws. So in training a small network looks at another picture of an individual and says a code, which
stands as one more token before the noun or is added to the noun's embedding: "a photo of a [code] dog". The UNet mostly
cannot see the code's own token, so the noun's encoding has to carry the individual. The network is trained with the
text encoder and the UNet and is thrown away afterwards; what stays is a text encoder and a UNet for which a point near
the noun is an individual of its kind.
"""

import torch
from torch.nn import functional

from pretraining import scenes
from pretraining.individuals import Individuals

CODE_SIDE = scenes.PIXELS
"""Side of the pictures that codes are read from."""


class Coder(torch.nn.Module):
    """Reads a code from a picture of an individual alone.

    Args:
        context_width: width of the text encoder's token embeddings.
        code_width: numbers that an individual is told in.
        noise: deviation of what is added to these numbers, whose own deviation is one, in training: near codes then
            mean near individuals.
    """

    def __init__(self, context_width: int, code_width: int, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.looks = torch.nn.Sequential(
            torch.nn.Conv2d(4, 32, 4, 2, 1),
            torch.nn.SiLU(),
            torch.nn.Conv2d(32, 64, 4, 2, 1),
            torch.nn.SiLU(),
            torch.nn.Conv2d(64, 128, 4, 2, 1),
            torch.nn.GroupNorm(8, 128),
            torch.nn.SiLU(),
            torch.nn.Conv2d(128, 128, 3, 1, 1),
            torch.nn.GroupNorm(8, 128),
            torch.nn.SiLU(),
            torch.nn.Conv2d(128, 16, 1),
        )
        self.says = torch.nn.Linear(16 * (CODE_SIDE // 8) ** 2, code_width)
        self.prefix = torch.nn.Linear(code_width, context_width)
        self.added = torch.nn.Linear(code_width, context_width)

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Token embeddings of codes.

        Args:
            pictures: float [count, 4, CODE_SIDE, CODE_SIDE], premultiplied RGBA in [0, 1].
            noise: float [count, code_width], of unit deviation.
            added: bool [count], whether the code is to be added to a noun's embedding or to stand alone.

        Returns:
            float [count, context_width].
        """
        code = self.says(self.looks(2 * pictures - 1).flatten(1))
        code = functional.layer_norm(code, code.shape[-1:]) + self.noise * noise
        return torch.where(added[:, None], self.added(code), self.prefix(code))


def code_pictures(painted: torch.Tensor, people: Individuals, generator: torch.Generator) -> torch.Tensor:
    """Pictures for codes: uint8 [count, 4, CODE_SIDE, CODE_SIDE], premultiplied RGBA.

    Each shows its individual alone, in a place and a size of its own, so that a code cannot tell where the individual
    stands in the scene.

    Args:
        painted: float [count, 4, side, side], of `individuals.paint`.
        people: the individuals.
        generator: on the CPU.
    """
    count = len(painted)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    views = scenes.Views(
        centre=CODE_SIDE / 2 + torch.stack([uniform(-4, 4), uniform(-4, 4)], -1),
        size=uniform(46, 58),
        turn=0.1 * torch.randn(count, generator=generator),
        flipped=uniform(0, 1) < 0.5,
    )
    shown = scenes.place(painted, people, views.to(painted.device))
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8)
