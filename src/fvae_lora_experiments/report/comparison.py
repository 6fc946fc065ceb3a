"""What the page shows of one comparison: tables, charts and facts."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fvae_lora_experiments.report.by_class import Classes, classes_of
from fvae_lora_experiments.report.charts import COLOURS, Dot, Line, Mark, line_chart, scatter_chart, spark, strip
from fvae_lora_experiments.report.numbers import factor, number, quantity, title, without_common_parents
from fvae_lora_experiments.report.rows import Group, Row
from fvae_lora_experiments.report.tables import (
    ComparedRows,
    Table,
    grid_key,
    grid_lines,
    grid_points,
    grid_tables,
    tables,
)
from fvae_lora_experiments.run.archive import CurvePoint, StoredRun
from fvae_lora_experiments.run.record import is_number, printable

POINTS_IN_A_MEAN = 120
POINTS_IN_A_SEED = 60
POINTS_IN_A_SPARK = 24
"""The points that a curve is thinned to, so that a page of 200 runs opens fast."""

CHARTED_COSTS: dict[str, Callable[[Row], float | None]] = {
    "FLOPs of training": lambda row: row.train_flops,
    "seconds": lambda row: row.time_s,
    "trainable parameters": lambda row: row.trainable_parameters,
    "parameters for inference": lambda row: row.inference_parameters,
}


@dataclass(frozen=True)
class Panel:
    """Charts that share a legend."""

    legend: Sequence[Mark]
    charts: Sequence[Markup]


@dataclass(frozen=True)
class Layer:
    """How each ELBO term of a layer developed: (curve, first, last value), or None if unknown."""

    name: str
    terms: Sequence[tuple[Markup, str, str] | None]


@dataclass(frozen=True)
class Elbo:
    """The ELBO terms of a row's layers."""

    label: str
    terms: Sequence[str]
    layers: Sequence[Layer]


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows of one comparison."""

    row: Row
    better: str
    """The direction of better scores in a chart of score against cost."""
    results: Table | None
    rows: Sequence[tuple[Row, Mark, Markup]]
    """For each row of `results`: the row, its mark, and the strip of its seeds."""
    scale: tuple[str, str]
    """The ends of the strips, formatted like scores."""
    tables: Sequence[Table]
    """The other tables of the results."""
    grids: Sequence[Table]
    grid_charts: Sequence[Panel]
    curves: Sequence[Panel]
    costs: Panel
    elbo: Sequence[Elbo]
    facts: dict[str, str]
    classes: Sequence[Classes]


def draw_comparison(groups: Sequence[Group], marks: dict[str, Mark]) -> Comparison:
    """Draw everything about the groups of one comparison; `marks` has a mark for each label and grid line."""
    finished = [group for group in groups if group.row.state == "complete"]
    points = [group.row for group in groups if group.row.state == "selection"]
    row = groups[0].row
    measured = tables(ComparedRows([group.row for group in finished], []))
    scores = [score for group in finished for score in group.row.scores]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    scale = factor(row.metric)
    by_mark = sorted(finished, key=lambda group: marks[group.row.label].number)
    return Comparison(
        row=row,
        better="up" if row.greater_is_better else "down",
        results=measured[0] if measured else None,
        rows=[(g.row, marks[g.row.label], strip(g.row.scores, low, high)) for g in finished],
        scale=(f"{scale * low:.1f}", f"{scale * high:.1f}"),
        tables=measured[1:],
        grids=grid_tables(points),
        grid_charts=list(_grid_charts(grid_points(points), marks)),
        curves=[panel for chunk in _chunks(by_mark) if (panel := _curves(chunk, marks)).charts],
        costs=_costs([group.row for group in by_mark], marks),
        elbo=[elbo for group in finished if (elbo := _elbo(group)).layers],
        facts=_facts([run for group in groups for run in group.runs.values()]),
        classes=[classes for group in finished if (classes := classes_of(group))],
    )


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[i : i + COLOURS] for i in range(0, len(items), COLOURS))


def _curves(groups: Sequence[Group], marks: dict[str, Mark]) -> Panel:
    charts = []
    metric = groups[0].row.metric
    for what, event, value, scale in (
        (f"Validation {title(metric)}", "validation", metric, factor(metric)),
        ("Training loss", "train", "loss", 1),
    ):
        lines = []
        for group in groups:
            logged = [run.curve(event, value) for run in group.runs.values()]
            seeds = [[(x, scale * y) for x, y in curve] for curve in logged if curve]
            if mean := mean_curve(seeds):
                faint = [thinned(seed, POINTS_IN_A_SEED) for seed in seeds] if seeds[1:] else []
                lines.append(Line(marks[group.row.label], thinned(mean, POINTS_IN_A_MEAN), faint))
        if lines:
            charts.append(line_chart(what, "epoch", lines))
    return Panel([marks[group.row.label] for group in groups], charts)


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """Average curves at each x that all of them have: else the mean would jump where one ends."""
    known = [dict(curve) for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, known))) if known else []
    return [(x, statistics.fmean(curve[x] for curve in known)) for x in shared]


def thinned(curve: Sequence[CurvePoint], points: int) -> list[CurvePoint]:
    """Replace neighbouring points by their mean, so that at most `points` remain."""
    size = max(1, math.ceil(len(curve) / points))
    chunks = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(statistics.fmean(x for x, _ in chunk), statistics.fmean(y for _, y in chunk)) for chunk in chunks]


def _grid_charts(points: Sequence[Row], marks: dict[str, Mark]) -> Iterator[Panel]:
    """Draw validation score against the value of the grid's key, the chosen point marked, without failed ones."""
    key = grid_key(points)
    values = sorted({value for row in points if is_number(value := dict(row.point).get(key))})
    for chunk in _chunks(list(grid_lines(points, key).items())):
        lines = []
        for name, line in chunk:
            scores = {x: row.validation_score for x, row in line.items() if is_number(x)}
            curve = {x: factor(points[0].metric) * score for x, score in scores.items() if score is not None}
            if curve:
                chosen = [(x, y) for x, y in curve.items() if line[x].chosen]
                lines.append(Line(marks[name], sorted(curve.items()), [], chosen))
        if lines:
            what = f"Validation {title(points[0].metric)}"
            chart = line_chart(what, key.rpartition(".")[2].replace("_", " "), lines, values)
            yield Panel([line.mark for line in lines], [chart])


