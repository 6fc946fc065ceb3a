"""Grids: which keys they vary, which points were chosen, and whether these are on the edge."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from fvae_lora_experiments.report.rows import Trials, differing
from fvae_lora_experiments.run.record import is_number, printable
from fvae_lora_experiments.sweep.select import BestPoint, GridPoint, best_point

Values = tuple[float | str, ...]


@dataclass(frozen=True)
class Placement:
    """A point of a grid: the value of each key that its method's grid varies, and whether it was chosen."""

    point: tuple[tuple[str, float | str], ...]
    chosen: bool
    edge: tuple[str, ...]
    """If it was chosen, the keys of which it is on the edge."""


@dataclass(frozen=True)
class Grids:
    """The outcome of the grids in one comparison."""

    keys: Collection[str]
    """The keys whose values the grids chose."""
    placements: Mapping[Trials, Placement]
    superseded: Collection[Trials]
    """Results at a point that is no longer chosen, for example because the grid was widened."""


def read_grids(points: Sequence[Trials], results: Sequence[Trials]) -> Grids:
    """Find the placement of each point in its method's grid, which points are chosen, and on which edges they are.

    A key of which every value has final runs was compared rather than chosen: there is a choice for each of its
    values. Among equals the one with final runs is chosen.

    Args:
        points: the points of the grids of one comparison, including failed ones.
        results: the final runs of the same comparison, finished or not.

    """
    gridded: set[str] = set()
    placements: dict[Trials, Placement] = {}
    superseded: set[Trials] = set()
    for method in dict.fromkeys(point.measured.method for point in points):
        grid = [point for point in points if point.measured.method == method]
        finals = [result for result in results if result.measured.method == method]
        keys = sorted(differing(point.recipe for point in grid))
        chosen_from = [key for key in keys if not set(_at(grid, [key])) <= set(_at(finals, [key]))]
        gridded |= set(chosen_from)
        beside = dict(zip(grid, _at(grid, [key for key in keys if key not in chosen_from]), strict=True))
        best = {}
        for _, same in groupby(sorted(grid, key=lambda t: _text(beside[t])), key=lambda t: _text(beside[t])):
            alike = list(same)
            if found := _best(alike, finals, chosen_from):
                best[alike[found.index]] = found
        values = dict(zip(grid, _at(grid, keys), strict=True))
        for point, at in values.items():
            edge = tuple(best[point].edge) if point in best else ()
            placements[point] = Placement(tuple(zip(keys, at, strict=True)), point in best, edge)
        passed_over = {at for point, at in values.items() if point not in best}
        superseded |= {final for final, at in zip(finals, _at(finals, keys), strict=True) if at in passed_over}
    return Grids(gridded, placements, superseded)


def _best(grid: Sequence[Trials], finals: Sequence[Trials], keys: Sequence[str]) -> BestPoint | None:
    final_points = _at(finals, keys)
    points = [
        GridPoint({key: trials.recipe.get(key) for key in keys}, trials.selection_score, at in final_points)
        for trials, at in zip(grid, _at(grid, keys), strict=True)
    ]
    return best_point(points, grid[0].measured.greater_is_better)


def _text(values: Values) -> list[str]:
    return [str(value) for value in values]


def _at(trials: Sequence[Trials], keys: Sequence[str]) -> list[Values]:
    """Return each one's values of `keys`: numbers unchanged, anything else as text."""
    return [
        tuple(v if is_number(v := each.recipe.get(key)) else printable(v) or "none" for key in keys) for each in trials
    ]
