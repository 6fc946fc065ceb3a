"""What searches have found, as tables in the terminal and as one HTML page, without scripts or requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from fvae_lora_experiments.places import short_name
from fvae_lora_experiments.recipe import as_yaml, flatten
from fvae_lora_experiments.report.charts import Dot, Line, Mark, line_chart, scatter_chart
from fvae_lora_experiments.report.html import fill
from fvae_lora_experiments.report.numbers import UNKNOWN, factor, shown, title
from fvae_lora_experiments.report.tables import Table
from fvae_lora_experiments.report.terminal import print_grid
from fvae_lora_experiments.run.archive import CurvePoint, folder_name
from fvae_lora_experiments.run.folder import write_atomically
from fvae_lora_experiments.tune.outcome import FEWEST, Search, TrialResult

FINISHED, PRUNED, BEST = Mark("finished", 0), Mark("pruned, its best until then", 1), Mark("the best", 2)


def print_searches(searches: Sequence[Search], console: Console) -> None:
    """Prints the best point of each method and how much each knob mattered."""
    tables = [_overview(searches), *map(_knobs, searches)]
    for table in tables:
        print_grid(table, console)
    for note in dict.fromkeys(note for table in tables for note in table.notes):
        console.print(Text(note, style="yellow" if note.startswith("Warning") else "dim"))


def _overview(searches: Sequence[Search]) -> Table:
    metric = searches[0].metric
    rows = []
    for search in searches:
        best = search.best
        found = (UNKNOWN, UNKNOWN) if best is None else (shown(metric, best.score or 0), str(best.number))
        rows.append((search.method, *found, *(str(search.count(state)) for state in ("complete", "pruned", "running"))))
    headings = ["method", title(metric), "trial", "finished", "pruned", "unfinished"]
    return Table("The best on validation", headings, rows)


def _knobs(search: Search) -> Table:
    own, best, key_notes = flatten(search.plan.recipe.model_dump()), search.best, []
    rows = [
        (
            key,
            _value(best.values[key]) if best else UNKNOWN,
            _value(own[key]),
            f"{search.importances[key]:.2f}" if key in search.importances else UNKNOWN,
            str(knob),
        )
        for key, knob in search.plan.space.items()
    ]
    if best is not None:
        key_notes = [
            f"Warning: the best {key} of {search.method}, {_value(best.values[key])}, lies on the edge of its range; a "
            f"better one may lie outside (--knobs {key}=LOW:HIGH and another --out)."
            for key in search.at_edge
        ]
    headings = ["knob", "best", "recipe", "importance", "searched"]
    return Table(f"Knobs of {search.method}", headings, rows, [*key_notes, _importance_note(search)])


def _importance_note(search: Search) -> str:
    if not search.importances:
        return f"Importance: known once {FEWEST} trials of a method are finished, unless all score the same."
    return (
        "Importance (PED-ANOVA): how far the values of the best tenth of the finished trials differ from those of all; "
        "the sum is 1. With few trials it is a hint."
    )


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else as_yaml(value)


@dataclass(frozen=True)
class _Section:
    """What the page shows of one method."""

    method: str
    seed: int
    knobs: Table
    trials: Table
    charts: Sequence[Markup]
    marks: Sequence[Mark] = (FINISHED, PRUNED, BEST)


def write_page(searches: Sequence[Search], out: Path) -> Path:
    """Writes the page of all searches to the file `out`, and returns it."""
    recipe, metric = searches[0].plan.recipe, searches[0].metric
    curves = [(Mark(search.method, i), _best_so_far(search)) for i, search in enumerate(searches)]
    lines = [Line(mark, curve, []) for mark, curve in curves if curve]
    page = fill(
        "tune.html",
        folder=folder_name(out.parent),
        what=f"{recipe.task} · {short_name(recipe.dataset)} · {recipe.data.protocol} · {short_name(recipe.model)}",
        history=line_chart(f"Best validation {title(metric)} so far", "trial", lines) if lines else "",
        history_marks=[line.mark for line in lines],
        overview=_overview(searches),
        searches=[_section(search) for search in searches],
    )
    write_atomically(out, page)
    return out


def _best_so_far(search: Search) -> list[CurvePoint]:
    best = max if search.greater_is_better else min
    curve: list[CurvePoint] = []
    for trial in search.trials:
        if trial.score is not None:
            score = factor(search.metric) * trial.score
            curve.append((trial.number, best(score, curve[-1][1]) if curve else score))
    return curve


def _section(search: Search) -> _Section:
    space = search.plan.space
    rows = [
        (
            str(trial.number),
            UNKNOWN if trial.score is None else shown(search.metric, trial.score),
            *(_value(trial.values[key]) for key in space),
            "unfinished" if trial.state == "running" else trial.reason,
        )
        for trial in search.trials
    ]
    headings = ["trial", title(search.metric), *map(_short, space), ""]
    trials = Table(f"All {len(rows)} trials of {search.method}", headings, rows)
    charts = [_chart(search, key) for key in space] if search.best else []
    return _Section(search.method, search.plan.seed, _knobs(search), trials, charts)


def _chart(search: Search, key: str) -> Markup:
    """The validation score of each trial over the value of a knob."""
    dots = [
        Dot(mark, float(trial.values[key]), factor(search.metric) * score, 0)
        for trial in sorted(search.trials, key=lambda trial: trial == search.best)  # so that nothing hides the best
        for mark, score in _scores(trial, search)
    ]
    knob = search.plan.space[key]
    unit = (lambda x: {0.0: "false", 1.0: "true"}.get(round(x, 6), "")) if knob.kind == "switch" else "{:.3g}".format
    return scatter_chart(key, _short(key), dots, unit, linear=not knob.log)


def _scores(trial: TrialResult, search: Search) -> list[tuple[Mark, float]]:
    if trial.score is not None:
        return [(BEST if trial == search.best else FINISHED, trial.score)]
    return [(PRUNED, trial.curve[-1][1])] if trial.state == "pruned" and trial.curve else []


def _short(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")
