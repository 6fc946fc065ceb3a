"""The report's tables and notes as plain text, which each format writes."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fvae_lora_experiments.report.baseline import BASELINE
from fvae_lora_experiments.report.cells import COSTS, extra_columns, minus_paper, result_columns, score
from fvae_lora_experiments.report.numbers import UNKNOWN, percent, shown, title
from fvae_lora_experiments.report.paper import paper, published
from fvae_lora_experiments.report.rows import Row


@dataclass(frozen=True)
class Table:
    """A heading for each column, and rows with as many cells; the first column names the row."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    """What a reader must know about it, a sentence or two each."""


@dataclass(frozen=True)
class ComparedRows:
    """The rows of one comparison: finished ones, and the points of their methods' grids."""

    rows: Sequence[Row]
    points: Sequence[Row]

    @property
    def any(self) -> Row:
        """Any of the rows, for what all have in common."""
        return (*self.rows, *self.points)[0]

    @property
    def name(self) -> str:
        """What was measured."""
        return " · ".join(filter(None, self.any.comparison_key[:4]))


def compared_rows(rows: Sequence[Row]) -> Iterator[ComparedRows]:
    """Yield the rows of each comparison."""
    counted = (row for row in rows if row.state in ("complete", "selection"))
    for _, alike in groupby(counted, key=lambda row: row.comparison_key):
        both = list(alike)
        yield ComparedRows(
            [row for row in both if row.state == "complete"], [row for row in both if row.state == "selection"]
        )


def uncounted(rows: Sequence[Row]) -> list[Row]:
    """Pick the runs that are in no number: failed, unfinished, unreadable or duplicate."""
    return [row for row in rows if row.state not in ("complete", "selection")]


def tables(compared: ComparedRows) -> list[Table]:
    """Return the tables of a comparison that are not empty, results first."""
    return [*_measured(compared.rows), *grid_tables(compared.points)]


def _measured(rows: Sequence[Row]) -> list[Table]:
    if not rows:
        return []
    made = (
        ("Test scores", result_columns(rows), _result_notes(rows)),
        (
            "Further test scores",
            extra_columns(rows),
            ["Mean ± sample standard deviation over seeds.", *_paper_note(rows)],
        ),
        ("Settings and cost", COSTS, [COST_NOTE]),
    )
    return [
        Table(
            what, ["method", *columns], [[row.label, *(cell(row) for cell in columns.values())] for row in rows], said
        )
        for what, columns, said in made
        if columns
    ]


def grid_tables(points: Sequence[Row]) -> list[Table]:
    """Return the table of validation scores over the grids of all methods, and that of searches, where there are any.

    The key that most methods vary (preferably the learning rate) goes across, others go down. Of a search, whose points
    share no values, the table has the best point alone.
    """
    searched = [row for row in points if row not in grid_points(points)]
    return [*_grid_table(grid_points(points)), *_search_table(searched)]


def grid_points(points: Sequence[Row]) -> list[Row]:
    """Pick the points of the methods whose points form a grid; in a search hardly two share a value."""
    found = []
    for _, alike in groupby(sorted(points, key=lambda row: row.method), key=lambda row: row.method):
        own = list(alike)
        lines = grid_lines(own, grid_key(own))
        if len(lines) < FEWEST_SEARCHED or any(len(line) > 1 for line in lines.values()):
            found += own
    return [row for row in points if row in found]


FEWEST_SEARCHED = 3
"""How many points it takes to tell a search from a grid."""


def _search_table(points: Sequence[Row]) -> list[Table]:
    lines = []
    for method in dict.fromkeys(row.method for row in points):
        own = [row for row in points if row.method == method]
        states = [sum(row.reason == state for row in own) for state in ("pruned", "failed", "running")]
        for row in own:
            if row.chosen:
                at = ", ".join(f"{key.rpartition('.')[2]}={_shown_value(value)}" for key, value in row.point)
                lines.append([method, str(len(own)), *map(str, states), _point(row).rstrip(" *"), at])
    if not lines:
        return []
    metric = title(points[0].metric)
    return [
        Table(
            f"Selection: the best validation {metric} of a search",
            ["method", "trials", "pruned", "failed", "running", metric, "at"],
            lines,
            ["Trials are judged on validation alone. No test score contains these runs."],
        )
    ]


