"""What a handful of seeds says about a mean."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t

LEVEL = 0.95


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n - 1) of `values`; None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95% confidence interval of the mean of `values`, by Student's t.

    It is t(n - 1) s / sqrt(n) with s the sample standard deviation: exact for normal values. None for fewer than two.
    """
    std = spread(values)
    n = len(values)
    return None if std is None else float(t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)
