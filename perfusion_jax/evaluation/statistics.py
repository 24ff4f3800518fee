"""Means with their intervals, and fronts. Concepts are the unit, not pictures: those of one concept are alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
COVERAGE = 0.95


class Estimate(NamedTuple):
    """A mean over concepts, and the ends of its bootstrap interval of COVERAGE."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value for each concept, with its percentile bootstrap interval (Efron 1979); seeded.

    Args:
        values: at least one. Of a single one the interval is the value: nothing is known of others.
    """
    array = np.asarray(values, np.float64)
    chosen = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(array[chosen].mean(axis=1), [tail, 1 - tail])
    return Estimate(float(array.mean()), float(low), float(high))


def dominated_area(points: Sequence[tuple[float, float]], worst: tuple[float, float]) -> float:
    """The area that a front dominates: of all that is above and right of `worst`, what some point is no worse than.

    Of two axes this is the hypervolume indicator (Zitzler and Thiele 1999).

    Args:
        points: two scores each, of which more is better.
        worst: the corner to measure from; points that are not above and right of it add nothing.
    """
    area, reached = 0.0, worst[1]
    for x, y in sorted(points, reverse=True):
        if x > worst[0] and y > reached:
            area += (x - worst[0]) * (y - reached)
            reached = y
    return area
