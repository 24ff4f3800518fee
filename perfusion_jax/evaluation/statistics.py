"""Means with their intervals, and fronts. Concepts are the unit, not pictures: those of one concept are alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

RESAMPLES = 10_000
COVERAGE = 0.95
LEAST = 5  # concepts


class Estimate(NamedTuple):
    """A number over concepts, and the ends of its bootstrap interval of COVERAGE; NaN of fewer than LEAST concepts."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value for each concept, with its expanded percentile bootstrap interval; seeded.

    Of few concepts a percentile interval (Efron 1979) is too narrow, of eight by a fifth. The expanded one goes as far
    out as Student's t has it (Hesterberg, "What teachers should know about the bootstrap", 2015, section 4.3).

    Args:
        values: at least one. Of fewer than LEAST there is no interval: no mean of them is as far out as t.
    """
    array = np.asarray(values, np.float64)
    return _estimate(array.mean(), array[_resamples(len(array))].mean(axis=1), len(array))


def area(scores: Float[np.ndarray, "concepts settings 2"]) -> Estimate:
    """The area that the front of a method dominates, from 0, with its interval.

    Args:
        scores: two of each concept under each setting, of which more is better; the front is of the means over
            concepts.
    """
    return _estimate(dominated_area(scores.mean(axis=0)), _areas(scores), len(scores))


def area_difference(
    scores: Float[np.ndarray, "concepts settings 2"], others: Float[np.ndarray, "concepts other_settings 2"]
) -> Estimate:
    """By how much the area of one method is larger than that of another on the same concepts; as for `area`.

    The interval is of the difference: what makes concepts hard for both methods is no part of it.
    """
    difference = dominated_area(scores.mean(axis=0)) - dominated_area(others.mean(axis=0))
    return _estimate(difference, _areas(scores) - _areas(others), len(scores))


def dominated_area(points: Float[np.ndarray, "*many settings 2"]) -> Float[np.ndarray, "*many"]:
    """The area that fronts dominate: of all that is above and right of 0, what some point is no worse than.

    Of two axes this is the hypervolume indicator (Zitzler and Thiele 1999).

    Args:
        points: two scores each, of which more is better; points that are not above and right of 0 add nothing.
    """
    order = np.argsort(-points[..., 0], axis=-1)
    x, y = (np.take_along_axis(points[..., axis], order, axis=-1) for axis in (0, 1))
    reached = np.maximum.accumulate(np.where(x > 0, np.maximum(y, 0.0), 0.0), axis=-1)
    return np.sum(np.maximum(x, 0.0) * np.diff(reached, axis=-1, prepend=0.0), axis=-1)


def _areas(scores: Float[np.ndarray, "concepts settings 2"]) -> Float[np.ndarray, " resamples"]:
    chosen = _resamples(len(scores))
    weights = np.zeros((RESAMPLES, len(scores)))
    np.add.at(weights, (np.arange(RESAMPLES)[:, None], chosen), 1 / len(scores))
    return dominated_area(np.tensordot(weights, scores, axes=1))


def _resamples(count: int) -> Int[np.ndarray, "resamples count"]:
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def _estimate(value: float | np.ndarray, resampled: Float[np.ndarray, " resamples"], count: int) -> Estimate:
    if count < LEAST:
        return Estimate(float(value), np.nan, np.nan)
    tail = stats.norm.cdf(np.sqrt(count / (count - 1)) * stats.t.ppf((1 - COVERAGE) / 2, count - 1))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))
