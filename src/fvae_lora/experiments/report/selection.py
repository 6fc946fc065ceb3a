"""Grids: which keys they vary, which point was chosen, and whether it lies on the edge."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fvae_lora.experiments.report.records import is_number, printable
from fvae_lora.experiments.report.rows import Group, Recipe, differing


def gridded_keys(points: Sequence[Group]) -> set[str]:
    """Return the keys in which the points of any one method differ."""
    methods = {group.row.method for group in points}
    return {key for method in methods for key in differing(g.recipe for g in points if g.row.method == method)}


def mark_points(points: Sequence[Group], results: Sequence[Group]) -> None:
    """Set where in its method's grid each point lies, which one was chosen, and on which edges that lies.

    Args:
        points: the points of the grids of one comparison, failed ones among them.
        results: the final runs of the same comparison, finished or not.

    """
    for method in dict.fromkeys(group.row.method for group in points):
        grid = [group for group in points if group.row.method == method]
        keys = sorted(differing(group.recipe for group in grid))
        finals = [group.recipe for group in results if group.row.method == method]
        chosen = [g for g in grid if any(_at(g.recipe, keys) == _at(final, keys) for final in finals)]
        best = chosen or _best(grid)
        for group in grid:
            is_chosen = any(group is other for other in best)
            group.row = replace(
                group.row,
                point=tuple((key, _value(group.recipe, key)) for key in keys),
                chosen=is_chosen,
                edge=tuple(key for key in keys if is_chosen and _on_edge(group, grid, key)),
            )


def _best(grid: Sequence[Group]) -> list[Group]:
    scored = [group for group in grid if group.row.validation_score is not None]
    sign = 1 if grid[0].row.greater_is_better else -1
    return [max(scored, key=lambda group: sign * (group.row.validation_score or 0))] if scored else []


def _on_edge(group: Group, grid: Sequence[Group], key: str) -> bool:
    values = sorted({value for other in grid if is_number(value := other.recipe.get(key))})
    return len(values) > 2 and group.recipe.get(key) in (values[0], values[-1])


def _at(recipe: Recipe, keys: Sequence[str]) -> list[Any]:
    return [recipe.get(key) for key in keys]


def _value(recipe: Recipe, key: str) -> float | str:
    value = recipe.get(key)
    return value if is_number(value) else printable(value) or "none"
