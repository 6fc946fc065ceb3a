"""Whether a repeated run's scores are those of the record: to the bit, within the spread of its seeds, or not."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fvae_lora_experiments.report.aggregate import aggregate
from fvae_lora_experiments.report.numbers import prediction_interval
from fvae_lora_experiments.run.archive import CurvePoint, StoredRun

FEWEST_SIBLINGS = 2
"""Runs with other seeds without which nothing is said about a spread."""


@dataclass(frozen=True)
class Verdict:
    """One score of the record and of the run that repeats it; of a curve over epochs the mean."""

    score: str
    recorded: float
    repeated: float | None
    """None if the repeated run does not have it."""
    answer: Literal["equal", "within", "differs"]
    """`equal`: to the bit, of a curve in every epoch; `within`: in the interval of a further seed."""
    interval: tuple[float, float] | None = None
    """Where a further seed's score lies with a probability of 95%; None without enough siblings."""


def siblings(run: StoredRun, others: Sequence[StoredRun]) -> list[StoredRun]:
    """The finished runs among `others` that differ from `run` in the seed alone."""
    assert run.record is not None
    seed = run.record.seed
    groups = aggregate([run, *(other for other in others if other.record and other.record.seed != seed)])
    own = next((group.runs for group in groups if seed in group.runs), {})
    return [sibling for its_seed, sibling in own.items() if its_seed != seed]


def judge(recorded: StoredRun, repeated: StoredRun, seeds: Sequence[StoredRun]) -> list[Verdict]:
    """A verdict on each score of the record.

    Args:
        recorded: the record.
        repeated: the run that repeats it.
        seeds: the record's siblings, see `siblings`.
    """
    again, spread = _scores(repeated), [_scores(sibling) for sibling in seeds]
    verdicts = []
    for name, points in _scores(recorded).items():
        then, now = _mean(points), _mean(again[name]) if name in again else None
        known = [_mean(scores[name]) for scores in spread if name in scores]
        interval = prediction_interval([then, *known]) if len(known) >= FEWEST_SIBLINGS else None
        if again.get(name) == points:
            verdicts.append(Verdict(name, then, now, "equal", interval))
        elif now is not None and interval and interval[0] <= now <= interval[1]:
            verdicts.append(Verdict(name, then, now, "within", interval))
        else:
            verdicts.append(Verdict(name, then, now, "differs", interval))
    return verdicts


def _scores(run: StoredRun) -> dict[str, list[CurvePoint]]:
    """The final scores, each a single point, and the curves of those on validation."""
    record = run.record
    assert record is not None
    split = "validation" if record.is_selection else "test"
    final = record.metrics.validation if record.is_selection else record.metrics.test
    names = dict.fromkeys(name for event in run.events if event.event == "validation" for name in event.scores)
    curves = {f"validation {name} over epochs": run.curve("validation", name) for name in names}
    return {f"{split} {name}": [(0.0, value)] for name, value in final.items()} | curves


def _mean(points: Sequence[CurvePoint]) -> float:
    return statistics.fmean(score for _, score in points)
