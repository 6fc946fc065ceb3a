"""A grid: the same points and budget for every method; validation chooses, on seeds that no result uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.run.record import MetricRecord, Record
from fvae_lora_experiments.sweep.plan import Contender, PlannedRun, combinations, runs_of
from fvae_lora_experiments.sweep.select import BestPoint, GridPoint, best_point, mean_score


class Grid:
    """The points of every contender, and the runs that choose among them.

    Args:
        contenders: what is compared.
        values: the values of each key of the grid.
        selection_seeds: the seeds of the runs that choose.
        seeds: the seeds of the results.

    Raises:
        UserError: an unknown key, a bad value, the same point twice, or a seed for both selection and results.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        values: Mapping[str, Sequence[Any]],
        selection_seeds: Sequence[int],
        seeds: Sequence[int],
    ):
        for seed in set(selection_seeds) & set(seeds):
            raise UserError(f"--selection-seeds: {seed} is also in --seeds; results need seeds that did not choose")
        for key in set(values) & {key for contender in contenders for key in contender.keys}:
            raise UserError(f"--grid {key}: also given in --vary")
        runs_of(contenders, seeds)  # refuse what is wrong with the results before anything is run
        self.keys = list(values)
        self.seeds, self.result_seeds = selection_seeds, seeds
        self.points = [
            (contender, [contender.with_values(point) for point in combinations(values)]) for contender in contenders
        ]

    def runs(self) -> list[PlannedRun]:
        """The runs that choose."""
        return runs_of([point for _, points in self.points for point in points], self.seeds, "selection")

    def choices(self) -> list["Choice"]:
        """The choice for each contender, once the runs have ended."""
        return [self._choice(contender, points) for contender, points in self.points]

    def _choice(self, contender: Contender, points: Sequence[Contender]) -> "Choice":
        records = [[p.run(seed, "selection").folder.read() for seed in self.seeds] for p in points]
        complete = [r for point_records in records for r in point_records if r and r.state == "complete"]
        metric = complete[0].metric if complete else MetricRecord()
        scores = [mean_score([_score(record) for record in point_records]) for point_records in records]
        tried = [ScoredPoint(p, score, self._has_results(p)) for p, score in zip(points, scores, strict=True)]
        return Choice(contender.name, self.keys, tried, metric.name, metric.greater_is_better)

    def _has_results(self, point: Contender) -> bool:
        return any(point.run(seed).folder.record_file.exists() for seed in self.result_seeds)


@dataclass(frozen=True)
class ScoredPoint:
    """A point of the grid and its mean validation score over the selection seeds; None if a run failed."""

    contender: Contender
    score: float | None
    has_results: bool = False


@dataclass(frozen=True)
class Choice:
    """The outcome of the grid for one contender."""

    name: str
    keys: Sequence[str]
    tried: Sequence[ScoredPoint]
    metric: str
    greater_is_better: bool

    @cached_property
    def _best(self) -> BestPoint | None:
        points = [
            GridPoint({key: tried.contender.values[key] for key in self.keys}, tried.score, tried.has_results)
            for tried in self.tried
        ]
        return best_point(points, self.greater_is_better)

    @property
    def best(self) -> ScoredPoint | None:
        """The chosen point; None if all failed."""
        return None if self._best is None else self.tried[self._best.index]

    def values(self, tried: ScoredPoint) -> str:
        """The grid's keys and their values at a point."""
        return " ".join(f"{key.rpartition('.')[2]}={tried.contender.values[key]}" for key in self.keys)

    def remarks(self) -> list[str]:
        """Remarks on the choice: failed points, ties, and whether the grid was wide enough."""
        failed = [self.values(tried) for tried in self.tried if tried.score is None]
        remarks = [f"failed: {', '.join(failed)}"] if failed else []
        if self._best is None:
            return remarks
        if self._best.equals:
            why = (
                "the first of several equal ones"
                if self._best.index < min(self._best.equals)
                else "of several equal ones the one with results"
            )
            others = [self.values(self.tried[i]) for i in self._best.equals]
            remarks.append(f"{why}, with {', '.join(others)}")
        remarks += [f"best {key.rpartition('.')[2]} on the grid's edge: widen it" for key in self._best.edge]
        return remarks


def _score(record: Record | None) -> float | None:
    return record.score if record and record.state == "complete" else None


def print_choices(choices: Sequence[Choice], console: Console) -> None:
    """Prints what was chosen, with a row for each contender."""
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "chosen", "validation", ""):
        table.add_column(heading, overflow="fold")
    for choice in choices:
        best = choice.best
        chosen = ("nothing", "") if best is None else (choice.values(best), f"{choice.metric} {best.score:.4f}")
        table.add_row(*map(Text, (choice.name, *chosen, "; ".join(choice.remarks()))))
    console.print(table)
