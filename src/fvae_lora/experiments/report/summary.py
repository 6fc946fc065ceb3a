"""From runs to rows: what may be averaged with what, and what must not be."""

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from fvae_lora.experiments.recipe import flatten
from fvae_lora.experiments.record import Record, Source, is_number, printable
from fvae_lora.experiments.report import paper
from fvae_lora.experiments.report.baseline import set_differences
from fvae_lora.experiments.report.intervals import half_width, spread
from fvae_lora.experiments.report.rows import Further, Group, Row, differing
from fvae_lora.experiments.report.runs import Run, read_runs
from fvae_lora.experiments.report.selection import mark_points
from fvae_lora.experiments.select import mean_score


def summary_rows(runs: Path) -> list[Row]:
    """Return one row per recipe over its finished seeds and per point of a grid, then each run that is not counted.

    Rows that may be compared stand together, results first, in the order of their validation score: the order does
    not look at test.

    Raises:
        UserError: there is no such folder, or no run in it.

    """
    return [group.row for group in summarise(read_runs(runs))]


def summarise(runs: Iterable[Run]) -> list[Group]:
    """Group the runs whose recipes differ in nothing but the seed, in the order of `summary_rows`."""
    groups, left_out = _grouped(list(runs))
    compared = [_compared(list(alike)) for _, alike in groupby(sorted(groups, key=_comparison), key=_comparison)]
    return [group for alike in compared for group in alike] + left_out


def _comparison(group: Group) -> tuple[str, ...]:
    return group.row.comparison


def _grouped(runs: Sequence[Run]) -> tuple[list[Group], list[Group]]:
    """Collect the runs of each recipe, and those that are counted nowhere."""
    runs = _identified(runs)
    records = [run.record for run in runs if run.record]
    models, datasets = _labels(r.model for r in records), _labels(map(_data, records))
    groups: dict[tuple[Row, frozenset[tuple[str, str]]], Group] = {}
    left_out = []
    for run in runs:
        record = run.record
        if record is None:
            left_out.append(Group(Row("unreadable", run=run.name, reason=run.error)))
            continue
        recipe = flatten(run.recipe)
        row = Row(
            state="selection" if record.is_selection else "complete",
            task=record.task,
            dataset=datasets[_identity(_data(record))],
            hub_name=record.dataset.name,
            data_note=record.dataset.note or "",
            average=record.dataset.average,
            protocol=record.dataset.protocol,
            model=models[_identity(record.model)],
            metric=record.metric.name,
            greater_is_better=record.metric.greater_is_better,
            method=record.method,
            learning_rate=_number(recipe.get("train.learning_rate")),
        )
        settings = {printable(k): v for k, v in recipe.items() if k not in NAMED_ELSEWHERE and v is not None}
        key = row, frozenset((k, printable(v)) for k, v in settings.items())
        group = groups.setdefault(key, Group(row, recipe=settings))
        reason = ""
        if record.state != "complete":
            state: Any = record.state
            group.unfinished.setdefault(record.seed, state)
            reason = record.reason or ("not finished" if state == "running" else "no reason recorded")
        elif first := group.runs.get(record.seed):
            state, reason = "duplicate", f"the same recipe and seed as {first.name}"
        else:
            group.runs[record.seed] = run
        if reason:
            row = replace(row, state=state, seeds=(record.seed,), run=run.name, reason=reason)
            left_out.append(Group(row))
    return list(groups.values()), left_out


def _identified(runs: Sequence[Run]) -> list[Run]:
    """Say of a run that ended before it had opened model and data which ones its recipe means, if another run knows."""

    def asked(run: Run) -> tuple[str, ...]:
        return tuple(printable(run.recipe.get(key)) for key in ("task", "model", "dataset", "data"))

    known = {asked(run): run.record for run in runs if run.record and run.record.dataset.fingerprint}
    found = []
    for run in runs:
        record = run.record
        opened = record is None or record.dataset.fingerprint or not record.recipe.get("dataset")
        if record and not opened and (other := known.get(asked(run))):
            same = {"model": other.model, "dataset": other.dataset, "metric": other.metric}
            run = replace(run, record=record.model_copy(update=same))
        found.append(run)
    return found


NAMED_ELSEWHERE = {"task", "method", "model", "dataset", "seed", "purpose"}
"""What rows of a comparison do not differ in by these names: model and data are known by their contents."""


def _compared(groups: Sequence[Group]) -> list[Group]:
    """Fill in the rows of groups that were measured alike, and put them in order."""
    results = [group for group in groups if group.row.state == "complete"]
    points = [group for group in groups if group.row.state == "selection"]
    begun = [group.runs.keys() | group.unfinished.keys() for group in results]
    attempts = Counter(seed for seeds in begun for seed in seeds)
    expected = {seed for seed, rows in attempts.items() if 2 * rows >= len(results)}
    for group in points:
        group.row = _point(group)
    gridded = mark_points(points, results)
    _set_settings(results, gridded)
    _set_settings(points)
    finished = [group for group in results if group.runs]
    for group in finished:
        group.row = _averaged(group, expected)
    set_differences(finished, gridded)
    sign = -1 if groups[0].row.greater_is_better else 1
    finished.sort(key=lambda g: (sign * (g.row.validation_score or 0), g.row.label))
    return finished + points


