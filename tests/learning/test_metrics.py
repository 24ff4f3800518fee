"""Scores with a made-up evaluator whose embeddings are known."""

import numpy as np
import pytest

from perfusion_jax.learning.metrics import Evaluator, Scores, score_pictures

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


class Colours:
    """Embeds a picture by its first pixel's colour, and a text by the colour it names."""

    logit_scale = np.log(3)

    def images(self, pixels):
        colours = pixels[:, 0, 0].astype(float)
        return colours / np.linalg.norm(colours, axis=1, keepdims=True)

    def texts(self, texts):
        return np.array([COLOURS[text] for text in texts], float)


def plain(*colours):
    return np.array(colours, np.uint8)[:, None, None]


def test_cosines_with_the_own_pictures_and_with_the_prompts():
    drawn = plain((255, 0, 0), (0, 200, 0))
    own = plain((255, 0, 0), (0, 0, 9))
    evaluator = Evaluator(Colours())
    scores = score_pictures(evaluator, drawn, ["red", "blue"], evaluator.embed_instances(own)).mean
    # Red is three times as likely as blue for the first picture; the second is as much the one as the other.
    assert scores == pytest.approx((0.25, 0.5, (0.75 + 0.5) / 2))
    assert score_pictures(evaluator, drawn, ["red", "red"], evaluator.embed_instances(own)).mean.precision == 1


def test_an_instance_encoder_compares_pictures_and_the_clip_still_compares_texts():
    class Opposite(Colours):
        def images(self, pixels):
            return -super().images(255 - pixels)

        params = "its weights"

    drawn = plain((255, 0, 0))
    evaluator = Evaluator(Colours(), Opposite())
    scores = score_pictures(evaluator, drawn, ["red"], -np.array([[0, 1, 1]]) / np.sqrt(2)).mean
    assert scores == pytest.approx((1, 1, 1))


def test_the_score_wants_both_the_concept_and_the_prompt():
    assert Scores(-0.1, 0.9, 0.9).score == 0
    assert Scores(0.5, -0.9, 0.5).score == pytest.approx(0.5)
    assert Scores(0.25, 0.0, 0.75).score == pytest.approx(0.375)
