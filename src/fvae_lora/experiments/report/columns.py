"""What every table shows of a row, and how numbers are written for people."""

from collections.abc import Callable, Sequence
from functools import partial

from fvae_lora.experiments.report.baseline import BASELINE
from fvae_lora.experiments.report.rows import Further, Row
from fvae_lora.experiments.report.scores import shown, title

UNKNOWN = "–"

Column = Callable[[Row], str]


def score(row: Row) -> str:
    """Write mean ± standard deviation."""
    return UNKNOWN if row.score is None else shown(row.metric, row.score, row.score_std)


def seeds(row: Row) -> str:
    """Say how many seeds finished, and of how many where some are missing."""
    n = len(row.seeds)
    return f"{n} of {n + len(row.missing_seeds)}, incomplete" if row.missing_seeds else str(n)


def half_width(row: Row) -> str:
    """Write half the width of the interval of the score."""
    return UNKNOWN if row.score_half_width is None else shown(row.metric, row.score_half_width)


def difference(row: Row) -> str:
    """Write the difference to the baseline with half the width of its interval."""
    if row.difference is None:
        return "baseline" if row.method == BASELINE else UNKNOWN
    return signed(shown(row.metric, row.difference, row.difference_half_width))


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
    """Write a size in MB, or in GB from one gigabyte on."""
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


def results(rows: Sequence[Row]) -> dict[str, Column]:
    """Return the columns of the scores; those of the baseline and of the paper where a row has something in them."""
    metric = rows[0].metric
    lower = "" if rows[0].greater_is_better else " ↓"
    columns: dict[str, Column] = {title(metric) + lower: score, "95% CI ±": half_width, "seeds": seeds}
    if any(row.pairs for row in rows):
        columns[f"vs {BASELINE} ± 95% CI"] = difference
        columns["pairs"] = lambda row: str(row.pairs) if row.pairs else UNKNOWN
    if any(row.paper is not None for row in rows):
        columns[f"paper, {title(metric)}"] = lambda row: percent(row.paper)
    return columns


def further(rows: Sequence[Row]) -> dict[str, Column]:
    """Return a column for each test score beside the one by which the runs are judged, and the paper's beside it."""
    columns: dict[str, Column] = {}
    for name in dict.fromkeys(score.name for row in rows for score in row.further):
        columns[title(name)] = partial(_further, name, lambda found: shown(found.name, found.mean, found.std))
        if any(score.name == name and score.paper is not None for row in rows for score in row.further):
            columns[f"paper, {title(name)}"] = partial(_further, name, lambda found: percent(found.paper))
    return columns


COSTS: dict[str, Column] = {
    "lr": lambda row: rate(row.learning_rate),
    "trainable params": lambda row: quantity(row.trainable_parameters),
    "inference params": lambda row: quantity(row.inference_parameters),
    "time": lambda row: duration(row.time_s),
    "peak memory": lambda row: memory(row.peak_memory_mb),
    "training FLOPs": lambda row: quantity(row.train_flops),
    "batch FLOPs": lambda row: quantity(row.inference_flops),
}
"""What it took: FLOPs are those of the whole training, and of a forward of one batch with the final model."""


def _further(name: str, write: Callable[[Further], str], row: Row) -> str:
    return next((write(score) for score in row.further if score.name == name), UNKNOWN)
