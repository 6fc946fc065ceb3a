"""Grids: which keys they vary, which points were chosen, and whether these lie on the edge."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from fvae_lora.experiments.record import is_number, printable
from fvae_lora.experiments.report.rows import Group, differing
from fvae_lora.experiments.select import Point, best_point


def mark_points(points: Sequence[Group], results: Sequence[Group]) -> set[str]:
    """Set where in its method's grid each point lies, which ones are chosen, and on which edges those lie.

    A key whose every value has final runs was not chosen from but compared, beside the grid: there is a choice for
    each of its values. Among equals the one with final runs is chosen. Final runs at a point that is not chosen, for
    example because the grid has become wider since, are marked as superseded.

    Args:
        points: the points of the grids of one comparison, with their validation scores; failed ones among them.
        results: the final runs of the same comparison, finished or not.

    Returns:
        The keys that the grids chose from.

    """
    gridded = set()
    for method in dict.fromkeys(group.row.method for group in points):
        grid = [group for group in points if group.row.method == method]
        finals = [group for group in results if group.row.method == method]
        keys = sorted(differing(group.recipe for group in grid))
        chosen_from = [key for key in keys if not set(_at(grid, [key])) <= set(_at(finals, [key]))]
        gridded |= set(chosen_from)
        compared = [key for key in keys if key not in chosen_from]
        for group, point in zip(grid, _at(grid, keys), strict=True):
            group.row = replace(group.row, point=tuple(zip(keys, point, strict=True)))

        def part(group: Group, keys: Sequence[str] = compared) -> list[str]:
            return [str(value) for key, value in group.row.point if key in keys]

        for _, same in groupby(sorted(grid, key=part), key=part):
            _choose(list(same), finals, chosen_from)
        passed_over = {group.row.point for group in grid if not group.row.chosen}
        for final in finals:
            if tuple(zip(keys, _at([final], keys)[0], strict=True)) in passed_over:
                final.row = replace(final.row, superseded=True)
    return gridded


def _choose(grid: Sequence[Group], finals: Sequence[Group], keys: Sequence[str]) -> None:
    final_points = _at(finals, keys)
    points = [
        Point({key: group.recipe.get(key) for key in keys}, group.row.validation_score, at in final_points)
        for group, at in zip(grid, _at(grid, keys), strict=True)
    ]
    if found := best_point(points, grid[0].row.greater_is_better):
        best = grid[found.index]
        best.row = replace(best.row, chosen=True, edge=tuple(found.edge))


def _at(groups: Sequence[Group], keys: Sequence[str]) -> list[tuple[float | str, ...]]:
    """Return the values of `keys` of each group: numbers as they are, anything else as text."""
    recipes = [group.recipe for group in groups]
    return [
        tuple(v if is_number(v := recipe.get(key)) else printable(v) or "none" for key in keys) for recipe in recipes
    ]
