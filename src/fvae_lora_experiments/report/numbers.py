"""Numbers and names for people: titles of scores, formatting, and confidence intervals over seeds."""

import math
import statistics
from collections.abc import Sequence
from itertools import takewhile

from scipy.stats import t

UNKNOWN = "–"

NO_FRACTIONS = {"loss", "perplexity", "count", "unparsable"}
"""Last words of the names of scores that are not fractions; all others are shares, error rates or correlations."""


def factor(score: str) -> int:
    """Return the factor by which a score is multiplied for display: 100 for a fraction."""
    return 1 if score.rpartition("_")[2] in NO_FRACTIONS else 100


def title(score: str) -> str:
    """Write a score's name with its unit: `worst_group_accuracy` is `worst group accuracy %`."""
    return score.replace("_", " ") + (" %" if factor(score) == 100 else "")


def shown(score: str, mean: float, std: float | None = None) -> str:
    """Write a score, with its standard deviation over seeds if there is one."""
    scale = factor(score)
    return f"{scale * mean:.2f}" + ("" if std is None else f" ± {scale * std:.2f}")


LEVEL = 0.95


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n - 1) of `values`; None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def ci_half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95% confidence interval of the mean of `values`, by Student's t.

    It is t(n - 1) s / sqrt(n) with s the sample standard deviation: exact for normal values. None for fewer than two.
    """
    std = spread(values)
    n = len(values)
    return None if std is None else float(t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)


def prediction_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval in which one more value like `values` lies with a probability of 95%, by Student's t.

    It is mean ± t(n - 1) s sqrt(1 + 1 / n): exact for normal values. None for fewer than two.
    """
    half_width = ci_half_width(values)
    if half_width is None:
        return None
    mean, reach = statistics.fmean(values), half_width * math.sqrt(len(values) + 1)
    return mean - reach, mean + reach


def percent(figure: float | None) -> str:
    """Write a figure that is in percent."""
    return UNKNOWN if figure is None else f"{figure:.2f}"


def signed(text: str) -> str:
    """Write a number with its sign, a true minus where it is negative."""
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else f"+{text}"


def quantity(value: float | None) -> str:
    """Write a number with three digits and a unit prefix: 1234567 is 1.23M."""
    if value is None:
        return UNKNOWN
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)}{prefix}"
    return _three_digits(value)


def duration(seconds: float | None) -> str:
    """Write a duration in its two largest units: 3h05m, 1m23s, 4.2s."""
    if seconds is None:
        return UNKNOWN
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def memory(megabytes: float | None) -> str:
    """Write a size in MB, or from one gigabyte in GB."""
    if megabytes is None:
        return UNKNOWN
    return f"{megabytes:.0f}MB" if megabytes < 999.5 else f"{megabytes / 1000:.1f}GB"


def number(value: float) -> str:
    """Write a number of any sign with three digits and a true minus."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def rate(value: float | None) -> str:
    """Write a learning rate."""
    return UNKNOWN if value is None else f"{value:g}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 99.95 else f"{value:.0f}"


def without_common_parents(modules: Sequence[str]) -> list[str]:
    """Shorten names of modules by the parents that all of them have."""
    paths = [module.split(".") for module in modules]
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    return [".".join(path[shared:] or path) for path in paths]
