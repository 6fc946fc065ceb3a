"""From runs to rows: what may be averaged with what, and what must not be."""

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from fvae_lora_experiments.recipe import flatten
from fvae_lora_experiments.report import paper
from fvae_lora_experiments.report.baseline import Difference, differences
from fvae_lora_experiments.report.grids import Placement, read_grids
from fvae_lora_experiments.report.numbers import ci_half_width, factor, spread
from fvae_lora_experiments.report.rows import ExtraScore, Group, Measured, Row, State, Trials, differing
from fvae_lora_experiments.run.archive import StoredRun, read_runs
from fvae_lora_experiments.run.record import Record, SourceRecord, is_number, printable
from fvae_lora_experiments.schema import WITHOUT_EFFECT


def summary_rows(*placements: Path) -> list[Row]:
    """Return one row per recipe over its finished seeds and per point of a grid, then each run that is not counted.

    Rows that may be compared are together, results first, in the order of their validation score, never of test.

    Raises:
        UserError: as `read_runs`.

    """
    return [group.row for group in aggregate(read_runs(*placements))]


def aggregate(runs: Iterable[StoredRun]) -> list[Group]:
    """Group the runs whose recipes only differ in the seed, in the order of `summary_rows`."""
    trials, left_out = _gathered([_countable(run) for run in runs])
    compared = [
        _compared(list(alike)) for _, alike in groupby(sorted(trials, key=_comparison_key), key=_comparison_key)
    ]
    return [group for alike in compared for group in alike] + left_out


def _comparison_key(trials: Trials) -> tuple[str, ...]:
    return trials.measured.comparison_key


def _gathered(runs: Sequence[StoredRun]) -> tuple[list[Trials], list[Group]]:
    """Gather the runs of each recipe, and those that are not counted."""
    runs = _identified(runs)
    records = [run.record for run in runs if run.record]
    models, datasets = _labels(r.model for r in records), _labels(map(_data, records))
    found: dict[tuple[Measured, frozenset[tuple[str, str]]], Trials] = {}
    left_out = []
    for run in runs:
        record = run.record
        if record is None:
            left_out.append(Group(Row("unreadable", run=run.name, reason=run.error)))
            continue
        measured = Measured(
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
        )
        recipe = {k: v for k, v in flatten(run.recipe).items() if k not in NAMED_ELSEWHERE and v is not None}
        recipe = {printable(k): v for k, v in recipe.items()}
        if record.extended_from:  # its learning rate went another way than that of a run of so many epochs
            recipe["train.extended_from"] = " ".join(map(str, record.extended_from))
        key = measured, frozenset((k, printable(v)) for k, v in recipe.items())
        trials = found.setdefault(key, Trials(measured, recipe))
        if record.state != "complete":
            trials.unfinished.setdefault(record.seed, record.state)
            if record.state == "pruned":  # an outcome of a search, and in its table
                continue
            reason = record.reason or ("not finished" if record.state == "running" else "no reason recorded")
            left_out.append(_left_out(run, record.seed, trials, record.state, reason))
        elif first := trials.runs.get(record.seed):
            reason = f"the same recipe and seed as {first.name}"
            left_out.append(_left_out(run, record.seed, trials, "duplicate", reason))
        else:
            trials.runs[record.seed] = run
    return list(found.values()), left_out


def _left_out(run: StoredRun, seed: int, trials: Trials, state: State, reason: str) -> Group:
    measured, rate = vars(trials.measured) | {"state": state}, _learning_rate(trials)
    return Group(Row(**measured, learning_rate=rate, seeds=(seed,), run=run.name, reason=reason))


def _countable(run: StoredRun) -> StoredRun:
    """Mark a run as unreadable if its record claims to be complete and is not."""
    record = run.record
    if record is None or record.state != "complete":
        return run
    name, score = record.metric.name, record.score
    if score is None:
        error = f"complete, but without a {'validation' if record.is_selection else 'test'} {name}"
    elif record.metric.greater_is_better and factor(name) == 100 and abs(score) > 1:
        error = f"{name} is {score:g}, and not a fraction"
    else:
        return run
    return StoredRun(run.name, None, f"run.json: {error}")


