"""A grid: the same points and the same budget for every method; validation chooses, on seeds that no result uses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.plan import Contender, Planned, product_of, runs_of
from fvae_lora.experiments.record import Record

ACCURACY: dict[str, Any] = {"name": "accuracy", "greater_is_better": True}
"""The metric of a record that names none."""


class Grid:
    """The points of every contender, and the runs that choose among them.

    Args:
        contenders: what is compared.
        values: the values of each key of the grid.
        selection_seeds: the seeds of the runs that choose.
        seeds: the seeds of the results.

    Raises:
        UserError: an unknown key, a bad value, the same point twice, a seed that would choose and be a result.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        values: Mapping[str, Sequence[Any]],
        selection_seeds: Sequence[int],
        seeds: Sequence[int],
    ):
        for seed in set(selection_seeds) & set(seeds):
            raise UserError(f"--selection-seeds: {seed} is one of --seeds; results need seeds that chose nothing")
        for key in set(values) & {key for contender in contenders for key in contender.keys}:
            raise UserError(f"--grid {key}: --vary has it too")
        runs_of(contenders, seeds)  # refuses what is wrong with the results before anything is chosen
        self.keys = list(values)
        self.seeds = selection_seeds
        self.points = [(asked, [asked.at(point) for point in product_of(values)]) for asked in contenders]

    def runs(self) -> list[Planned]:
        """The runs that choose."""
        return runs_of([point for _, points in self.points for point in points], self.seeds, "selection")

    def choices(self) -> list["Choice"]:
        """What the runs say, once they are over, of each contender."""
        return [self._choice(asked, points) for asked, points in self.points]

    def _choice(self, asked: Contender, points: Sequence[Contender]) -> "Choice":
        records = [[p.run(seed, "selection").folder.read() or {} for seed in self.seeds] for p in points]
        metric = next((r["metric"] for of_point in records for r in of_point if "metric" in r), ACCURACY)
        scores = [_mean(of_point, metric["name"]) for of_point in records]
        tried = [Tried(point, score) for point, score in zip(points, scores, strict=True)]
        return Choice(asked.name, self.keys, tried, metric["name"], metric["greater_is_better"])


@dataclass(frozen=True)
class Tried:
    """A point of the grid and its mean validation score over the selection seeds; None if a run failed."""

    contender: Contender
    score: float | None


@dataclass(frozen=True)
class Choice:
    """What the grid says of one contender."""

    name: str
    keys: Sequence[str]
    tried: Sequence[Tried]
    metric: str
    greater_is_better: bool

    @property
    def best(self) -> Tried | None:
        """The point with the best score, the first of equals; None if all failed."""
        sign = 1 if self.greater_is_better else -1
        whole = [tried for tried in self.tried if tried.score is not None]
        return max(whole, key=lambda tried: sign * (tried.score or 0), default=None)

    def values(self, tried: Tried) -> str:
        """The grid's keys and their values at a point."""
        return " ".join(f"{key.rpartition('.')[2]}={tried.contender.values[key]}" for key in self.keys)

    def remarks(self) -> list[str]:
        """What a reader of the choice should know: failed points, ties, and whether the grid was wide enough."""
        best = self.best
        failed = [self.values(tried) for tried in self.tried if tried.score is None]
        remarks = [f"failed: {', '.join(failed)}"] if failed else []
        if best is None:
            return remarks
        equals = [self.values(tried) for tried in self.tried if tried is not best and tried.score == best.score]
        if equals:
            remarks.append(f"the first of equals, with {', '.join(equals)}")
        for key in self.keys:
            values = [tried.contender.values[key] for tried in self.tried]
            numbers = {value for value in values if isinstance(value, int | float)}
            if len(numbers) > 1 and best.contender.values[key] in (min(numbers), max(numbers)):
                remarks.append(f"best {key.rpartition('.')[2]} on the grid's edge: widen it")
        return remarks


def _mean(records: Iterable[Record], metric: str) -> float | None:
    scores = [r["metrics"]["validation"][metric] if r.get("state") == "complete" else math.nan for r in records]
    mean = fmean(scores)
    return mean if math.isfinite(mean) else None


def print_choices(choices: Sequence[Choice], console: Console) -> None:
    """What was chosen, a row for each contender."""
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "chosen", "validation", ""):
        table.add_column(heading, overflow="fold")
    for choice in choices:
        best = choice.best
        chosen = ("nothing", "") if best is None else (choice.values(best), f"{choice.metric} {best.score:.4f}")
        table.add_row(*map(Text, (choice.name, *chosen, "; ".join(choice.remarks()))))
    console.print(table)