def _costs(rows: Sequence[Row], marks: dict[str, Mark]) -> Panel:
    charts = []
    for name, cost in CHARTED_COSTS.items():
        dots = [
            Dot(marks[row.label], value, scale * row.score, scale * (row.score_std or 0))
            for row in rows
            for scale in [factor(row.metric)]
            if row.score is not None and (value := cost(row)) is not None
        ]
        if dots:
            charts.append(scatter_chart(f"Test {title(rows[0].metric)} against {name}", name, dots, quantity))
    return Panel([marks[row.label] for row in rows], charts)


def _elbo(group: Group) -> Elbo:
    seeds = [run.elbo() for run in group.runs.values()]
    layers = list(dict.fromkeys(layer for seed in seeds for layer in seed))
    terms = list(dict.fromkeys(term for seed in seeds for layer in seed.values() for term in layer))
    curves = {
        (layer, term): [seed[layer][term] for seed in seeds if term in seed.get(layer, {})]
        for layer in layers
        for term in terms
    }
    return Elbo(
        group.row.label,
        terms,
        [
            Layer(name, [_development(curves[layer, term]) for term in terms])
            for layer, name in zip(layers, without_common_parents(layers), strict=True)
        ],
    )


def _development(seeds: Sequence[list[CurvePoint]]) -> tuple[Markup, str, str] | None:
    mean = mean_curve(seeds)
    if not mean:
        return None
    shared = [x for x, _ in mean]
    at = [dict(seed) for seed in seeds]
    low = thinned([(x, min(seed[x] for seed in at)) for x in shared], POINTS_IN_A_SPARK)
    high = thinned([(x, max(seed[x] for seed in at)) for x in shared], POINTS_IN_A_SPARK)
    y_range = min(y for _, y in low), max(y for _, y in high)
    curve = spark(thinned(mean, POINTS_IN_A_SPARK), low, high, y_range)
    return curve, number(mean[0][1]), number(mean[-1][1])


def _facts(runs: Sequence[StoredRun]) -> dict[str, str]:
    """List facts on data, model and machine, each with every value that occurs in the runs."""
    records = [run.record for run in runs if run.record]
    facts = {
        "data": [f"{r.dataset.name}, SHA-256 {r.dataset.fingerprint[:12]}" for r in records],
        "protocol": [r.dataset.protocol for r in records],
        "splits": [_listing(r.dataset.splits) for r in records],
        "groups": [_listing({k: _listing(v) for k, v in r.dataset.groups.items()}) for r in records],
        "average over groups": [r.dataset.average for r in records],
        "note": [r.dataset.note or "" for r in records],
        "classes": [str(len(r.dataset.classes) or "") for r in records],
        "validation from": [r.dataset.validation_from for r in records],
        "test from": [r.dataset.test_from for r in records],
        "model": [f"{r.model.name}, SHA-256 {r.model.fingerprint[:12]}" for r in records],
        "parameters": [quantity(r.parameters.total) for r in records],
        "hardware": [_listing(r.hardware) for r in records],
        "versions": [_listing(r.versions) for r in records],
        "commit": [commit[:12] + "-dirty" * commit.endswith("-dirty") for r in records if (commit := r.git_commit)],
    }
    return {k: text for k, v in facts.items() if (text := "; ".join(filter(None, dict.fromkeys(v))))}


def _listing(value: Any) -> str:
    return printable(", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value)