def _averaged(group: Group, expected: set[int]) -> Row:
    records = {seed: run.record for seed, run in sorted(group.runs.items()) if run.record}
    row = group.row

    def over_seeds(value: Callable[[Record], float | None], reduce: Callable[[list[float]], float]) -> float | None:
        known = [v for r in records.values() if (v := value(r)) is not None]
        return reduce(known) if known else None

    def count(value: Callable[[Record], float | None]) -> int | None:
        mean = over_seeds(value, statistics.fmean)
        return None if mean is None else round(mean)

    scores = [r.score for r in records.values() if r.score is not None]
    return replace(
        row,
        seeds=tuple(records),
        missing_seeds=tuple(sorted((expected | group.unfinished.keys()) - records.keys())),
        scores=tuple(scores),
        score=statistics.fmean(scores),
        score_std=spread(scores),
        score_half_width=half_width(scores),
        validation_score=over_seeds(lambda r: r.metrics.validation.get(row.metric), statistics.fmean),
        paper=paper.figure(row.method, row.hub_name, row.metric),
        further=tuple(_further(row, records.values())),
        trainable_parameters=count(lambda r: r.parameters.trainable),
        inference_parameters=count(lambda r: r.parameters.inference),
        time_s=over_seeds(lambda r: r.time.wall_s, statistics.fmean),
        peak_memory_mb=over_seeds(lambda r: r.memory.peak_mb, max),
        train_flops=over_seeds(lambda r: r.flops.train_total, statistics.fmean),
        inference_flops=over_seeds(lambda r: r.flops.eval_batch, statistics.fmean),
    )


def _further(row: Row, records: Iterable[Record]) -> Iterable[Further]:
    tests = [record.metrics.test for record in records]
    for score in dict.fromkeys(score for test in tests for score in test):
        if score not in (row.metric, "loss"):
            values = [test[score] for test in tests if score in test]
            figure = paper.figure(row.method, row.hub_name, score)
            yield Further(score, statistics.fmean(values), spread(values), figure)


def _point(group: Group) -> Row:
    scores = [*(run.record.score for run in group.runs.values() if run.record), *(None for _ in group.unfinished)]
    states = group.unfinished.values()
    return replace(
        group.row,
        seeds=tuple(sorted(group.runs)),
        missing_seeds=tuple(sorted(group.unfinished.keys() - group.runs.keys())),
        validation_score=mean_score(scores),
        reason="failed" if "failed" in states else "running" if states else "",
    )


def _set_settings(groups: Sequence[Group], gridded: Collection[str] = ()) -> None:
    """Name, for each row, the entries in which its recipe differs from another of its method.

    What a grid chose (`gridded`) is left out where the rows are told apart without it: a row then has the same name on
    every data set. What is superseded is told apart, and tells nothing apart.
    """
    for method in {group.row.method for group in groups}:
        siblings = [group for group in groups if group.row.method == method]
        recipes = [group.recipe for group in siblings if not group.row.superseded]
        standing, every = differing(recipes), differing(group.recipe for group in siblings)
        asked = sorted(standing - set(gridded))
        if len({tuple(printable(recipe.get(key)) for key in asked) for recipe in recipes}) == len(recipes):
            standing = set(asked)
        for group in siblings:
            keys = sorted(every if group.row.superseded else standing)
            settings = " ".join(f"{k.rpartition('.')[2]}={printable(group.recipe.get(k, 'none'))}" for k in keys)
            earlier = " (earlier choice)" * group.row.superseded
            group.row = replace(group.row, settings=settings + earlier)


def _data(record: Record) -> Source:
    """Return the data set of a run, with its configuration in its name."""
    name, settings = record.dataset.name, record.recipe.get("data")
    config = settings.get("config") if isinstance(settings, dict) else None
    return Source(name=f"{name} ({printable(config)})" if config else name, fingerprint=record.dataset.fingerprint)


def _identity(source: Source) -> tuple[str, str]:
    return source.name, source.fingerprint


def _labels(sources: Iterable[Source]) -> dict[tuple[str, str], str]:
    """Label each (name, fingerprint) by its name, and by the fingerprint where two things share the name."""
    identities = {_identity(s) for s in sources}
    uses = Counter(name for name, _ in identities)
    return {(name, mark): f"{name} [{mark[:8]}]" if uses[name] > 1 else name for name, mark in identities}


def _number(value: object) -> float | None:
    return float(value) if is_number(value) else None
