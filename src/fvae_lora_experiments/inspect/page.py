"""An inspection as one self-contained HTML page, in the report's style."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from fvae_lora_experiments.inspect.inputs import Known
from fvae_lora_experiments.inspect.inspection import Inspection
from fvae_lora_experiments.inspect.measure import LATENTS, Layer
from fvae_lora_experiments.report.charts import Line, Mark, cloud, line_chart, markers
from fvae_lora_experiments.report.comparison import Panel
from fvae_lora_experiments.report.html import fill
from fvae_lora_experiments.report.numbers import number
from fvae_lora_experiments.run.record import printable

CLASSES = 12
"""Classes that are told apart in a projection; rows of rarer ones are left out of it."""
PARTS = 4
"""Equally many rows of each are told apart where what is known is a number."""
OPEN = 24
"""With more layers the tables and each layer's projections are folded away."""
MARKED = 24
"""With more layers each kind of module has a chart of its own, and only the ends of lines have markers."""
LOWEST = -100.0
"""Where shares of variance are cut off in a chart, in percent."""
BOTH, Z1, Z2, GUESS = (Mark(name, i) for i, name in enumerate(("both", "z1", "z2", "a guess")))


@dataclass(frozen=True)
class Drawn:
    """A layer's projections."""

    name: str
    charts: Sequence[Markup]


@dataclass(frozen=True)
class Kinds:
    """The marks of the rows that are shown, (shown,); None where a row is not drawn."""

    marks: Sequence[Mark]
    of_rows: Sequence[Mark | None]
    note: str = ""


def render(inspection: Inspection) -> str:
    """The page."""
    measured = inspection.measured
    kinds = {name: _kinds(name, asked.known, measured.shown) for name, asked in measured.questions.items()}
    if not kinds:
        only = Mark("a row", 0)
        kinds = {"row": Kinds([only], [only] * len(measured.shown))}
    drawn = [Drawn(layer.name, _clouds(layer, kinds, len(measured.shown))) for layer in measured.layers]
    return fill(
        "inspection.html",
        name=printable(inspection.source.path.resolve().name),
        data=printable(inspection.inputs.name),
        rows=measured.rows,
        warnings=inspection.warnings,
        said=inspection.notes,
        panels=_panels(inspection),
        tables=inspection.tables(),
        markers=markers(max((kind.marks for kind in kinds.values()), key=len)),
        legends={f"By {name}": kind.marks for name, kind in kinds.items()},
        cloud_notes=[kind.note for kind in kinds.values() if kind.note],
        layers=drawn,
        open_below=OPEN,
        facts={name: printable(value) for name, value in inspection.facts.items()},
    )


def _kinds(name: str, known: Known, shown: np.ndarray) -> Kinds:
    values = known.values[shown]
    if not known.classes:
        edges = np.quantile(values, np.linspace(0, 1, PARTS + 1))
        marks = [Mark(f"{number(edges[i])} to {number(edges[i + 1])}", i) for i in range(PARTS)]
        part = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, PARTS - 1)
        return Kinds(marks, [marks[i] for i in part])
    counts = Counter(known.values.tolist())
    frequent = sorted(sorted(counts, key=lambda value: (-counts[value], value))[:CLASSES])
    found = {value: Mark(printable(known.classes[value]), i) for i, value in enumerate(frequent)}
    note = f"Only rows of the {CLASSES} most frequent of {len(counts)} kinds of {name} are drawn."
    return Kinds(list(found.values()), [found.get(int(v)) for v in values], note if len(counts) > CLASSES else "")


def _clouds(layer: Layer, kinds: Mapping[str, Kinds], shown: int) -> list[Markup]:
    charts = []
    for latent in LATENTS:
        projection = layer.latents[latent].projection
        if projection is None or len(projection.points) != shown:
            continue
        share = " + ".join(f"{part:.0%}" for part in projection.explained)
        for name, kind in kinds.items():
            points = [
                (mark, [p for p, own in zip(projection.points, kind.of_rows, strict=True) if p and own is mark])
                for mark in kind.marks
            ]
            if any(of_kind for _, of_kind in points):
                charts.append(cloud(f"{latent} by {name}, {share}", points))
    return charts


def _panels(inspection: Inspection) -> list[Panel]:
    layers = inspection.measured.layers
    if len(layers) < 2:
        return []
    panels = [
        _panel(
            "Input's variance that the decoder explains, %",
            layers,
            {
                BOTH: lambda layer: max(LOWEST, 100 * layer.r2),
                Z1: lambda layer: max(LOWEST, 100 * layer.r2_z1),
                Z2: lambda layer: max(LOWEST, 100 * layer.r2_z2),
            },
        ),
        _panel(
            "Active units, %",
            layers,
            {
                Z1: lambda layer: 100 * layer.z1.active / layer.z1.units,
                Z2: lambda layer: 100 * layer.z2.active / layer.z2.units,
            },
        ),
    ]
    for name, asked in inspection.measured.questions.items():
        if asked.reason:
            continue
        lines: dict[Mark, Callable[[Layer], float | None]] = {
            Z1: lambda layer, name=name: _score(layer, "z1", name),  # type: ignore[misc]
            Z2: lambda layer, name=name: _score(layer, "z2", name),  # type: ignore[misc]
            GUESS: lambda _, chance=asked.chance: 100 * chance,  # type: ignore[misc]
        }
        panels.append(_panel(f"{name.capitalize()} read from a latent, {asked.metric}, %", layers, lines))
    return panels


def _score(layer: Layer, latent: str, name: str) -> float | None:
    score = layer.latents[latent].probes[name]
    return None if score is None else 100 * score.mean


def _panel(title: str, layers: Sequence[Layer], lines: Mapping[Mark, Callable[[Layer], float | None]]) -> Panel:
    few = len(layers) <= MARKED
    of_kinds: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        of_kinds["" if few else layer.name.rpartition(".")[2]].append(layer)
    ticks = list(range(1, len(layers) + 1)) if len(layers) < 6 else []
    charts, marks = [], set()
    for kind, of_kind in of_kinds.items():
        if drawn := _lines(of_kind, lines, marked=few):
            name, x_label = title, "adapted layer, as in the table"
            if kind:
                name, x_label = f"{title}: {kind}", f"{kind}, in the table's order"
            charts.append(line_chart(name, x_label, drawn, ticks))
            marks |= {line.mark for line in drawn}
    return Panel([mark for mark in lines if mark in marks], charts)


def _lines(
    layers: Sequence[Layer], lines: Mapping[Mark, Callable[[Layer], float | None]], *, marked: bool
) -> list[Line]:
    drawn = []
    for mark, value in lines.items():
        points = [(float(i), y) for i, layer in enumerate(layers, 1) if (y := value(layer)) is not None and y == y]
        if points:
            drawn.append(Line(mark, points, [], points if marked and mark != GUESS else ()))
    return drawn
