"""Pictures to look at while a concept is learnt, and their scores."""

from functools import cached_property

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from perfusion_jax.base_model import Architecture, BaseModel
from perfusion_jax.drawing.generation import generate
from perfusion_jax.drawing.grids import grid
from perfusion_jax.drawing.samplers import make_plan, sampler_and_steps
from perfusion_jax.formats.concept_file import TrainedConcept
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.metrics import Evaluator, Scores, score_pictures
from perfusion_jax.learning.workdir import make_card, phrase
from perfusion_jax.method.baselines import Learnt
from perfusion_jax.runtime.errors import InputError


def check_validation(config: ConfigDict, model: Architecture) -> None:
    """Makes sure, before anything is learnt, that the validation prompts can be drawn.

    Raises:
        InputError: one is too long, or the model's schedule has fewer steps than are to be taken.
    """
    placeholder = f"<{config.name}>"
    try:
        prompts = [prompt.replace("{}", phrase(config, placeholder)) for prompt in config.validation_prompts]
        model.tokenizer(prompts, [placeholder])
    except InputError as error:
        raise InputError(f"config.validation_prompts: {error}") from error
    try:
        make_plan(model.schedule, *sampler_and_steps(model.schedule, None, config.sampling_steps))
    except InputError as error:
        raise InputError(f"config.sampling_steps: {error}") from error


class Validation:
    """Sample grids and scores.

    Args:
        config: the run's.
        base: the model.
        evaluator: what pictures are scored by, or None.
        own: the concept's pictures, uint8 [count, side, side, 3].
        mesh: devices that share the drawing, as for `generation.drawing`.
    """

    def __init__(
        self,
        config: ConfigDict,
        base: BaseModel,
        evaluator: Evaluator | None,
        own: np.ndarray,
        mesh: Mesh | None = None,
    ):
        self._config, self._base, self._evaluator, self._own, self._mesh = config, base, evaluator, own, mesh

    @cached_property
    def _own_embeddings(self) -> np.ndarray:
        assert self._evaluator is not None
        return self._evaluator.embed_instances(self._own)

    def draw(self, concept: Learnt) -> tuple[np.ndarray, np.ndarray]:
        """Draws the validation prompts with fixed seeds.

        Returns:
            (pictures, uint8 [prompts, pictures_per_prompt, side, side, 3]; a grid of them with one row per prompt
            and the concept's own pictures on the left, uint8 [height, width, 3]).
        """
        config = self._config
        count = config.pictures_per_prompt
        card = make_card(config, self._base, step=0)
        prompts = [p.replace("{}", card.phrase) for p in config.validation_prompts for _ in range(count)]
        side = self._own.shape[1]
        devices = self._mesh.size if self._mesh is not None else 1
        drawn = generate(
            self._base,
            prompts,
            range(len(prompts)),
            [TrainedConcept(concept, card)],
            steps=config.sampling_steps,
            height=side,
            width=side,
            batch_size=-(-min(8, len(prompts)) // devices) * devices,
            mesh=self._mesh,
        ).reshape(-1, count, side, side, 3)
        rows = [np.concatenate([self._own[[row % len(self._own)]], pictures]) for row, pictures in enumerate(drawn)]
        return drawn, grid(rows)

    def score(self, drawn: np.ndarray) -> Scores | None:
        """Scores what `draw` drew, or None without an evaluator."""
        if self._evaluator is None:
            return None
        texts = [
            prompt.replace("{}", self._config.super_category)
            for prompt in self._config.validation_prompts
            for _ in range(drawn.shape[1])
        ]
        return score_pictures(self._evaluator, drawn.reshape(-1, *drawn.shape[2:]), texts, self._own_embeddings).mean


def show_masks(file: epath.Path, pixels: np.ndarray, masks: np.ndarray) -> None:
    """Writes the pictures, and under each how much the loss looks at each part of it.

    Args:
        file: where.
        pixels: uint8 [count, side, side, 3].
        masks: float32 [count, height, width], on the grid of latents.

    Raises:
        InputError, UnavailableError: it cannot be written.
    """
    side = pixels.shape[1]
    grown = masks.repeat(side // masks.shape[1], axis=1).repeat(side // masks.shape[2], axis=2)[..., None]
    shaded = (pixels * (0.15 + 0.85 * grown)).astype(np.uint8)
    write_picture(file, grid([pixels, shaded]))
