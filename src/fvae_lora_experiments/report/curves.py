"""Curves as lists of (x, y): averaging over seeds, and thinning."""

import math
import statistics
from collections.abc import Sequence

from fvae_lora_experiments.run.archive import CurvePoint


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """Average curves at each x that all of them have: else the mean would jump where one ends."""
    known = [dict(curve) for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, known))) if known else []
    return [(x, statistics.fmean(curve[x] for curve in known)) for x in shared]


def thinned(curve: Sequence[CurvePoint], points: int) -> list[CurvePoint]:
    """Replace neighbouring points by their mean, so that at most `points` remain."""
    size = max(1, math.ceil(len(curve) / points))
    chunks = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(statistics.fmean(x for x, _ in chunk), statistics.fmean(y for _, y in chunk)) for chunk in chunks]
