"""What the report is made of: rows, and the runs behind each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fvae_lora_experiments.run.archive import StoredRun
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.sweep.select import mean_score

State = Literal["complete", "selection", "running", "failed", "unreadable", "duplicate"]

Recipe = Mapping[str, Any]
"""Dotted keys and their values; a key that is missing has none."""


@dataclass(frozen=True)
class ExtraScore:
    """A test score beside the one by which the runs are judged: mean and standard deviation over seeds."""

    name: str
    mean: float
    std: float | None
    paper: float | None
    """What the paper published for it, in percent."""


@dataclass(frozen=True)
class Measured:
    """What was measured, and with which method."""

    state: State
    task: str = ""
    dataset: str = ""
    """Its name, with the configuration, and with the fingerprint where two things share a name."""
    hub_name: str = ""
    """Its name alone."""
    data_note: str = ""
    """How the data differ from the published ones that they look like."""
    average: str = ""
    """How rows count in the accuracy, where the data have groups: plain or train-weighted."""
    protocol: str = ""
    model: str = ""
    metric: str = "accuracy"
    """The name of the score by which the runs are judged, and by which each selected its epoch on validation."""
    greater_is_better: bool = True
    method: str = ""

    @property
    def comparison_key(self) -> tuple[str, str, str, str, str]:
        """What was measured: rows that agree in task, data set, protocol, model and metric may be compared."""
        return self.task, self.dataset, self.protocol, self.model, self.metric


@dataclass(frozen=True)
class Row(Measured):
    """One row of the report.

    A row is the finished runs of one recipe over its seeds (state "complete"), or those of a point of a grid (state
    "selection"), or a single run that is counted nowhere: any other state, no numbers, and `run` and `reason` say
    which run and why.
    """

    settings: str = ""
    """What sets this row apart from other rows of its method, as `key=value key=value`, or nothing."""
    learning_rate: float | None = None
    seeds: tuple[int, ...] = ()
    missing_seeds: tuple[int, ...] = ()
    """Seeds that this recipe began and did not finish, or that at least half of the compared rows have."""
    scores: tuple[float, ...] = ()
    """Test scores in the order of `seeds`; fractions, unless `numbers.NO_FRACTIONS` says otherwise."""
    score: float | None = None
    """Their mean."""
    score_std: float | None = None
    """Their sample standard deviation (n - 1); None for a single seed."""
    score_half_width: float | None = None
    """Half the width of the 95% confidence interval of `score`."""
    validation_score: float | None = None
    """Mean over seeds; None for a point of a grid with a seed that failed or is not finished."""
    pairs: int = 0
    """How many seeds this row and its baseline, LoRA under the same settings, share on the same splits."""
    difference: float | None = None
    """Mean over these pairs of this row's test score minus the baseline's."""
    difference_half_width: float | None = None
    """Half the width of the 95% confidence interval of `difference`."""
    paper: float | None = None
    """What the paper published for this method and data set, in percent."""
    extra_scores: tuple[ExtraScore, ...] = ()
    trainable_parameters: int | None = None
    inference_parameters: int | None = None
    time_s: float | None = None
    """Mean wall time in seconds."""
    peak_memory_mb: float | None = None
    """The largest peak over seeds in MB."""
    train_flops: float | None = None
    """Mean floating-point operations of a whole training."""
    inference_flops: float | None = None
    """Mean floating-point operations of a forward of one batch with the final model."""
    point: tuple[tuple[str, Any], ...] = ()
    """For a point of a grid: the value of each key that the grid of its method varies."""
    chosen: bool = False
    """Whether this point of a grid has the best validation score."""
    edge: tuple[str, ...] = ()
    """The keys with several numbers on whose smallest or largest a chosen point lies."""
    superseded: bool = False
    """Whether these results are of an earlier choice: by now the grid chooses another point."""
    run: str = ""
    reason: str = ""

    @property
    def label(self) -> str:
        """The method, with its settings where they are needed to tell rows apart."""
        return f"{self.method} {self.settings}".rstrip()


@dataclass(frozen=True)
class Group:
    """A row, the finished runs behind it by seed, and the recipe that they share."""

    row: Row
    runs: Mapping[int, StoredRun] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Trials:
    """The runs whose recipes differ in nothing but the seed, from which a row is made."""

    measured: Measured
    recipe: Recipe
    runs: dict[int, StoredRun] = field(default_factory=dict)
    """The finished ones."""
    unfinished: dict[int, str] = field(default_factory=dict)
    """The state of each seed that began and is not complete."""

    @property
    def records(self) -> list[Record]:
        """Those of the finished runs, in the order of their seeds."""
        return [run.record for _, run in sorted(self.runs.items()) if run.record]

    @property
    def selection_score(self) -> float | None:
        """For a point of a grid: its mean validation score; None while a seed of it has not finished."""
        return mean_score([*(record.score for record in self.records), *(None for _ in self.unfinished)])


def differing(recipes: Iterable[Recipe]) -> set[str]:
    """Return the keys for which not all of `recipes` have the same value."""
    known = list(recipes)
    return {k for other in known for k in known[0].keys() | other.keys() if known[0].get(k) != other.get(k)}
