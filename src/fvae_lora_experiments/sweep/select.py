"""The one rule for a grid's best point, for ties and for edges."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fvae_lora_experiments.run.record import is_number


@dataclass(frozen=True)
class GridPoint:
    """A point of a grid."""

    values: Mapping[str, Any]
    """The value of each key that the grid varies."""
    score: float | None
    """The mean validation score over the selection seeds, or None."""
    has_results: bool = False
    """Whether result runs exist or were started at this point."""


@dataclass(frozen=True)
class BestPoint:
    """The chosen point."""

    index: int
    """Its index among the points."""
    equals: Sequence[int]
    """The other points with the same score."""
    edge: Sequence[str]
    """The keys with several numbers of which it has the smallest or largest: a better one may lie outside."""


def best_point(points: Sequence[GridPoint], greater_is_better: bool) -> BestPoint | None:
    """Chooses the point with the best score; among equals one that has results, or else the first.

    Thus a tie never turns existing results into those of an earlier choice.

    Returns:
        The choice; None if no point has a score.
    """
    sign = 1 if greater_is_better else -1
    scores = {i: sign * point.score for i, point in enumerate(points) if point.score is not None}
    if not scores:
        return None
    best = max(scores, key=lambda i: (scores[i], points[i].has_results))
    equals = [i for i in scores if i != best and scores[i] == scores[best]]
    return BestPoint(best, equals, [key for key in points[best].values if _on_edge(points[best], points, key)])


def _on_edge(point: GridPoint, points: Iterable[GridPoint], key: str) -> bool:
    numbers = {value for other in points if is_number(value := other.values.get(key))}
    return len(numbers) > 1 and point.values[key] in (min(numbers), max(numbers))


def mean_score(scores: Sequence[float | None]) -> float | None:
    """The mean of a point's validation scores over its selection seeds; None if one is missing or not finite."""
    mean = fmean(math.nan if score is None else score for score in scores) if scores else math.nan
    return mean if math.isfinite(mean) else None
