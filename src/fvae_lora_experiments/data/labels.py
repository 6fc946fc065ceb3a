"""Labels: classes that are the same in all splits, or numbers."""

import math
from collections.abc import Collection, Container, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from datasets import Dataset, Value

from fvae_lora_experiments.data.classes import as_classes, class_names, is_missing, names_in, value_key
from fvae_lora_experiments.data.columns import check_values
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.groups import number_groups
from fvae_lora_experiments.errors import NoClassesError, UserError
from fvae_lora_experiments.schema import DataSettings


def drop_unlabelled(splits: Mapping[str, Dataset], settings: DataSettings, notes: Notes) -> dict[str, Dataset]:
    """Without the splits that have no label at all: some benchmarks keep those of their test split to themselves."""
    names = _certain_names(splits, settings)
    unlabelled = [
        split
        for split, rows in splits.items()
        if split != "train" and all(is_missing(label, names) for label in rows["label"])
    ]
    for split in unlabelled:
        notes.leave_out("no label is known", f"split {split}", len(splits[split]))
    return {split: rows for split, rows in splits.items() if split not in unlabelled}


def _certain_names(splits: Mapping[str, Dataset], settings: DataSettings) -> set[str]:
    """Labels that are names although they look like missing values: the recipe's classes, and -1 beside +1."""
    names = {value_key(name) for name in settings.classes or []}
    labels = splits["train"]["label"] if not class_names(splits["train"]) else []
    occurring = {value_key(label) for label in labels if isinstance(label, str | int | float)}
    return names | (occurring if occurring == {"-1", "1"} else set())


def with_classes(
    name: str, splits: Mapping[str, Dataset], settings: DataSettings, for_numbers: str = ""
) -> dict[str, Dataset]:
    """The splits with the same classes: the recipe's, or those that train declares, or those that occur in train.

    Labels are compared by value: 1, 1.0 and "1" are the same, and blanks around a name do not count. A split may lack
    a class. Groups, if the recipe asks for them, are numbered, too.

    Args:
        name: the data set's name.
        splits: the official splits.
        settings: with which the data set was opened.
        for_numbers: the recipe's setting for a regression, if the task has one, for messages.

    Raises:
        UserError: a row without a label or group, or with another label; labels that look like measurements; only one
            class; a class that only validation or test declares.
    """
    certain = _certain_names(splits, settings)
    check_values(name, splits, settings, "label", partial(_no_name, "label", certain))
    if settings.group_column is not None:
        check_values(name, splits, settings, "group", partial(_no_name, "group", ()))
    if not settings.classes:
        _refuse_continuous(name, splits["train"], for_numbers)
    allowed = settings.classes or names_in(splits["train"], "label")
    if len(allowed) < 2:
        raise NoClassesError(f"dataset {name}: split train has only one class: {allowed[0]}")
    keys = {value_key(label) for label in allowed}
    for split, rows in splits.items():
        declared = class_names(rows)
        if {value_key(label) for label in declared} - keys:
            different = sorted(set(declared) ^ set(allowed))
            other = "data.classes" if settings.classes else "split train"
            raise UserError(
                f"dataset {name}: split {split} and {other} differ in their labels: {', '.join(different[:5])}"
            )
        known = range(len(declared)) if declared else keys
        check_values(name, {split: rows}, settings, "label", partial(_unknown, known, allowed))
    splits = {split: as_classes(rows, "label", allowed) for split, rows in splits.items()}
    return splits if settings.group_column is None else number_groups(name, splits)


def _no_name(column: str, certain: Container[str], value: Any) -> str | None:
    if is_missing(value, certain):
        if value is None or value == "":
            return f"no {column}"
        return f"no {column}: {value!r} stands for a missing value" + (
            "; data.classes can make it a class" if column == "label" else ""
        )
    return None if isinstance(value, str | int | float) else f"{column} is {value!r:.40}; expected a name or a number"


def _refuse_continuous(name: str, train: Dataset, for_numbers: str) -> None:
    """Measurements are not classes: there are fractions among them, and few of them occur twice."""
    labels = [label for label in train["label"] if isinstance(label, float)]
    fractions = [label for label in labels if not label.is_integer()]
    if fractions and 2 * len(set(labels)) > len(labels):
        hint = f"; {for_numbers} is for numbers" if for_numbers else ", and this task is a classification"
        raise UserError(
            f"dataset {name}: split train has {len(set(labels))} labels such as {fractions[0]:g} in {len(labels)} "
            f"rows: these are numbers, not classes{hint}"
        )


def _unknown(known: Collection[int] | Collection[str], allowed: Sequence[str], label: Any) -> str | None:
    key = label if isinstance(known, range) else value_key(label)
    return None if key in known else f"label {label!r} is not one of {', '.join(allowed[:9])}"


def with_numbers(name: str, splits: Mapping[str, Dataset], settings: DataSettings) -> dict[str, Dataset]:
    """The splits with labels that are finite numbers, for a regression.

    Raises:
        UserError: a label that is not a finite number; groups, which are scored by accuracy.
    """
    if settings.group_column is not None:
        raise UserError("data.group_column: groups are scored by accuracy, which a regression does not have")
    check_values(name, splits, settings, "label", _no_number)
    return {split: _with_numbers(rows) for split, rows in splits.items()}


def _no_number(label: Any) -> str | None:
    with suppress(TypeError, ValueError):
        if math.isfinite(float(label)):
            return None
    return f"label {label!r} is not a number"


def _with_numbers(rows: Dataset) -> Dataset:
    numbers = [float(label) for label in rows["label"]]
    return rows.remove_columns("label").add_column("label", numbers).cast_column("label", Value("float32"))
