"""Columns whose values are names: classes and groups."""

from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, List


def class_names(rows: Dataset, column: str = "label") -> list[str]:
    """Names of the classes of a column, or of its lists of classes, in the order of their numbers; none without."""
    feature = rows.features.get(column)
    feature = feature.feature if isinstance(feature, List) else feature
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def names_in(rows: Dataset, column: str) -> list[str]:
    """Names in a column: those declared, or else the values that occur, in their order."""
    return class_names(rows, column) or [str(value) for value in sorted(set(rows[column]), key=_order)]


def _order(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value


def missing(value: Any) -> bool:
    """Whether a value of such a column says that there is none."""
    return value is None or value in (-1, "")


def as_classes(rows: Dataset, column: str, names: Sequence[str]) -> Dataset:
    """`rows` with the column's values as the numbers of their names in `names`."""
    feature, own = ClassLabel(names=list(names)), class_names(rows, column)
    if rows.features[column] == feature:
        return rows
    numbers = [feature.str2int(own[value] if own else str(value)) for value in rows[column]]
    return rows.remove_columns(column).add_column(column, numbers).cast_column(column, feature)
