"""Columns whose values are names: classes and groups."""

import math
import re
from collections.abc import Container, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, List

MISSING_TEXTS = frozenset(
    {"", "#N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""What pandas takes for a missing value; here only in labels and groups, for an input may be any text."""

_WHOLE = re.compile(r"([+-]?(?:0|[1-9]\d*))(?:\.0*)?")


def class_names(rows: Dataset, column: str = "label") -> list[str]:
    """Names of the classes of a column, or of its lists of classes, in the order of their numbers; none for others."""
    feature = rows.features.get(column)
    feature = feature.feature if isinstance(feature, List) else feature
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def names_in(rows: Dataset, column: str) -> list[str]:
    """Names in a column: those declared, or else the distinct values, sorted."""
    if declared := class_names(rows, column):
        return declared
    names: dict[str, str] = {}
    for value in sorted(set(rows[column]), key=_order):
        names.setdefault(value_key(value), str(value).strip())
    return list(names.values())


def _order(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value.strip() if isinstance(value, str) else value


def value_key(value: Any) -> str:
    """A key that is equal for values that are the same label: 1, 1.0, "1" and " +1 "."""
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else text


def is_missing(value: Any, names: Container[str] = ()) -> bool:
    """Whether a value in a column of labels or groups stands for a missing one.

    Args:
        value: the value.
        names: the `value_key` of values that are names although they look like missing ones.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return value.strip() in MISSING_TEXTS and value_key(value) not in names
    return value == -1 and "-1" not in names


def as_classes(rows: Dataset, column: str, names: Sequence[str]) -> Dataset:
    """`rows` with each value of the column as its number in `names`."""
    feature, own = ClassLabel(names=list(names)), class_names(rows, column)
    if rows.features[column] == feature:
        return rows
    numbers = {value_key(name): number for number, name in enumerate(names)}
    numbered = [numbers[value_key(own[value] if own else value)] for value in rows[column]]
    return rows.remove_columns(column).add_column(column, numbered).cast_column(column, feature)
