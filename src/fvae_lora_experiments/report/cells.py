"""The columns of the tables, and how a row's cells are written."""

from collections.abc import Callable, Sequence
from functools import partial

from fvae_lora_experiments.report.baseline import BASELINE
from fvae_lora_experiments.report.numbers import (
    UNKNOWN,
    duration,
    factor,
    memory,
    percent,
    quantity,
    rate,
    shown,
    signed,
    title,
)
from fvae_lora_experiments.report.rows import ExtraScore, Row

Column = Callable[[Row], str]


def score(row: Row) -> str:
    """Write mean ± standard deviation."""
    return UNKNOWN if row.score is None else shown(row.metric, row.score, row.score_std)


def seeds(row: Row) -> str:
    """Write how many seeds finished, and out of how many if some are missing."""
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


def result_columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Return the columns of the scores; those of the baseline and the paper only if a row has an entry."""
    metric = rows[0].metric
    lower = "" if rows[0].greater_is_better else " ↓"
    columns: dict[str, Column] = {title(metric) + lower: score, "95% CI ±": half_width, "seeds": seeds}
    if any(row.pairs for row in rows):
        columns[f"vs {BASELINE} ± 95% CI"] = difference
        columns["pairs"] = lambda row: str(row.pairs) if row.pairs else UNKNOWN
    if any(row.paper is not None for row in rows):
        columns[f"paper, {title(metric)}"] = lambda row: percent(row.paper)
        columns["ours \N{MINUS SIGN} paper"] = lambda row: minus_paper(row.metric, row.score, row.paper)
    return columns


def minus_paper(metric: str, ours: float | None, paper: float | None) -> str:
    """Write our mean minus the paper's figure, in points; unknown if one of them is missing."""
    if ours is None or paper is None:
        return UNKNOWN
    return signed(percent(factor(metric) * ours - paper))


def extra_columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Return a column for each further test score, with the paper's beside it."""
    columns: dict[str, Column] = {}
    for name in dict.fromkeys(score.name for row in rows for score in row.extra_scores):
        columns[title(name)] = partial(_extra_scores, name, lambda found: shown(found.name, found.mean, found.std))
        if any(score.name == name and score.paper is not None for row in rows for score in row.extra_scores):
            columns[f"paper, {title(name)}"] = partial(_extra_scores, name, lambda found: percent(found.paper))
            columns[f"ours \N{MINUS SIGN} paper, {title(name)}"] = partial(
                _extra_scores, name, lambda found: minus_paper(found.name, found.mean, found.paper)
            )
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
"""Costs: FLOPs are those of the whole training, and of a forward of one batch with the final model."""


def _extra_scores(name: str, write: Callable[[ExtraScore], str], row: Row) -> str:
    return next((write(score) for score in row.extra_scores if score.name == name), UNKNOWN)
