"""How prompts call concepts."""

import re

PLACEHOLDER = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_-]*>")
"""The token that stands for a concept in a prompt, `<name>`."""
