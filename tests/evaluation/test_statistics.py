"""Intervals and fronts against values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from perfusion_jax.evaluation.statistics import area, area_difference, dominated_area, estimate


def test_an_interval_is_that_of_scipy():
    values = np.random.default_rng(1).normal(0.6, 0.1, 12)
    mean, low, high = estimate(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    assert estimate(values) == (mean, low, high)  # seeded


def test_of_one_concept_nothing_is_known_of_others():
    assert estimate([0.4]) == (0.4, 0.4, 0.4)


def test_the_area_of_a_front():
    assert dominated_area(np.array([(0.5, 0.5)])) == pytest.approx(0.25)
    # Two steps of a stair, a point under it, and some that are worse than the corner.
    points = np.array([(0.2, 0.8), (0.6, 0.4), (0.3, 0.3), (-1.0, 2.0), (0.9, -0.1)])
    expected = 0.2 * 0.8 + 0.4 * 0.4
    assert dominated_area(points) == pytest.approx(expected)
    np.testing.assert_allclose(dominated_area(np.stack([points, points / 2])), [expected, expected / 4])
    assert dominated_area(-np.abs(points)) == 0
    assert dominated_area(np.zeros((0, 2))) == 0


def test_an_area_and_its_interval_are_over_concepts():
    rng = np.random.default_rng(2)
    scores = np.stack([rng.uniform(0.2, 0.8, (9, 4)), rng.uniform(0.2, 0.8, (9, 4))], axis=-1)
    found = area(scores)
    # Resampled by hand.
    chosen = rng.integers(9, size=(20_000, 9))
    resampled = [dominated_area(scores[rows].mean(axis=0)) for rows in chosen]
    assert found.mean == pytest.approx(dominated_area(scores.mean(axis=0)))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.004)
    assert area(scores[:1]).low == pytest.approx(area(scores[:1]).high)  # of one concept nothing is known of others
    # Of a method that is better by the same for each concept, the lead is certain, though the areas are not.
    lead = area_difference(scores + np.array([0.1, 0.0]), scores)
    assert 0 < lead.low <= lead.mean <= lead.high
    assert lead.high - lead.low < 0.5 * (found.high - found.low)
    assert area_difference(scores, scores) == (0, 0, 0)
