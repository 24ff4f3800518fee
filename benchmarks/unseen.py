"""Pictures of an example concept where its own pictures do not show it, and their scores; for other benchmarks."""

import numpy as np

from perfusion_jax.base_model import BaseModel
from perfusion_jax.base_model.clip import Clip
from perfusion_jax.data.folders import read_folder
from perfusion_jax.drawing.generation import generate
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.learning.metrics import Evaluator, Scores, score_pictures
from perfusion_jax.runtime import shipped

PLACES = ("on the beach", "in the snow", "at night", "under water", "in the city", "in the forest")


def draw_and_score(
    base: BaseModel, clip: Clip, trained: TrainedConcept, seeds: int, **controls: float
) -> tuple[np.ndarray, np.ndarray, Scores]:
    """Draws a concept in every place.

    Args:
        base: the embedded model.
        clip: its evaluator.
        trained: an example concept.
        seeds: pictures in each place.
        controls: of `generate`.

    Returns:
        (pictures, place by place; the concept's own pictures; their similarities).
    """
    card = trained.card
    own = np.stack([picture.pixels for picture in read_folder(shipped.EXAMPLES / card.name)])
    prompts = [f"a photo of a {{}} {place}" for place in PLACES for _ in range(seeds)]
    named, plain = ([p.replace("{}", word) for p in prompts] for word in (card.placeholder, card.super_category))
    drawn = generate(base, named, range(len(named)), [trained], **controls)
    evaluator = Evaluator(clip)
    return drawn, own, score_pictures(evaluator, drawn, plain, evaluator.embed_instances(own))
