"""Data sets by name, whatever is in their rows: where the splits come from, their columns and their classes.

A data set on the hub is taken from the folder that the variable `FVAE_LORA_DATA_ROOT` names, if there is a copy of it.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Value

from fvae_lora.experiments.data.columns import as_classes, class_names, missing, names_in
from fvae_lora.experiments.data.groups import with_groups
from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.names import is_local
from fvae_lora.experiments.recipe import DataSettings

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
DATA_ROOT = "FVAE_LORA_DATA_ROOT"
READERS: dict[str, Callable[..., Any]] = {
    ".parquet": partial(datasets.load_dataset, "parquet"),
    ".jsonl": partial(datasets.load_dataset, "json"),
    ".csv": partial(datasets.load_dataset, "csv", keep_default_na=False),  # "NA" and "None" are texts
}
"""What reads a table, by its file's suffix. A folder's tables are those of the first suffix that it has any of."""

FolderReader = Callable[[Path], dict[str, Dataset]]


def official_splits(name: str, settings: DataSettings, read_folder: FolderReader) -> dict[str, Dataset]:
    """The official splits of a data set with all their columns, by their usual names, `train` among them.

    Args:
        name: a local folder, or a name on the hub.
        settings: its `config` says which configuration on the hub.
        read_folder: gives the splits of a local folder.

    Raises:
        UserError: no such data set, or one without a train split.
    """
    folder = _folder_of(name, settings.config)
    splits = read_folder(folder) if folder else _from_hub(name, settings.config)
    if "train" not in splits:
        raise UserError(f"dataset {name}: no train split; it has {', '.join(splits) or 'nothing'}")
    return splits


def read_tables(folder: Path, suffixes: Iterable[str] = READERS) -> dict[str, Dataset]:
    """The splits that the tables in `folder` and below it hold; none where there is no table with one of `suffixes`.

    Raises:
        UserError: a file that cannot be read, or files of a split that do not fit each other.
    """
    return {split: _joined(folder, files) for split, files in _tables(folder, suffixes).items()}


def places(name: str, settings: DataSettings, split: str, count: int) -> list[str]:
    """Where each of the `count` rows of an official split is, for messages: its table, if it has one, and its number.

    Rows are counted from 1.
    """
    folder = _folder_of(name, settings.config)
    files = _tables(folder).get(split, []) if folder else []
    in_files = [f"{file}, row {n}" for file in files for n in range(1, len(_read(file)) + 1)]
    return (
        in_files if len(in_files) == count else [f"dataset {name}: split {split}, row {n}" for n in range(1, count + 1)]
    )


def _tables(folder: Path, suffixes: Iterable[str] = READERS) -> dict[str, list[Path]]:
    """The files of each split, in order."""
    found = (sorted(folder.rglob(f"*{suffix}")) for suffix in suffixes)
    files = [(file, _split_of(file.relative_to(folder))) for file in next(filter(None, found), [])]
    named = any(split for _, split in files)
    by_split: dict[str, list[Path]] = {}
    for file, split in files:
        if split or not named:
            by_split.setdefault(split or "train", []).append(file)
    return by_split


def _split_of(file: Path) -> str | None:
    """`train-00000-of-00002.parquet` and `train/0.parquet` belong to train, `extra.parquet` to no split."""
    for part in (file.name.split(".")[0].split("-")[0], *(parent.name for parent in file.parents)):
        if part in SPLIT_NAMES:
            return SPLIT_NAMES[part]
    return None


def _joined(folder: Path, files: Sequence[Path]) -> Dataset:
    try:
        return datasets.concatenate_datasets([_read(file) for file in files])
    except ValueError as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"dataset {folder}: its files cannot be read as one table: {line}") from error


def _read(file: Path) -> Dataset:
    if not file.stat().st_size:
        raise UserError(f"{file}: the file is empty")
    if file.suffix == ".jsonl":
        _check_lines(file)
    try:
        rows: Dataset = READERS[file.suffix](data_files=str(file), split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UserError(f"{file}: cannot be read as {file.suffix.removeprefix('.')}: {cause}") from error
    return rows


def _check_lines(file: Path) -> None:
    """Refuses what is no row; the reader of tables would not say which line it is, or only stumble over it later."""
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not JSON: {getattr(error, 'msg', error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: expected keys and values, got {row!r:.40}")


def _folder_of(name: str, config: str | None) -> Path | None:
    """Where the data set lies on this machine; None if it has to come from the hub."""
    if is_local(name):
        if not Path(name).is_dir():
            raise UserError(f"dataset {name}: no such folder")
        return Path(name)
    return copy_of(name, config)


def copy_of(name: str, config: str | None) -> Path | None:
    """The local copy of a data set: `ROOT/owner/name` or `ROOT/name`, or its configuration's folder in that."""
    root = os.environ.get(DATA_ROOT)
    for copy in (Path(root) / name, Path(root) / Path(name).name) if root else ():
        if copy.is_dir():
            return copy / config if config and (copy / config).is_dir() else copy
    return None


def _from_hub(name: str, config: str | None) -> dict[str, Dataset]:
    try:
        builder = _builder(name, config)
        if files := builder.config.data_files:  # none where the cache answers for the hub
            for split in files.keys() - SPLIT_NAMES.keys():
                del files[split]  # never fetched: SVHN's extra images are most of it
            if not files:
                return {}
        builder.download_and_prepare(verification_mode="no_checks")  # which would miss the other splits
        found = builder.as_dataset()
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"dataset {name}: neither a local folder nor to be had from the hub: {line}") from error
    return {SPLIT_NAMES[split]: rows for split, rows in found.items() if split in SPLIT_NAMES}


