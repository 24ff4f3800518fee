"""Pictures for the model card of an export, drawn as the export draws."""

from collections.abc import Sequence

from perfusion_jax.base_model import BaseModel
from perfusion_jax.drawing.generation import generate
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.formats.model_card import SCENES, Example, prompt_for


def draw_examples(
    base: BaseModel, concepts: Sequence[TrainedConcept], strengths: Sequence[float], edit: str, count: int
) -> list[Example]:
    """Draws concepts together, each picture in another scene.

    Args:
        base: the model that they were trained on.
        concepts: at least one.
        strengths: of each, where the edit is baked; 1 if left out.
        edit: `baked`, `gated`, or `none` for the words alone.
        count: of pictures.
    """
    if not count:
        return []
    cards = [card for _, card in concepts]
    prompts = [prompt_for(cards, SCENES[number % len(SCENES)]) for number in range(count)]
    if edit == "baked":
        base = base.baked([concept for concept, _ in concepts], strengths or [1.0] * len(concepts))
    pictures = generate(base, prompts, range(count), concepts, strength=float(edit == "gated"))
    return [Example(prompt, pixels) for prompt, pixels in zip(prompts, pictures, strict=True)]
