"""Reading the records of a folder of runs, whatever state the runs were left in."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.recipe import Recipe
from fvae_lora.experiments.report.scores import factor
from fvae_lora.experiments.select import is_number

Point = tuple[float, float]


def printable(value: object) -> str:
    """Turn `value` into text without control characters and lone surrogates, fit for terminals and files."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


Name = Annotated[str, BeforeValidator(printable)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Quantity = Annotated[float, Field(ge=0, le=1e30)]


def _numbers(value: object) -> object:
    return {printable(k): float(v) for k, v in value.items() if is_number(v)} if isinstance(value, dict) else value


Scores = Annotated[dict[str, float], BeforeValidator(_numbers)]
"""Scores by name; what is no number (NaN is none) is left out."""


class Source(BaseModel):
    """A model: its name and the fingerprint of its contents."""

    name: Name = "unknown"
    fingerprint: Name = ""


class Dataset(Source):
    """A data set, and what was measured on it."""

    protocol: Name = ""
    splits: dict[str, Any] = {}
    classes: list[Any] = []
    validation_from: Name = ""
    test_from: Name = ""
    groups: dict[str, Any] = {}
    average: Name = ""
    """How the groups are weighted in an average over them."""
    note: Name = ""
    """How it differs from the published data set that it looks like."""


class Parameters(BaseModel):
    """Numbers of parameters."""

    total: Count | None = None
    trainable: Count | None = None
    inference: Count | None = None


class Time(BaseModel):
    """Seconds from start to end, pauses not counted."""

    wall_s: Quantity | None = None


class Memory(BaseModel):
    """Peak memory in MB."""

    peak_mb: Quantity | None = None


class Flops(BaseModel):
    """Floating-point operations: of the whole training, and of a forward of one batch with the final model."""

    train_total: Quantity | None = None
    eval_batch: Quantity | None = None


class Metric(BaseModel):
    """The score by which a run selected its epoch and by which it is judged."""

    name: Name = "accuracy"
    greater_is_better: bool = True


class Metrics(BaseModel):
    """The scores that a run ended with."""

    test: Scores = {}
    validation: Scores = {}


def _of_today(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with the keys that it was written without, so that it compares with one that has them."""
    try:
        return Recipe.model_validate(recipe).model_dump()
    except ValidationError:
        return recipe


class Record(BaseModel):
    """The part of `run.json` that a report needs. A run that was stopped early may lack most of it."""

    schema_version: Literal[1] = Field(alias="schema")
    state: Literal["running", "complete", "failed"]
    method: Name
    seed: int
    reason: Name = ""
    task: Name = ""
    model: Source = Source()
    dataset: Dataset = Dataset()
    recipe: Annotated[dict[str, Any], AfterValidator(_of_today)] = {}
    parameters: Parameters = Parameters()
    versions: dict[str, Any] = {}
    git_commit: Name = ""
    hardware: Any = None
    time: Time = Time()
    memory: Memory = Memory()
    flops: Flops = Flops()
    metric: Metric = Metric()
    metrics: Metrics = Metrics()

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @property
    def is_selection(self) -> bool:
        """Whether it is a point of a grid: scored on validation alone, to choose a setting."""
        return self.recipe.get("purpose") == "selection"

    @property
    def score(self) -> float | None:
        """The score by which the run is judged: on test, or, for a point of a grid, on validation."""
        split = self.metrics.validation if self.is_selection else self.metrics.test
        return split.get(self.metric.name)

    @model_validator(mode="after")
    def _complete_means_scored(self) -> "Record":
        if self.state == "complete":
            name, score = self.metric.name, self.score
            if score is None:
                raise ValueError(f"complete, but without a {'validation' if self.is_selection else 'test'} {name}")
            if self.metric.greater_is_better and factor(name) == 100 and abs(score) > 1:
                raise ValueError(f"{name} is {score:g}, and not a fraction")
        return self


@dataclass(frozen=True)
class Run:
    """A run: its folder, its name below the folder of runs, its record, or None and the `error`."""

    folder: Path
    name: str
    record: Record | None
    error: str = ""

    @cached_property
    def _events(self) -> list[dict[str, Any]]:
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        events = []
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the line that a kill cut off
            if isinstance(event, dict) and is_number(event.get("epoch")):
                events.append(event)
        return events

    def curve(self, event: str, value: str) -> list[Point]:
        """List (epoch, value) of every such line of `metrics.jsonl`, in order, finite values only."""
        events = (e for e in self._events if e.get("event") == event and is_number(e.get(value)))
        return sorted({e["epoch"]: e[value] for e in events}.items())

    def elbo(self) -> dict[str, dict[str, list[Point]]]:
        """Return {module: {term: [(epoch, value), ...]}}, modules and terms in order of appearance."""
        curves: dict[str, dict[str, dict[float, float]]] = {}
        for event in self._events:
            modules = event.get("elbo")
            for module, terms in modules.items() if isinstance(modules, dict) else ():
                of_module = curves.setdefault(module, {})
                for term, value in terms.items() if isinstance(terms, dict) else ():
                    if is_number(value):
                        of_module.setdefault(term, {})[event["epoch"]] = value
        return {
            printable(module): {printable(term): sorted(curve.items()) for term, curve in terms.items()}
            for module, terms in curves.items()
        }


def read_runs(folder: Path) -> list[Run]:
    """Read all runs at or below `folder`, sorted by path.

    Raises:
        UserError: there is no such folder, or no run in it.

    """
    runs = [_read(run, folder) for run in sorted(_run_folders(folder))]
    if not runs:
        what = "no run (a folder with a run.json) in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}")
    return runs


def _run_folders(folder: Path) -> Iterator[Path]:
    for parent, _, files in os.walk(folder):
        if "run.json" in files or "metrics.jsonl" in files:
            yield Path(parent)


def _read(run: Path, root: Path) -> Run:
    name = printable(run.relative_to(root).as_posix() if run != root else run.resolve().name)
    try:
        return Run(run, name, Record.model_validate_json((run / "run.json").read_bytes()))
    except OSError as error:
        return Run(run, name, None, f"run.json: {error.strerror}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return Run(run, name, None, printable(f"run.json: {where + ': ' if where else ''}{first['msg']}"))
