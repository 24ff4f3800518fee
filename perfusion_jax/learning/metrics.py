"""How well pictures show a concept and follow their prompts, by encoders that are not the model's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from perfusion_jax.base_model.clip import Clip
from perfusion_jax.base_model.instance import InstanceEncoder
from perfusion_jax.method.surgery import Params


@dataclass(frozen=True, eq=False)
class Evaluator:
    """What pictures are judged by.

    Attributes:
        clip: compares pictures with texts.
        instance: compares pictures with pictures (DINO's part in DreamBench, arXiv 2208.12242); None: the CLIP does.
    """

    clip: Clip
    instance: InstanceEncoder | None = None

    @property
    def params(self) -> list[Params]:
        """The weights of all encoders."""
        return [encoder.params for encoder in (self.clip, self.instance) if encoder is not None]

    def embed_instances(self, pictures: np.ndarray) -> np.ndarray:
        """Embeds pictures, uint8 [count, height, width, 3], by which individual they show: float32 [count, width]."""
        return (self.instance or self.clip).images(pictures)


class Scores(NamedTuple):
    """Means over pictures.

    Attributes:
        image: cosine with the concept's own pictures, by the instance encoder, or by the CLIP where there is none.
        text: cosine with the prompt, with the super-category's word in place of the concept (CLIP-T).
        precision: how surely the picture goes with its own prompt and not with another of those that were drawn: the
            softmax probability at the evaluator's own scale (a soft R-precision: Park et al. 2021, "Benchmark for
            compositional text-to-image synthesis").
    """

    image: float
    text: float
    precision: float

    @property
    def score(self) -> float:
        """Harmonic mean of `image` and `precision`: what chooses the step that is kept. 0 if either is not positive.

        Not of `text`: it falls as the concept becomes itself and less of a common thing of its kind (a teddy bear's own
        pictures have less in common with "a photo of a bear" than with most captions), so that it would choose a step
        at which the concept has hardly been learnt. All prompts have the super-category's word in common, so it plays
        no part in telling them apart.
        """
        return 0.0 if min(self.image, self.precision) <= 0 else 2 / (1 / self.image + 1 / self.precision)

    @property
    def facts(self) -> dict[str, float]:
        """The numbers under the names that logs and reports give them."""
        return {
            "image_similarity": self.image,
            "text_similarity": self.text,
            "prompt_precision": self.precision,
            "score": self.score,
        }


class PictureScores(NamedTuple):
    """What `Scores` are the means of, float64 [count] each."""

    image: np.ndarray
    text: np.ndarray
    precision: np.ndarray

    @property
    def mean(self) -> Scores:
        """Their means."""
        return Scores(*(float(values.mean()) for values in self))


def score_pictures(
    evaluator: Evaluator, pictures: np.ndarray, prompts: Sequence[str], own: np.ndarray
) -> PictureScores:
    """Measures drawn pictures.

    Args:
        evaluator: what they are judged by.
        pictures: uint8 [count, height, width, 3].
        prompts: what each should show, with the super-category's word where the concept was named.
        own: the concept's own pictures as `Evaluator.embed_instances` gives them, float32 [any, width].
    """
    image = (evaluator.embed_instances(pictures) @ own.T).astype(np.float64).mean(axis=1)
    clip = evaluator.clip
    distinct = list(dict.fromkeys(prompts))
    cosines = (clip.images(pictures) @ clip.texts(distinct).T).astype(np.float64)
    asked = np.arange(len(prompts)), np.array([distinct.index(prompt) for prompt in prompts])
    odds = np.exp(clip.logit_scale * (cosines - cosines.max(axis=1, keepdims=True)))
    return PictureScores(image, cosines[asked], (odds / odds.sum(axis=1, keepdims=True))[asked])
