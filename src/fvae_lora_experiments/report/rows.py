"""The rows of the report, and the runs behind each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fvae_lora_experiments.run.archive import StoredRun
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.sweep.select import mean_score

State = Literal["complete", "selection", "running", "failed", "unreadable", "duplicate"]

Recipe = Mapping[str, Any]
"""Dotted keys and their values."""


@dataclass(frozen=True)
class ExtraScore:
    """A test score other than the one by which runs are judged: mean and standard deviation over seeds."""

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
    """Its name, with the configuration, and with the fingerprint if two data sets share a name."""
    hub_name: str = ""
    """Its name alone."""
    data_note: str = ""
    """How the data differs from the published data set that it resembles."""
    average: str = ""
    """How rows count in the accuracy, if the data has groups: plain or train-weighted."""
    protocol: str = ""
    model: str = ""
    metric: str = "accuracy"
    """The score by which runs are judged, and by which each selected its epoch on validation."""
    greater_is_better: bool = True
    method: str = ""

    @property
    def comparison_key(self) -> tuple[str, str, str, str, str]:
        """Rows that agree in task, data set, protocol, model and metric may be compared."""
        return self.task, self.dataset, self.protocol, self.model, self.metric


@dataclass(frozen=True)
class Row(Measured):
    """One row of the report.

    A row is the finished runs of one recipe over its seeds (state "complete"), or those of a point of a grid (state
    "selection"), or a single run that is not counted: any other state, no numbers, and `run` and `reason` say which
    run and why.
    """

    settings: str = ""
    """What distinguishes this row from others of its method, as `key=value key=value`; may be empty."""
    learning_rate: float | None = None
    seeds: tuple[int, ...] = ()
    missing_seeds: tuple[int, ...] = ()
    """Seeds that this recipe started and did not finish, or that at least half of the compared rows have."""
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
    """For a point of a grid: the value of each key that its method's grid varies."""
    chosen: bool = False
    """Whether this point of a grid has the best validation score."""
    edge: tuple[str, ...] = ()
    """If the point was chosen, the keys with several numbers of which it has the smallest or largest."""
    superseded: bool = False
    """Whether these results are of an earlier choice: the grid now chooses another point."""
    run: str = ""
    reason: str = ""

    @property
    def label(self) -> str:
        """The method, with its settings if they are needed to distinguish rows."""
        return f"{self.method} {self.settings}".rstrip()


@dataclass(frozen=True)
class Group:
    """A row, the finished runs behind it by seed, and the recipe that they share."""

    row: Row
    runs: Mapping[int, StoredRun] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Trials:
    """The runs whose recipes only differ in the seed, from which a row is made."""

    measured: Measured
    recipe: Recipe
    runs: dict[int, StoredRun] = field(default_factory=dict)
    """The finished ones."""
    unfinished: dict[int, str] = field(default_factory=dict)
    """The state of each seed that was started and is not complete."""

    @property
    def records(self) -> list[Record]:
        """Those of the finished runs, in the order of their seeds."""
        return [run.record for _, run in sorted(self.runs.items()) if run.record]

    @property
    def selection_score(self) -> float | None:
        """For a point of a grid: its mean validation score; None if one of its seeds is not finished."""
        return mean_score([*(record.score for record in self.records), *(None for _ in self.unfinished)])


def differing(recipes: Iterable[Recipe]) -> set[str]:
    """Return the keys whose values are not the same in all of `recipes`."""
    known = list(recipes)
    return {k for other in known for k in known[0].keys() | other.keys() if known[0].get(k) != other.get(k)}
