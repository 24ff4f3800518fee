"""Pictures of a kind that the frozen model draws, to be learnt beside a concept's own (prior preservation).

DreamBooth, arXiv 2208.12242, section 3.2.
"""

import threading
from collections.abc import Sequence

import numpy as np

from perfusion_jax.base_model import BaseModel, whole_sizes
from perfusion_jax.data.examples import PLACEHOLDER, Examples, encode, make_examples
from perfusion_jax.drawing.generation import generate
from perfusion_jax.runtime.errors import Stopped


def draw_prior(
    base: BaseModel,
    super_category: str,
    templates: Sequence[str],
    count: int,
    side: int,
    steps: int,
    guidance: float,
    cancelled: threading.Event,
) -> Examples:
    """Draws pictures of a kind, each to be learnt by the prompt that it is drawn by.

    They depend on the model and the arguments alone.

    Args:
        base: the model.
        super_category: the word or words for this kind of thing.
        templates: prompts with one `{}` each, in which it stands.
        count: of pictures.
        side: of them, in pixels.
        steps: of sampling.
        guidance: its scale.
        cancelled: set when they are not needed any more.

    Raises:
        Stopped: that was set while they were drawn.
    """

    def check() -> None:
        if cancelled.is_set():
            raise Stopped

    prompts = [templates[number % len(templates)].replace("{}", super_category) for number in range(count)]
    pixels = generate(
        base, prompts, range(count), steps=steps, guidance=guidance, height=side, width=side, on_step=check
    )
    latents = encode(base, pixels)
    sizes = np.tile(whole_sizes(side, side), (count, 1))
    ids = np.repeat(base.model.tokenizer(prompts, [PLACEHOLDER])[:, None], len(templates), axis=1)
    return make_examples(latents, np.ones(latents.mean.shape[:-1], np.float32), sizes, ids)