def _shown_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _grid_table(points: Sequence[Row]) -> list[Table]:
    if not points:
        return []
    across = grid_key(points)
    values = sorted({_value(row, across) for row in points}, key=lambda value: (isinstance(value, str), value))
    lines = []
    for name, line in grid_lines(points, across).items():
        cells = {value: _point(row) for value, row in line.items()}
        edge = ", ".join(sorted({key.rpartition(".")[2] for row in line.values() for key in row.edge}))
        lines.append([name, *(cells.get(value, UNKNOWN) for value in values), edge and f"edge: {edge}"])
    heading = across.rpartition(".")[2].replace("_", " ")
    shown_values = [f"{value:g}" if isinstance(value, float | int) else value for value in values]
    what = f"Selection: validation {title(points[0].metric)} over {heading}"
    headings = ["method", *shown_values, "best at"]
    kept = len(headings) - (not any(row.edge for row in points))
    return [Table(what, headings[:kept], [line[:kept] for line in lines], _grid_notes(points))]


def grid_key(points: Sequence[Row]) -> str:
    """Return the key that the grids of most methods vary; the learning rate wins a tie."""
    keys = [key for row in points for key, _ in row.point]
    return max(sorted(set(keys)), key=lambda key: (keys.count(key), key == "train.learning_rate"), default="")


def grid_lines(points: Sequence[Row], across: str) -> dict[str, dict[float | str, Row]]:
    """Return, for each method and combination of its other gridded values, the points by their value of `across`."""
    lines: dict[str, dict[float | str, Row]] = {}
    for row in points:
        others = [f"{key.rpartition('.')[2]}={value}" for key, value in row.point if key != across]
        lines.setdefault(" ".join([row.method, *others]), {})[_value(row, across)] = row
    return lines


def _value(row: Row, key: str) -> float | str:
    return dict(row.point).get(key, "as it is")


def _point(row: Row) -> str:
    if row.validation_score is None:
        return row.reason
    return shown(row.metric, row.validation_score) + (" *" if row.chosen else "")


def overview_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table of data sets across and methods down for each model that has results on several data sets.

    The mean over the data sets is only given for methods with every seed on each of them. If the paper has figures for
    the same data sets, they follow in a separate table.
    """
    results = sorted((row for row in rows if row.state == "complete"), key=_family)
    made = []
    for _, family in groupby(results, key=_family):
        alike = list(family)
        datasets = {row.dataset: row.hub_name for row in alike}
        if len(datasets) > 1:
            made += [_overview(alike, list(datasets)), *_published(alike, datasets)]
    return made


def _family(row: Row) -> tuple[str, ...]:
    return row.task, row.model, row.protocol, row.metric


def _overview(rows: Sequence[Row], datasets: Sequence[str]) -> Table:
    found = {(row.label, row.dataset): row for row in rows}
    lines = []
    for label in sorted({row.label for row in rows}):
        line = [found.get((label, dataset)) for dataset in datasets]
        cells = [
            UNKNOWN if row is None else score(row) + (" (incomplete)" if row.missing_seeds else "") for row in line
        ]
        mean = _mean(line)
        lines.append([label, *cells, UNKNOWN if mean is None else shown(rows[0].metric, mean)])
    what = ", ".join(filter(None, (title(rows[0].metric), rows[0].protocol and f"protocol {rows[0].protocol}")))
    return Table(
        f"Overview: test {what}, {rows[0].model}",
        ["method", *map(_short, datasets), "mean"],
        lines,
        [
            "Mean ± sample standard deviation over seeds; the last column is the mean over the data sets, of methods "
            "that have every seed on every one of them."
        ],
    )


def _published(rows: Sequence[Row], datasets: dict[str, str]) -> list[Table]:
    """The paper's figures for the data sets of an overview, if one of its tables has them all, and ours minus these."""
    row = rows[0]
    found = published(row.hub_name, row.metric)
    if found is None:
        return []
    table, _ = found
    if not set(datasets.values()) <= set(table.datasets):
        return []
    means = table.means if set(datasets.values()) == set(table.datasets) else {}
    lines = []
    for method in {**table.figures, **means}:
        figures = [table.figure(method, dataset) for dataset in datasets.values()]
        lines.append([method, *map(percent, figures), percent(means.get(method))])
    what = f"The paper's own figures, not measured here: {table.setting}, %"
    made = [Table(what, ["method", *map(_short, datasets), "mean"], lines, [f"Source: {paper()[0]}."])]
    return [*made, *_minus_published(rows, datasets, means)]


