"""Intervals and fronts against values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from perfusion_jax.evaluation.statistics import area, area_difference, dominated_area, estimate


def expanded(count):
    """The share in each tail."""
    return stats.norm.sf(np.sqrt(count / (count - 1)) * stats.t.isf(0.025, count - 1))


def test_an_interval_is_that_of_scipy_further_out():
    values = np.random.default_rng(1).normal(0.6, 0.1, 12)
    mean, low, high = estimate(values)
    level = 1 - 2 * expanded(12)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=level, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    assert estimate(values) == (mean, low, high)  # seeded


def test_intervals_of_eight_concepts_hold_what_they_should():
    """In 95 of 100 cases; those that are not expanded do in 88."""
    assert expanded(8) == pytest.approx(0.0057, abs=1e-4)  # by tables: t is 2.365
    draws = np.random.default_rng(3).normal(0.5, 0.1, (600, 8))
    held = [low <= 0.5 <= high for _, low, high in map(estimate, draws)]
    assert 0.92 < np.mean(held) < 0.98


def test_of_few_concepts_there_is_no_interval():
    mean, low, high = estimate([0.4, 0.2])
    assert mean == pytest.approx(0.3)
    assert np.isnan([low, high]).all()


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
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(resampled, [expanded(9), 1 - expanded(9)])), abs=0.008
    )
    # Of a method that is better by the same for each concept, the lead is certain, though the areas are not.
    lead = area_difference(scores + np.array([0.1, 0.0]), scores)
    assert 0 < lead.low <= lead.mean <= lead.high
    assert lead.high - lead.low < 0.5 * (found.high - found.low)
    assert area_difference(scores, scores) == (0, 0, 0)