def _identified(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """Fill in model and data of runs that ended before opening them, from other runs of the same recipe."""

    def asked(run: StoredRun) -> tuple[str, ...]:
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


NAMED_ELSEWHERE = {"task", "method", "model", "dataset", "seed", "purpose", *WITHOUT_EFFECT}
"""Keys that do not distinguish rows: model and data are identified by their contents instead."""


def _compared(trials: Sequence[Trials]) -> list[Group]:
    """Make the rows of one comparison, in their order."""
    results = [each for each in trials if each.measured.state == "complete"]
    points = [each for each in trials if each.measured.state == "selection"]
    begun = [each.runs.keys() | each.unfinished.keys() for each in results]
    attempts = Counter(seed for seeds in begun for seed in seeds)
    expected = {seed for seed, rows in attempts.items() if 2 * rows >= len(results)}
    grids = read_grids(points, results)
    settings = _settings(results, grids.superseded, grids.keys) | _settings(points)
    finished = [each for each in results if each.runs]
    compared = differences(finished, grids.superseded, grids.keys)
    rows = {
        each: _result(each, expected, settings[each], each in grids.superseded, compared.get(each, Difference()))
        for each in finished
    }
    sign = -1 if trials[0].measured.greater_is_better else 1
    finished.sort(key=lambda each: (sign * (rows[each].validation_score or 0), rows[each].label))
    rows |= {each: _point(each, settings[each], grids.placements[each]) for each in points}
    return [Group(rows[each], each.runs, each.recipe) for each in (*finished, *points)]


def _result(trials: Trials, expected: set[int], settings: str, superseded: bool, difference: Difference) -> Row:
    measured, records = trials.measured, trials.records

    def over_seeds(value: Callable[[Record], float | None], reduce: Callable[[list[float]], float]) -> float | None:
        known = [v for r in records if (v := value(r)) is not None]
        return reduce(known) if known else None

    def count(value: Callable[[Record], float | None]) -> int | None:
        mean = over_seeds(value, statistics.fmean)
        return None if mean is None else round(mean)

    scores = [r.score for r in records if r.score is not None]
    return Row(
        **vars(measured),
        settings=settings,
        learning_rate=_learning_rate(trials),
        seeds=tuple(sorted(trials.runs)),
        missing_seeds=tuple(sorted((expected | trials.unfinished.keys()) - trials.runs.keys())),
        scores=tuple(scores),
        score=statistics.fmean(scores),
        score_std=spread(scores),
        score_half_width=ci_half_width(scores),
        validation_score=over_seeds(lambda r: r.metrics.validation.get(measured.metric), statistics.fmean),
        pairs=difference.pairs,
        difference=difference.mean,
        difference_half_width=difference.half_width,
        paper=paper.figure(measured.method, measured.hub_name, measured.metric),
        extra_scores=tuple(_extra_scores(measured, records)),
        trainable_parameters=count(lambda r: r.parameters.trainable),
        inference_parameters=count(lambda r: r.parameters.inference),
        time_s=over_seeds(lambda r: r.time.wall_s, statistics.fmean),
        peak_memory_mb=over_seeds(lambda r: r.memory.peak_mb, max),
        train_flops=over_seeds(lambda r: r.flops.train_total, statistics.fmean),
        inference_flops=over_seeds(lambda r: r.flops.eval_batch, statistics.fmean),
        superseded=superseded,
    )


def _point(trials: Trials, settings: str, place: Placement) -> Row:
    states = trials.unfinished.values()
    reason = next((state for state in ("failed", "running", "pruned") if state in states), "")
    return Row(
        **vars(trials.measured),
        settings=settings,
        learning_rate=_learning_rate(trials),
        seeds=tuple(sorted(trials.runs)),
        missing_seeds=tuple(sorted(trials.unfinished.keys() - trials.runs.keys())),
        validation_score=trials.selection_score,
        point=place.point,
        chosen=place.chosen,
        edge=place.edge,
        reason=reason,
    )


def _extra_scores(measured: Measured, records: Sequence[Record]) -> Iterable[ExtraScore]:
    tests = [record.metrics.test for record in records]
    for score in dict.fromkeys(score for test in tests for score in test):
        if score not in (measured.metric, "loss"):
            values = [test[score] for test in tests if score in test]
            figure = paper.figure(measured.method, measured.hub_name, score)
            yield ExtraScore(score, statistics.fmean(values), spread(values), figure)


def _settings(
    trials: Sequence[Trials], superseded: Collection[Trials] = (), gridded: Collection[str] = ()
) -> dict[Trials, str]:
    """Name the entries in which each recipe differs from others of its method.

    Keys that a grid chose (`gridded`) are left out if the rows are distinct without them, so that a row has the same
    name on every data set. Superseded rows are named by all their entries, but do not make others longer.
    """
    named = {}
    for method in {each.measured.method for each in trials}:
        siblings = [each for each in trials if each.measured.method == method]
        recipes = [each.recipe for each in siblings if each not in superseded]
        standing, every = differing(recipes), differing(each.recipe for each in siblings)
        asked = sorted(standing - set(gridded))
        if len({tuple(printable(recipe.get(key)) for key in asked) for recipe in recipes}) == len(recipes):
            standing = set(asked)
        for each in siblings:
            keys = sorted(every if each in superseded else standing)
            settings = " ".join(f"{k.rpartition('.')[2]}={printable(each.recipe.get(k, 'none'))}" for k in keys)
            named[each] = settings + " (earlier choice)" * (each in superseded)
    return named


def _learning_rate(trials: Trials) -> float | None:
    rate = trials.recipe.get("train.learning_rate")
    return float(rate) if is_number(rate) else None


def _data(record: Record) -> SourceRecord:
    """Return the data set of a run, with its configuration in its name."""
    name, settings = record.dataset.name, record.recipe.get("data")
    config = settings.get("config") if isinstance(settings, dict) else None
    return SourceRecord(
        name=f"{name} ({printable(config)})" if config else name, fingerprint=record.dataset.fingerprint
    )


def _identity(source: SourceRecord) -> tuple[str, str]:
    return source.name, source.fingerprint


def _labels(sources: Iterable[SourceRecord]) -> dict[tuple[str, str], str]:
    """Label each (name, fingerprint) by its name, and by the fingerprint where two things share the name."""
    identities = {_identity(s) for s in sources}
    uses = Counter(name for name, _ in identities)
    return {(name, mark): f"{name} [{mark[:8]}]" if uses[name] > 1 else name for name, mark in identities}
