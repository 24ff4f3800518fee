"""Questions put to the evaluator CLIP: which category, which place is in the picture?

The evaluator is a small CLIP of its own, trained on rendered scenes only. It shares nothing with the model it judges.
"""

from collections.abc import Callable, Sequence

import numpy as np

from perfusion_jax.emoji_world import captions, catalogue


def category_prompts(category: str) -> list[str]:
    """Captions that name `category` in every place, and in none: their mean embedding stands for the category."""
    phrase = captions.noun_phrase(category)
    endings = ["", *(f" {captions.place_phrase(place)}" for place in catalogue.PLACES)]
    return [f"a photo of {phrase}{ending}" for ending in endings]


def place_prompts(place: str) -> list[str]:
    """Captions of every category at `place`: their mean embedding stands for the place."""
    ending = captions.place_phrase(place)
    return [f"a photo of {captions.noun_phrase(category)} {ending}" for category in catalogue.CATEGORIES]


def class_embeddings(
    embed_texts: Callable[[list[str]], np.ndarray], prompts_of_classes: Sequence[list[str]]
) -> np.ndarray:
    """One unit vector a class: the normalised mean of its prompts' embeddings.

    Args:
        embed_texts: function from a list of texts to unit vectors, float [texts, width].
        prompts_of_classes: list of lists of texts.

    Returns:
        float array [classes, width].
    """
    means = np.stack([np.asarray(embed_texts(prompts)).mean(axis=0) for prompts in prompts_of_classes])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def rank_classes(image_embeddings: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Classes of each picture from the most to the least similar: int array [images, classes]."""
    return np.argsort(-(np.asarray(image_embeddings) @ classes.T), axis=1)
