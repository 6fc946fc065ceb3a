"""Columns whose values are names: classes and groups."""

import math
import re
from collections.abc import Container, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, List

MISSING_TEXTS = frozenset(
    {"", "#N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""Texts that stand for no value, as pandas has them; of labels and groups alone, for a text may say anything."""

_WHOLE = re.compile(r"([+-]?(?:0|[1-9]\d*))(?:\.0*)?")


def class_names(rows: Dataset, column: str = "label") -> list[str]:
    """Names of the classes of a column, or of its lists of classes, in the order of their numbers; none without."""
    feature = rows.features.get(column)
    feature = feature.feature if isinstance(feature, List) else feature
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def names_in(rows: Dataset, column: str) -> list[str]:
    """Names in a column: those declared, or else the values that occur, in their order, each once."""
    if declared := class_names(rows, column):
        return declared
    names: dict[str, str] = {}
    for value in sorted(set(rows[column]), key=_order):
        names.setdefault(value_key(value), str(value).strip())
    return list(names.values())


def _order(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value.strip() if isinstance(value, str) else value


def value_key(value: Any) -> str:
    """The same for values that are the same label: 1, 1.0, "1" and " +1 "; blanks around a name do not count."""
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else text


def is_missing(value: Any, names: Container[str] = ()) -> bool:
    """Whether a value of such a column says that there is none.

    Args:
        value: the value.
        names: keys of values that are names for certain, whatever they look like: see `value_key`.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return value.strip() in MISSING_TEXTS and value_key(value) not in names
    return value == -1 and "-1" not in names


def as_classes(rows: Dataset, column: str, names: Sequence[str]) -> Dataset:
    """`rows` with the column's values as the numbers of their names in `names`."""
    feature, own = ClassLabel(names=list(names)), class_names(rows, column)
    if rows.features[column] == feature:
        return rows
    numbers = {value_key(name): number for number, name in enumerate(names)}
    numbered = [numbers[value_key(own[value] if own else value)] for value in rows[column]]
    return rows.remove_columns(column).add_column(column, numbered).cast_column(column, feature)
