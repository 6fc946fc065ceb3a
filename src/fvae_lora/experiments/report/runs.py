"""The runs that a report is about, in whatever state they were left."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.recipe import Recipe
from fvae_lora.experiments.record import Event, Record, parse_record, printable
from fvae_lora.experiments.report.scores import factor
from fvae_lora.experiments.run_folder import RunFolder

Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """A run: its folder, its name below the folder of runs, its record, or None and the `error`."""

    folder: Path
    name: str
    record: Record | None
    error: str = ""

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Its recipe with the keys that it was written without, so that it compares with one that has them."""
        written = self.record.recipe if self.record else {}
        try:
            return Recipe.model_validate(written).model_dump()
        except ValidationError:
            return written

    @cached_property
    def _events(self) -> list[Event]:
        return RunFolder(self.folder).events()

    def curve(self, event: str, value: str) -> list[Point]:
        """List (epoch, value) of every such line of `metrics.jsonl`, in order, finite values only."""
        measured = [(e.epoch, e.scores) for e in self._events if e.event == event]
        return sorted({epoch: scores[value] for epoch, scores in measured if value in scores}.items())

    def elbo(self) -> dict[str, dict[str, list[Point]]]:
        """Return {module: {term: [(epoch, value), ...]}}, modules and terms in order of appearance."""
        curves: dict[str, dict[str, dict[float, float]]] = {}
        for event in self._events:
            for module, terms in event.elbo.items():
                of_module = curves.setdefault(module, {})
                for term, value in terms.items():
                    of_module.setdefault(term, {})[event.epoch] = value
        return {
            printable(module): {term: sorted(curve.items()) for term, curve in terms.items()}
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
        record = parse_record((run / "run.json").read_bytes())
    except OSError as error:
        return Run(run, name, None, f"run.json: {error.strerror}")
    except ValueError as error:
        return Run(run, name, None, f"run.json: {error}")
    if fault := _fault(record):
        return Run(run, name, None, f"run.json: {fault}")
    return Run(run, name, record)


def _fault(record: Record) -> str:
    """Why a record cannot be counted, if it says that the run is complete."""
    name, score = record.metric.name, record.score
    if record.state != "complete":
        return ""
    if score is None:
        return f"complete, but without a {'validation' if record.is_selection else 'test'} {name}"
    if record.metric.greater_is_better and factor(name) == 100 and abs(score) > 1:
        return f"{name} is {score:g}, and not a fraction"
    return ""