def _minus_published(rows: Sequence[Row], datasets: dict[str, str], means: Mapping[str, float]) -> list[Table]:
    """Our means minus the paper's figures, for the methods that both have."""
    lines = []
    for label in sorted({row.label for row in rows}):
        own = {row.dataset: row for row in rows if row.label == label}
        line = [own.get(dataset) for dataset in datasets]
        cells = [UNKNOWN if row is None else minus_paper(row.metric, row.score, row.paper) for row in line]
        method = next(iter(own.values())).method
        cells.append(minus_paper(rows[0].metric, _mean(line), means.get(method)))
        if set(cells) != {UNKNOWN}:
            lines.append([label, *cells])
    if not lines:
        return []
    what = "Ours \N{MINUS SIGN} paper: our means minus the paper's figures, in points"
    note = "Where model, protocol or settings differ, it is not the same measurement; see the notes of each data set."
    return [Table(what, ["method", *map(_short, datasets), "mean"], lines, [note])]


def _mean(line: Sequence[Row | None]) -> float | None:
    """The mean score over the data sets, of a method with every seed on each of them."""
    whole = [row.score for row in line if row and row.score is not None and not row.missing_seeds]
    return statistics.fmean(whole) if len(whole) == len(line) else None


COST_NOTE = (
    "Time is the mean wall time and memory the largest peak; FLOPs are those of the whole training, and of a forward "
    "of one batch with the final model."
)


GROUP_NOTES = {
    "plain": "Groups: accuracy counts every row alike; gap is this average minus the accuracy of the worst group.",
    "train-weighted": "Groups: accuracy weights each group by its share of train (train-weighted); gap is this average "
    "minus the accuracy of the worst group.",
}


def _result_notes(rows: Sequence[Row]) -> list[str]:
    better = "higher" if rows[0].greater_is_better else "lower"
    metric = rows[0].metric.replace("_", " ")
    said = [
        f"Test {metric}, {better} is better: mean ± sample standard deviation over seeds, and half the width of the "
        f"95% confidence interval of the mean by Student's t. Each run selected its epoch by validation {metric}."
    ]
    if any(row.pairs for row in rows):
        said.append(
            f"vs {BASELINE}: the mean difference over pairs of the same seed on the same splits, and half the width of "
            "its 95% interval; the settings are the same but for the learning rate and what a grid chose."
        )
    if any(row.missing_seeds for row in rows):
        said.append("incomplete: a seed is missing that began and did not finish, or that other rows have.")
    said += [note for average, note in GROUP_NOTES.items() if any(row.average == average for row in rows)]
    said += [f"Warning: {note}." for note in dict.fromkeys(row.data_note for row in rows) if note]
    return said + (_paper_note(rows) if any(row.paper is not None for row in rows) else [])


def _paper_note(rows: Sequence[Row]) -> list[str]:
    if all(row.paper is None and all(score.paper is None for score in row.extra_scores) for row in rows):
        return []
    row, (source, _) = rows[0], paper()
    scores = [row.metric, *(score.name for row in rows for score in row.extra_scores)]
    settings = dict.fromkeys(found[0].setting for score in scores if (found := published(row.hub_name, score)))
    return [
        f"paper: as published in {source} ({'; '.join(settings)}), measured by its authors under their own protocol; "
        "ours \N{MINUS SIGN} paper: our mean minus their figure, in points. "
        f"Here: model {row.model}, protocol {row.protocol or 'not recorded'}. Where model, protocol or settings "
        "differ, it is not the same measurement."
    ]


def _grid_notes(points: Sequence[Row]) -> list[str]:
    return [
        "Means over the selection seeds, on validation alone. * is the point that was chosen; failed is one with a run "
        "that failed. No test score contains these runs.",
        *(
            f"Warning: the best {key.rpartition('.')[2]} of {row.method}, {dict(row.point)[key]}, lies on the edge of "
            f"its grid on {row.dataset}; a better one may lie outside."
            for row in points
            for key in row.edge
        ),
    ]


def _short(dataset: str) -> str:
    return dataset.rpartition("/")[2]
