"""A run's record, for writing and reading: `run.json`, and the lines of `metrics.jsonl`.

Fields of later versions are kept; a record that this version would misread has another `schema`.
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


def printable(value: object) -> str:
    """`value` as text without control characters and lone surrogates, safe for terminals and files."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a number that can be averaged and plotted: not a bool, not NaN, not above 1e100."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _numbers(value: object) -> object:
    return {printable(k): v for k, v in value.items() if is_number(v)} if isinstance(value, dict) else value


def _terms(value: object) -> object:
    modules = value.items() if isinstance(value, dict) else ()
    return {module: _numbers(terms) for module, terms in modules if isinstance(terms, dict)}


def _require_number(value: object) -> object:
    if not is_number(value):
        raise ValueError("not a number")
    return value


Name = Annotated[str, BeforeValidator(printable)]
Note = Annotated[str | None, BeforeValidator(lambda value: None if value is None else printable(value))]
NonNegative = Annotated[int, Field(ge=0, le=10**18)]
Quantity = Annotated[int | float, Field(ge=0, le=1e30)]
Measured = Annotated[int | float | None, BeforeValidator(lambda value: value if is_number(value) else None)]
Scores = Annotated[dict[str, int | float], BeforeValidator(_numbers)]
"""Scores by name, without those that are NaN, infinite or not numbers."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")

    def contents(self) -> dict[str, Any]:
        """What is written: the fields that were set, and unknown ones that were read."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class SourceRecord(_Part):
    """A model: its name and the fingerprint of its contents."""

    name: Name = "unknown"
    fingerprint: Name = ""


class TestedOn(_Part):
    """The data of a run's test scores, if it has changed since training."""

    fingerprint: Name
    splits: dict[str, Any] = {}


class DatasetRecord(SourceRecord):
    """A data set and its splits. A task may add further facts."""

    protocol: Name = ""
    splits: dict[str, Any] = {}
    classes: list[Any] = []
    validation_from: Name = ""
    test_from: Name = ""
    groups: dict[str, Any] = {}
    average: Name = ""
    """How the groups are weighted in an average over them."""
    note: Note = None
    """How it differs from the published data set that it resembles."""
    tested_on: TestedOn | None = None

    @property
    def test_fingerprint(self) -> str:
        """The fingerprint of the data that the test scores are from."""
        return self.tested_on.fingerprint if self.tested_on else self.fingerprint


class Parameters(_Part):
    """Numbers of parameters."""

    total: NonNegative | None = None
    trainable: NonNegative | None = None
    inference: NonNegative | None = None


class Time(_Part):
    """Seconds of work, without pauses, and the dates of start and end."""

    wall_s: Quantity | None = None
    train_s: Quantity | None = None
    started: Note = None
    finished: Note = None


class Memory(_Part):
    """Peak memory in MB."""

    peak_mb: Quantity | None = None


class Flops(_Part):
    """Floating-point operations: of a step, of the whole training, and of one batch's forward with the final model."""

    train_step: Quantity | None = None
    train_total: Quantity | None = None
    eval_batch: Quantity | None = None


class MetricRecord(_Part):
    """The score by which a run selects its epoch and is judged."""

    name: Name = "accuracy"
    greater_is_better: bool = True


class Metrics(_Part):
    """The final scores of a run: on validation those of its best epoch; on test none for a point of a grid."""

    validation: Scores = {}
    test: Scores = {}


class ClassScores(_Part):
    """The scores of one class on the test split, fractions, and how many of its rows are there."""

    precision: Measured = None
    recall: Measured = None
    f1: Measured = None
    support: NonNegative | None = None


class ByClass(_Part):
    """The scores of each class on the test split, their means, and for each class how often it was taken for which."""

    macro_f1: Measured = None
    balanced_accuracy: Measured = None
    classes: dict[Name, ClassScores] = {}
    confusion: dict[Name, dict[Name, NonNegative]] = {}


class Record(_Part):
    """`run.json`. If a run was stopped early, later fields are missing."""

    schema_version: Literal[1] = Field(alias="schema")
    state: Literal["running", "complete", "failed", "pruned"]
    """`pruned`: a trial of a search that was ended early because it was not promising."""
    reason: Note = None
    """Why it failed or was pruned."""
    diverged: bool = False
    """Whether it failed because a number became NaN or infinite, and would do so again."""
    task: Name = ""
    method: Name
    seed: int
    recipe: dict[str, Any] = {}
    """The resolved recipe; paths of model and data are relative to the run's folder."""
    metric: MetricRecord = MetricRecord()
    model: SourceRecord = SourceRecord()
    dataset: DatasetRecord = DatasetRecord()
    parameters: Parameters = Parameters()
    versions: dict[str, Any] = {}
    git_commit: Note = None
    hardware: Any = None
    time: Time = Time()
    memory: Memory = Memory()
    flops: Flops = Flops()
    metrics: Metrics = Metrics()
    by_class: ByClass | None = None
    extended_from: list[NonNegative] = []
    """At how many epochs it had been finished before it went on."""
    earlier_versions: list[dict[str, Any]] = []
    """What of `versions` was another before it went on, once for each time that it did under others."""

    @property
    def is_selection(self) -> bool:
        """Whether it is a point of a grid, scored only on validation to choose a setting."""
        return self.recipe.get("purpose") == "selection"

    @property
    def score(self) -> float | None:
        """The score by which the run is judged: on test, or, for a point of a grid, on validation."""
        split = self.metrics.validation if self.is_selection else self.metrics.test
        return split.get(self.metric.name)


class Event(_Part):
    """A line of `metrics.jsonl`: what was measured after a step, by name."""

    event: Literal["train", "validation", "test"]
    step: NonNegative = 0
    epoch: Annotated[int | float, BeforeValidator(_require_number)]
    loss: Measured = None
    learning_rate: Measured = None
    grad_norm: Measured = None
    elbo: Annotated[dict[str, dict[str, int | float]], BeforeValidator(_terms)] = {}
    """The terms of each layer's ELBO, by the module's name."""

    @property
    def scores(self) -> dict[str, float]:
        """The loss, and the task's scores."""
        measured = {"loss": self.loss} | (self.model_extra or {})
        return {name: value for name, value in measured.items() if is_number(value)}


def parse_record(contents: str | bytes | dict[str, Any]) -> Record:
    """The record in `contents`: the text of a `run.json`, or its parsed object.

    Raises:
        ValueError: it is not a record; the message is one line.
    """
    try:
        if isinstance(contents, str | bytes):
            return Record.model_validate_json(contents)
        return Record.model_validate(contents)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(printable(f"{where + ': ' if where else ''}{first['msg']}")) from error


def parse_events(text: str) -> list[Event]:
    """The learning curve in the text of a `metrics.jsonl`, without a line truncated by a kill."""
    return _valid_events(Event.model_validate_json, text.splitlines())


def read_events(lines: Iterable[Any]) -> list[Event]:
    """The learning curve in `lines`, each a dict."""
    return _valid_events(Event.model_validate, lines)


def _valid_events(read: Callable[[Any], Event], lines: Iterable[Any]) -> list[Event]:
    events = []
    for line in lines:
        with contextlib.suppress(ValidationError):
            events.append(read(line))
    return events
