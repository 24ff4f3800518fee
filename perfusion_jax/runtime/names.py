"""How prompts call concepts, and configs call datasets."""

import re

PLACEHOLDER = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_-]*>")
"""The token that stands for a concept in a prompt, `<name>`."""

DATASET = "tfds:"
"""What the address of a dataset of pictures begins with, `tfds:FOLDER#NAME`."""