def _builder(name: str, config: str | None) -> datasets.DatasetBuilder:
    """A data set on the hub, prepared in a folder of its own: other programs are to find whole data sets in theirs."""
    shared = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        return datasets.load_dataset_builder(name, config, cache_dir=str(shared / "fvae-lora"))
    except (OSError, ValueError):
        if not datasets.config.HF_HUB_OFFLINE:
            raise
        return datasets.load_dataset_builder(name, config)  # what another program fetched serves, too


def own_columns(
    name: str, splits: Mapping[str, Dataset], settings: DataSettings, inputs: Mapping[str, tuple[str, Sequence[str]]]
) -> dict[str, Dataset]:
    """The splits with their `label`, their `group` if the recipe asks for groups, their inputs, and no other column.

    Args:
        name: the data set's, for messages.
        splits: the official splits.
        settings: says which columns are the label and the group.
        inputs: what a further column is to be called, mapped to the recipe's key that says which it is, and to the
            names that it may have, of which the first found is taken.

    Raises:
        UserError: an empty split, one without a column, or a column that is to be two things.
    """
    return {split: _own_columns(name, split, rows, settings, inputs) for split, rows in splits.items()}


def _own_columns(
    name: str, split: str, rows: Dataset, settings: DataSettings, inputs: Mapping[str, tuple[str, Sequence[str]]]
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
            raise UserError(
                f"dataset {name}: no {what} column in split {split}; set {key} to one of {', '.join(rows.column_names)}"
            )
        if found in columns:
            raise UserError(f"dataset {name}: {key}: {found} is the {columns[found]} column already")
        columns[found] = what
    return rows.select_columns(list(columns)).rename_columns(columns)


def without_hidden(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The splits but those of which no label is known: some benchmarks keep the labels of their test split."""
    hidden = {split for split, rows in splits.items() if split != "train" and all(map(missing, rows["label"]))}
    return {split: rows for split, rows in splits.items() if split not in hidden}


def refuse_values(
    name: str, splits: Mapping[str, Dataset], settings: DataSettings, column: str, wrong: Callable[[Any], str | None]
) -> None:
    """Looks at every value of a column.

    Args:
        name: the data set's.
        splits: the official splits, all of their rows in their order.
        settings: with which the data set was opened.
        column: of which the values are.
        wrong: says what is wrong with a value, if anything.

    Raises:
        UserError: for the first value with which something is wrong; names its file and row.
    """
    for split, rows in splits.items():
        for index, value in enumerate(rows[column]):
            if reason := wrong(value):
                raise UserError(f"{places(name, settings, split, len(rows))[index]}: {reason}")


def with_classes(name: str, splits: Mapping[str, Dataset], settings: DataSettings) -> dict[str, Dataset]:
    """The splits with one set of classes: the recipe's, or those that train declares, or those that occur in train.

    Groups, if the recipe asks for them, are numbered, too.

    Raises:
        UserError: a row without a label or group, or with a label outside the set; one class only; classes that are
            declared differently for a split.
    """
    for column in ("label",) if settings.group_column is None else ("label", "group"):
        refuse_values(name, splits, settings, column, partial(_no_name, column))
    allowed = settings.classes or names_in(splits["train"], "label")
    if len(allowed) < 2:
        raise UserError(f"dataset {name}: split train has one class only: {allowed[0]}")
    for split, rows in splits.items():
        declared = class_names(rows)
        if declared and (different := sorted(set(declared) ^ set(allowed))):
            other = "data.classes" if settings.classes else "split train"
            raise UserError(
                f"dataset {name}: split {split} and {other} differ in their labels: {', '.join(different[:5])}"
            )
        known = set(range(len(declared))) if declared else {*allowed}
        refuse_values(name, {split: rows}, settings, "label", partial(_unknown, known, allowed))
    splits = {split: as_classes(rows, "label", allowed) for split, rows in splits.items()}
    return splits if settings.group_column is None else with_groups(name, splits)


def _no_name(column: str, value: Any) -> str | None:
    if missing(value):
        return f"no {column}"
    return None if isinstance(value, str | int | float) else f"{column} is {value!r:.40}; expected a name or a number"


def _unknown(known: Collection[int] | Collection[str], allowed: Sequence[str], label: Any) -> str | None:
    return None if label in known or str(label) in known else f"label {label!r} is not one of {', '.join(allowed[:9])}"


def with_numbers(name: str, splits: Mapping[str, Dataset], settings: DataSettings) -> dict[str, Dataset]:
    """The splits with labels that are finite numbers, for a regression.

    Raises:
        UserError: a label that is none; groups, of which each has an accuracy.
    """
    if settings.group_column is not None:
        raise UserError("data.group_column: a regression has no accuracy of a group")
    refuse_values(name, splits, settings, "label", _no_number)
    return {split: _with_numbers(rows) for split, rows in splits.items()}


def _no_number(label: Any) -> str | None:
    with suppress(TypeError, ValueError):
        if math.isfinite(float(label)):
            return None
    return f"label {label!r} is not a number"


def _with_numbers(rows: Dataset) -> Dataset:
    numbers = [float(label) for label in rows["label"]]
    return rows.remove_columns("label").add_column("label", numbers).cast_column("label", Value("float32"))
