"""From runs to rows: what may be averaged with what, and what must not be."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fvae_lora.experiments.recipe import flatten
from fvae_lora.experiments.report.records import Record, Run, Source, is_number, printable, read_runs


@dataclass(frozen=True)
class Row:
    """One row of the report.

    A row is either the finished runs of one recipe over its seeds (state "complete"), or a single run that is
    counted nowhere: any other state, no numbers, and `run` and `reason` say which run and why.
    """

    state: Literal["complete", "running", "failed", "unreadable", "duplicate"]
    task: str = ""
    dataset: str = ""
    protocol: str = ""
    model: str = ""
    method: str = ""
    settings: str = ""
    """What sets this row apart from other rows of its method, as `key=value key=value`, or nothing."""
    learning_rate: float | None = None
    seeds: tuple[int, ...] = ()
    missing_seeds: tuple[int, ...] = ()
    """Seeds that some run on the same task, data and model has, and this row lacks."""
    accuracies: tuple[float, ...] = ()
    """Test accuracies in the order of `seeds`, fractions."""
    accuracy: float | None = None
    """Their mean."""
    accuracy_std: float | None = None
    """Their sample standard deviation (n - 1); None for a single seed."""
    validation_accuracy: float | None = None
    """Mean over seeds, a fraction."""
    trainable_parameters: int | None = None
    inference_parameters: int | None = None
    time_s: float | None = None
    """Mean wall time in seconds."""
    peak_memory_mb: float | None = None
    """The largest peak over seeds in MB."""
    train_flops: float | None = None
    """Mean floating-point operations of a whole training."""
    run: str = ""
    reason: str = ""

    @property
    def label(self) -> str:
        """The method, with its settings where they are needed to tell rows apart."""
        return f"{self.method} {self.settings}".rstrip()

    @property
    def comparison(self) -> tuple[str, str, str, str]:
        """What was measured: rows that agree in task, data set, protocol and model may be compared."""
        return self.task, self.dataset, self.protocol, self.model


@dataclass(frozen=True)
class Group:
    """A row and the runs behind it."""

    row: Row
    runs: tuple[Run, ...]


def summary_rows(runs: Path) -> list[Row]:
    """Return one row per recipe over its finished seeds, then each run that is not counted.

    Rows that may be compared stand together, in the order of validation accuracy: the order does not look at test.

    Raises:
        UserError: there is no such folder, or no run in it.

    """
    return [group.row for group in summarise(read_runs(runs))]


def summarise(runs: Iterable[Run]) -> list[Group]:
    """Group the runs whose recipes differ in nothing but the seed, in the order of `summary_rows`."""
    runs = list(runs)
    records = [run.record for run in runs if run.record]
    models, datasets = _labels(r.model for r in records), _labels(r.dataset for r in records)

    finished: dict[tuple[Row, Recipe], dict[int, Run]] = defaultdict(dict)
    expected: dict[tuple[str, ...], set[int]] = defaultdict(set)
    left_out = []
    for run in runs:
        record = run.record
        if record is None:
            left_out.append(Group(Row("unreadable", run=run.name, reason=run.error), (run,)))
            continue
        recipe = flatten(record.recipe)
        row = Row(
            state=record.state,
            task=record.task,
            dataset=datasets[_identity(record.dataset)],
            protocol=record.dataset.protocol,
            model=models[_identity(record.model)],
            method=record.method,
            learning_rate=_number(recipe.get("train.learning_rate")),
            run=run.name,
        )
        expected[row.comparison].add(record.seed)
        if record.state != "complete":
            reason = record.reason or ("not finished" if record.state == "running" else "no reason recorded")
            left_out.append(Group(replace(row, seeds=(record.seed,), reason=reason), (run,)))
            continue
        of_recipe = finished[replace(row, run=""), _settings_of(recipe)]
        if first := of_recipe.get(record.seed):
            reason = f"the same recipe and seed as {first.name}"
            left_out.append(Group(replace(row, state="duplicate", seeds=(record.seed,), reason=reason), (run,)))
        else:
            of_recipe[record.seed] = run

    settings = _settings(finished)
    groups = [
        Group(
            _averaged(row, settings[row, recipe], of_recipe, expected[row.comparison]),
            tuple(of_recipe.values()),
        )
        for (row, recipe), of_recipe in finished.items()
    ]
    groups.sort(key=lambda g: (g.row.comparison, -(g.row.validation_accuracy or 0), g.row.label))
    return groups + left_out


Recipe = frozenset[tuple[str, str]]
Field = Callable[[Record], float | None]


def _averaged(row: Row, settings: str, runs: dict[int, Run], expected: set[int]) -> Row:
    records = {seed: run.record for seed, run in sorted(runs.items()) if run.record}

    def over_seeds(value: Field, reduce: Callable[[list[float]], float]) -> float | None:
        known = [v for r in records.values() if (v := value(r)) is not None]
        return reduce(known) if known else None

    def count(value: Field) -> int | None:
        mean = over_seeds(value, statistics.fmean)
        return None if mean is None else round(mean)

    accuracies = tuple(r.metrics.test.accuracy for r in records.values() if r.metrics.test.accuracy is not None)
    return replace(
        row,
        settings=settings,
        seeds=tuple(records),
        missing_seeds=tuple(sorted(expected - set(records))),
        accuracies=accuracies,
        accuracy=statistics.fmean(accuracies),
        accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        validation_accuracy=over_seeds(lambda r: r.metrics.validation.accuracy, statistics.fmean),
        trainable_parameters=count(lambda r: r.parameters.trainable),
        inference_parameters=count(lambda r: r.parameters.inference),
        time_s=over_seeds(lambda r: r.time.wall_s, statistics.fmean),
        peak_memory_mb=over_seeds(lambda r: r.memory.peak_mb, max),
        train_flops=over_seeds(lambda r: r.flops.train_total, statistics.fmean),
    )


def _settings(keys: Iterable[tuple[Row, Recipe]]) -> dict[tuple[Row, Recipe], str]:
    """Name the entries in which a recipe differs from another of its method in the same comparison."""
    siblings: dict[tuple[Any, ...], list[tuple[Row, Recipe]]] = defaultdict(list)
    for row, recipe in keys:
        siblings[row.comparison, row.method].append((row, recipe))
    settings = {}
    for group in siblings.values():
        common = frozenset.intersection(*(recipe for _, recipe in group))
        for row, recipe in group:
            settings[row, recipe] = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in sorted(recipe - common))
    return settings


def _settings_of(recipe: dict[str, Any]) -> Recipe:
    """Keep what rows may differ in: model and data are known by their contents, seeds are averaged over."""
    named_elsewhere = {"task", "method", "model", "dataset", "seed"}
    return frozenset((printable(k), printable(v) or "none") for k, v in recipe.items() if k not in named_elsewhere)


def _identity(source: Source) -> tuple[str, str]:
    return source.name, source.fingerprint


def _labels(sources: Iterable[Source]) -> dict[tuple[str, str], str]:
    """Label each (name, fingerprint) by its name, and by the fingerprint where two things share the name."""
    identities = {_identity(s) for s in sources}
    uses = Counter(name for name, _ in identities)
    return {(name, mark): f"{name} [{mark[:8]}]" if uses[name] > 1 else name for name, mark in identities}


def _number(value: object) -> float | None:
    return float(value) if is_number(value) else None
