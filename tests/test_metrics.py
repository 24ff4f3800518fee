"""Similarities with a made-up evaluator whose embeddings are known."""

import numpy as np
import pytest

from perfusion_jax.metrics import Similarities, similarities

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


class Evaluator:
    """Embeds a picture by its first pixel's colour, and a text by the colour it names."""

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
    scores = similarities(Evaluator(), drawn, ["red", "blue"], own)
    assert scores == pytest.approx((0.25, 0.5))
    assert scores.harmonic_mean == pytest.approx(1 / 3)


def test_the_harmonic_mean_wants_both():
    assert Similarities(0.9, -0.1).harmonic_mean == 0
    assert Similarities(0.5, 0.5).harmonic_mean == 0.5
