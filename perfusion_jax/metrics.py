"""How well pictures show a concept and follow their prompts, by an evaluator CLIP (CLIP-I and CLIP-T)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from perfusion_jax.base_model.clip import Clip


class Similarities(NamedTuple):
    """Mean cosines: of pictures with the concept's own pictures, and of pictures with their prompts."""

    image: float
    text: float

    @property
    def harmonic_mean(self) -> float:
        """High only if both are: what chooses the step that is kept. 0 if either is not positive."""
        return 0.0 if min(self) <= 0 else 2 * self.image * self.text / (self.image + self.text)


def similarities(clip: Clip, pictures: np.ndarray, prompts: Sequence[str], own: np.ndarray) -> Similarities:
    """Measures drawn pictures.

    Args:
        clip: the evaluator.
        pictures: uint8 [count, height, width, 3].
        prompts: what each should show, with the super-category's word where the concept was named.
        own: the concept's own pictures, uint8 [any, height, width, 3].
    """
    drawn = clip.images(pictures)
    image = (drawn @ clip.images(own).T).mean()
    text = (drawn * clip.texts(prompts)).sum(axis=1).mean()
    return Similarities(float(image), float(text))
