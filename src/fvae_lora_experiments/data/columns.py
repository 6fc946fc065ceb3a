"""The columns of a data set that a run uses, and checks of every value in them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.source import row_locations
from fvae_lora_experiments.errors import NoClassesError, UserError
from fvae_lora_experiments.schema import DataSettings


def select_columns(
    name: str,
    splits: Mapping[str, Dataset],
    settings: DataSettings,
    inputs: Mapping[str, tuple[str, Sequence[str]]],
    notes: Notes,
) -> dict[str, Dataset]:
    """The splits with their inputs, their `label`, and their `group` if the recipe asks for groups; no other column.

    Args:
        name: the data set's name, for messages.
        splits: the official splits.
        settings: says which columns are the label and the group.
        inputs: for the new name of each input, the recipe's key that chooses its column, and the names that this may
            have, of which the first that is found is used.
        notes: gets the columns that are not used.

    Raises:
        UserError: an empty split, a column that is missing, or one that would be two things.
    """
    return {split: _select_columns(name, split, rows, settings, inputs, notes) for split, rows in splits.items()}


def _select_columns(
    name: str,
    split: str,
    rows: Dataset,
    settings: DataSettings,
    inputs: Mapping[str, tuple[str, Sequence[str]]],
    notes: Notes,
) -> Dataset:
    if not len(rows):
        raise UserError(f"dataset {name}: split {split} is empty")
    others = {column: feature for column, feature in rows.features.items() if column != settings.group_column}
    typed = [column for column, feature in others.items() if isinstance(feature, ClassLabel)]
    labels = [settings.label_column] if settings.label_column else [*typed, "label", "labels"]
    wanted = dict(inputs) | {"label": ("data.label_column", labels)}
    if settings.group_column is not None:
        wanted["group"] = ("data.group_column", [settings.group_column])
    columns: dict[str, str] = {}
    for what, (key, candidates) in wanted.items():
        found = next((c for c in candidates if c in rows.column_names), None)
        if found is None:
            kind = NoClassesError if what == "label" else UserError
            raise kind(
                f"dataset {name}: no {what} column in split {split}; set {key} to one of {', '.join(rows.column_names)}"
            )
        if found in columns:
            raise UserError(f"dataset {name}: {key}: {found} is already the {columns[found]} column")
        columns[found] = what
    for unused in set(rows.column_names) - columns.keys():
        notes.leave_out("unused column", unused, len(rows))
    return rows.select_columns(list(columns)).rename_columns(columns)


def check_values(
    name: str, splits: Mapping[str, Dataset], settings: DataSettings, column: str, wrong: Callable[[Any], str | None]
) -> None:
    """Checks every value of a column.

    Args:
        name: the data set's name.
        splits: the official splits, with all of their rows in order.
        settings: with which the data set was opened.
        column: the column to check.
        wrong: says what is wrong with a value; None if nothing is.

    Raises:
        UserError: for the first wrong value; names its file and row.
    """
    for split, rows in splits.items():
        for index, value in enumerate(rows[column]):
            if reason := wrong(value):
                raise UserError(f"{row_locations(name, settings, split, len(rows))[index]}: {reason}")


def check_texts(name: str, splits: Mapping[str, Dataset], settings: DataSettings, column: str) -> None:
    """Raises `UserError` if a value of a column is not text or is blank, see `check_values`."""

    def wrong(value: Any) -> str | None:
        return None if isinstance(value, str) and value.strip() else f"{column} is {value!r}; expected some text"

    check_values(name, splits, settings, column, wrong)
