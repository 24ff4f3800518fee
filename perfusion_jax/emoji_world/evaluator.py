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


class Judge:
    """Answers by zero-shot classification.

    Args:
        embed_images: function from uint8 [images, 64, 64, 3] to unit vectors, float [images, width].
        embed_texts: function from a list of texts to unit vectors, float [texts, width].
    """

    def __init__(
        self, embed_images: Callable[[np.ndarray], np.ndarray], embed_texts: Callable[[list[str]], np.ndarray]
    ) -> None:
        self.embed_images = embed_images
        self.categories = class_embeddings(embed_texts, [category_prompts(name) for name in catalogue.CATEGORIES])
        self.places = class_embeddings(embed_texts, [place_prompts(name) for name in catalogue.PLACES])

    def find_categories(self, images: np.ndarray, count: int = 1) -> list[set[str]]:
        """The `count` categories that each picture, uint8 [images, 64, 64, 3], resembles most."""
        ranks = np.argsort(-(self.embed_images(images) @ self.categories.T), axis=1)[:, :count]
        return [{catalogue.CATEGORIES[index] for index in row} for row in ranks]

    def find_places(self, images: np.ndarray) -> list[str]:
        """The place that each picture, uint8 [images, 64, 64, 3], resembles most."""
        return [catalogue.PLACES[index] for index in np.argmax(self.embed_images(images) @ self.places.T, axis=1)]


def share_right(answers: Sequence[object], expected: Sequence[object]) -> float:
    """Share of answers that are what was expected."""
    return float(np.mean([answer == wanted for answer, wanted in zip(answers, expected, strict=True)]))


def class_embeddings(
    embed_texts: Callable[[list[str]], np.ndarray], prompts_of_classes: Sequence[list[str]]
) -> np.ndarray:
    """One unit vector a class, the normalised mean of its prompts' embeddings: float [classes, width]."""
    means = np.stack([np.asarray(embed_texts(prompts)).mean(axis=0) for prompts in prompts_of_classes])
    return means / np.linalg.norm(means, axis=1, keepdims=True)
