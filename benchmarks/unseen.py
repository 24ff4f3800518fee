"""Example concepts, and pictures of them where their own pictures do not show them, with scores; for benchmarks."""

import json

import numpy as np
from etils import epath

from perfusion_jax.base_model import BaseModel
from perfusion_jax.base_model.clip import Clip
from perfusion_jax.config import make_config
from perfusion_jax.data.folders import read_folder
from perfusion_jax.drawing.generation import generate
from perfusion_jax.formats.concept_file import TrainedConcept, load_concept
from perfusion_jax.learning.metrics import Evaluator, Scores, score_pictures
from perfusion_jax.learning.runs import train_one
from perfusion_jax.runtime import shipped

PLACES = ("on the beach", "in the snow", "at night", "under water", "in the city", "in the forest")


def example_concept(base: BaseModel, name: str, workdir: epath.Path, **changes: object) -> TrainedConcept:
    """Learns an example that ships, unless `workdir` holds it already.

    Args:
        base: the embedded model.
        name: of the example.
        workdir: of the run.
        changes: of the default config.
    """
    facts = json.loads((shipped.EXAMPLES / name / "concept.json").read_text())
    config = make_config()
    config.update(name=name, super_category=facts["super_category"], pictures=f"emoji:{name}", **changes)
    return load_concept(train_one(config, workdir), base)


def own_pictures(name: str) -> np.ndarray:
    """The pictures that an example is learnt from, uint8 [count, height, width, 3]."""
    return np.stack([picture.pixels for picture in read_folder(shipped.EXAMPLES / name)])


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
    own = own_pictures(card.name)
    prompts = [f"a photo of a {{}} {place}" for place in PLACES for _ in range(seeds)]
    named, plain = ([p.replace("{}", word) for p in prompts] for word in (card.placeholder, card.super_category))
    drawn = generate(base, named, range(len(named)), [trained], **controls)
    evaluator = Evaluator(clip)
    return drawn, own, score_pictures(evaluator, drawn, plain, evaluator.embed_instances(own)).mean
