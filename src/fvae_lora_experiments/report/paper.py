"""The figures that the paper published, shown beside ours and never mixed with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("paper.yaml")


@dataclass(frozen=True)
class Published:
    """One of the paper's tables: percents, by method, in the order of `datasets`."""

    study: str
    """The study that reruns it (`study`)."""
    setting: str
    """What was measured, on which model."""
    score: str
    datasets: Sequence[str]
    figures: Mapping[str, Sequence[float]]
    means: Mapping[str, float] = field(default_factory=dict)
    """Means over all of `datasets` as published; for some methods only these exist."""

    def figure(self, method: str, dataset: str) -> float | None:
        """Return the figure of a method on one of `datasets`, or None."""
        return self.figures[method][self.datasets.index(dataset)] if method in self.figures else None


@cache
def paper() -> tuple[str, Sequence[Published]]:
    """Return the source of the figures, and the tables."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return content["source"], [Published(**table) for table in content["tables"]]


def published(dataset: str, score: str) -> tuple[Published, str] | None:
    """Return the table that has this score on this data set, and the data set's name there, or None.

    Scores of a run that is tested on several data sets begin with their names: `piqa_generated_accuracy`.
    """
    for table in paper()[1]:
        for name in table.datasets:
            if (dataset, score) == (name, table.score) or score == f"{name}_{table.score}":
                return table, name
    return None


def figure(method: str, dataset: str, score: str) -> float | None:
    """Return the published figure in percent for method, data set and score, or None."""
    found = published(dataset, score)
    return found[0].figure(method, found[1]) if found else None
