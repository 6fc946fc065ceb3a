"""Charts as inline SVG. Colours, dashes and fonts come from the style sheet: series n has the class `s<n % 8>`.

Coordinates are rounded to a tenth of a unit of the view box, so equal data gives equal text.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fvae_lora_experiments.run.archive import CurvePoint

HEIGHT = 280
LEFT, TOP, BOTTOM = 54, 12, 238

COLOURS, DASHES = 8, 3
MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # circle
    "M-4-4h8v8h-8z",  # square
    "M0-5.2 5 4H-5z",  # triangle
    "M0-6 5 0 0 6-5 0z",  # diamond
    "M0 5.2 5-4H-5z",  # triangle, down
    "M-1.7-5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5v-3.4h3.3z",  # plus
    "M-5-2.6h10v5.2h-10z",  # bar
    "M-2.6-5h5.2v10h-5.2z",  # post
)


@dataclass(frozen=True)
class Mark:
    """How a row looks in every chart: its number determines a colour, a dash and a marker."""

    label: str
    number: int

    @property
    def css(self) -> str:
        """The classes of its colour and dash."""
        return f"s{self.number % COLOURS} d{self.number // COLOURS % DASHES}"

    @property
    def outline(self) -> str:
        """The outline of its marker, around the origin."""
        return MARKERS[(self.number + self.number // COLOURS) % len(MARKERS)]


@dataclass(frozen=True)
class Line:
    """A row's curve, the curves of its seeds, and the points with a marker; by default its end."""

    mark: Mark
    mean: Sequence[CurvePoint]
    seeds: Sequence[Sequence[CurvePoint]]
    marked: Sequence[CurvePoint] = ()


@dataclass(frozen=True)
class Dot:
    """A row's point; `spread` is half the height of its error bar."""

    mark: Mark
    x: float
    y: float
    spread: float


def line_chart(title: str, x_label: str, lines: Sequence[Line], ticks: Sequence[float] = ()) -> Markup:
    """Draw the seeds of each line faint, and its mean bold with its marker.

    With `ticks`, x is labelled at these values, and logarithmic if they span a factor of ten.
    """
    everything = [point for line in lines for curve in (*line.seeds, line.mean) for point in curve]
    x = Axis.linear([point[0] for point in everything], LEFT, 440)
    if ticks:
        x = Axis(min(ticks), max(ticks), LEFT + 12, 440, [(t, f"{t:g}") for t in ticks], log=_wide(ticks))
    y = Axis.linear([point[1] for point in everything], BOTTOM, TOP)
    seeds = [
        Markup('<path class="seed {}" d="{}"/>').format(line.mark.css, _path(x, y, seed))
        for line in lines
        for seed in line.seeds
    ]
    means = [
        Markup('<g class="{}"><title>{}</title><path class="mean" d="{}"/>{}</g>').format(
            line.mark.css,
            line.mark.label,
            _path(x, y, line.mean),
            Markup().join(_marker(line.mark, x(at[0]), y(at[1])) for at in line.marked or line.mean[-1:]),
        )
        for line in lines
    ]
    return _chart(title, x_label + (", log scale" if x.log else ""), x, y, seeds + means)


def scatter_chart(
    title: str, x_label: str, dots: Sequence[Dot], unit: Callable[[float], str], linear: bool = False
) -> Markup:
    """Draw dots with their error bars; x is logarithmic if it spans a factor of ten, unless it is to be `linear`."""
    costs = [dot.x for dot in dots]
    x = (Axis.logarithmic if _wide(costs) and not linear else Axis.linear)(costs, LEFT + 12, 320, unit)
    y = Axis.linear([dot.y + end for dot in dots for end in (-dot.spread, dot.spread)], BOTTOM - 12, TOP)
    marks = [
        Markup('<g class="{}"><title>{}</title><path class="bar" d="M{} {}V{}"/>{}</g>').format(
            dot.mark.css,
            f"{dot.mark.label}: {dot.y:.2f}{f' ± {dot.spread:.2f}' if dot.spread else ''} at {unit(dot.x)}",
            x(dot.x),
            y(dot.y - dot.spread),
            y(dot.y + dot.spread),
            _marker(dot.mark, x(dot.x), y(dot.y)),
        )
        for dot in dots
    ]
    return _chart(title, x_label + (", log scale" if x.log else ""), x, y, marks)


def cloud(title: str, kinds: Sequence[tuple[Mark, Sequence[tuple[float, float]]]]) -> Markup:
    """Draw points without scales, those of each mark in its colour and shape, which `markers` defines on the page."""
    points = [point for _, of_kind in kinds for point in of_kind]
    x = Axis.linear([point[0] for point in points], 8, 232)
    y = Axis.linear([point[1] for point in points], 172, 8)
    drawn = Markup().join(
        Markup('<path class="cloud" style="marker:url(#{})" d="{}"/>').format(marker_name(mark), _path(x, y, of_kind))
        for mark, of_kind in kinds
        if of_kind
    )
    return Markup(
        "<figure><figcaption>{}</figcaption>"
        '<svg class="chart" viewBox="0 0 240 180" role="img" aria-label="{}">'
        '<path class="grid" d="M0 0H240V180H0z"/>{}</svg></figure>'
    ).format(title, title, drawn)


