"""Intervals and fronts against values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from perfusion_jax.evaluation.statistics import dominated_area, estimate


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
    assert dominated_area([(0.5, 0.5)], (0, 0)) == pytest.approx(0.25)
    # Two steps of a stair, a point under it, and one that is worse than the corner.
    points = [(0.2, 0.8), (0.6, 0.4), (0.3, 0.3), (-1.0, 2.0)]
    assert dominated_area(points, (0, 0)) == pytest.approx(0.2 * 0.8 + 0.4 * 0.4)
    assert dominated_area(points, (0.2, 0.1)) == pytest.approx(0.4 * 0.3)
    assert dominated_area([], (0, 0)) == 0