def markers(marks: Sequence[Mark]) -> Markup:
    """Define the markers of `cloud`, once on a page."""
    made = Markup().join(
        Markup(
            '<marker id="{}" class="{}" viewBox="-7 -7 14 14" markerWidth="8" markerHeight="8" '
            'markerUnits="userSpaceOnUse"><path class="point" d="{}"/></marker>'
        ).format(marker_name(mark), mark.css, mark.outline)
        for mark in marks
    )
    return Markup('<svg class="markers" width="0" height="0" aria-hidden="true"><defs>{}</defs></svg>').format(made)


def marker_name(mark: Mark) -> str:
    """The id of its marker."""
    return f"m{mark.number}"


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 10


def strip(scores: Sequence[float], low: float, high: float) -> Markup:
    """Draw the scores of a row's seeds as dots and their mean as a tick, on a scale from `low` to `high`."""
    x = Axis(low, high, 6, 134)
    dots = Markup().join(Markup('<circle cx="{}" cy="9" r="3.5"/>').format(x(score)) for score in scores)
    return Markup(
        '<svg class="strip" viewBox="0 0 140 18" aria-hidden="true"><path class="rail" d="M2 9H138"/>{}'
        '<path class="tick" d="M{} 1V17"/></svg>'
    ).format(dots, x(statistics.fmean(scores)))


def spark(
    mean: Sequence[CurvePoint], low: Sequence[CurvePoint], high: Sequence[CurvePoint], y_range: tuple[float, float]
) -> Markup:
    """Draw a small curve with the range over seeds behind it; three curves on the same x."""
    x, y = Axis(mean[0][0], mean[-1][0], 1, 119), Axis(*y_range, 31, 1)
    band = _path(x, y, [*low, *reversed(high)])
    return Markup(
        '<svg class="spark" viewBox="0 0 120 32" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="band" d="{}z"/><path class="mean" d="{}"/></svg>'
    ).format(band, _path(x, y, mean))


def swatch(mark: Mark) -> Markup:
    """Draw the line and the marker of a row, for a legend."""
    return Markup(
        '<svg class="swatch {}" viewBox="0 0 34 14" aria-hidden="true"><path class="mean" d="M0 7H34"/>{}</svg>'
    ).format(mark.css, _marker(mark, 17, 7))


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` onto coordinates from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[tuple[float, str]] = ()
    log: bool = False

    @classmethod
    def linear(
        cls, values: Sequence[float], start: float, end: float, unit: Callable[[float], str] = "{:.6g}".format
    ) -> "Axis":
        """Span `values`, with ticks at round numbers."""
        low, high = min(values), max(values)
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
            low, high = low - (abs(low) or 1) / 20, high + (abs(high) or 1) / 20
        step = _round_step((high - low) / 5)
        ticks = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        return cls(low, high, start, end, [(t, unit(t)) for t in ticks])

    @classmethod
    def logarithmic(cls, values: Sequence[float], start: float, end: float, unit: Callable[[float], str]) -> "Axis":
        """Span positive `values` by their logarithm, with ticks at powers of ten."""
        low, high = min(values), max(values)
        powers = [10.0**i for i in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        return cls(low, high, start, end, [(p, unit(p)) for p in powers], log=True)

    def __call__(self, value: float) -> float:
        """Return the coordinate of `value`."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        part = (scale(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + part * (self.end - self.start), 1)


def _chart(title: str, x_label: str, x: Axis, y: Axis, marks: Sequence[Markup]) -> Markup:
    right = x.end + 12
    rows = [
        Markup('<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" text-anchor="end">{}</text>').format(
            LEFT, y(value), right, LEFT - 7, y(value) + 4, text
        )
        for value, text in y.ticks
    ]
    columns = [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x(value), BOTTOM + 18, text)
        for value, text in x.ticks
    ]
    axis = Markup('<path class="axis" d="M{} {}H{}"/><text x="{}" y="{}" text-anchor="end">{}</text>').format(
        LEFT, BOTTOM, right, right, HEIGHT - 6, x_label
    )
    return Markup(
        "<figure><figcaption>{}</figcaption>"
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(title, right, HEIGHT, f"{title}, by {x_label}", Markup().join([*rows, *columns, axis, *marks]))


def _marker(mark: Mark, x: float, y: float) -> Markup:
    return Markup('<path class="point" transform="translate({:g} {:g})" d="{}"/>').format(x, y, mark.outline)


def _path(x: Axis, y: Axis, curve: Sequence[CurvePoint]) -> str:
    return "M" + " ".join(f"{x(px):g} {y(py):g}" for px, py in curve)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))
