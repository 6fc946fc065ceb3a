"""Data sets by name, whatever is in their rows: where the splits come from, their columns and their classes.

A data set on the hub is taken from the folder that the variable `FVAE_LORA_DATA_ROOT` names, if there is a copy of it.
"""

import math
import os
import tempfile
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Value

from fvae_lora_experiments.data.classes import as_classes, class_names, missing, names_in, value_key
from fvae_lora_experiments.data.files import (
    SPLIT_NAMES,
    Notes,
    find_tables,
    has_suffix,
    visible_files,
    what_is_there,
)
from fvae_lora_experiments.data.groups import with_groups
from fvae_lora_experiments.data.json_rows import read_json_rows
from fvae_lora_experiments.errors import UserError, first_line
from fvae_lora_experiments.places import is_local
from fvae_lora_experiments.schema import DataSettings

DATA_ROOT = "FVAE_LORA_DATA_ROOT"
_CSV = partial(datasets.load_dataset, "csv", keep_default_na=False)  # "NA" and "None" are texts
_JSON = partial(datasets.load_dataset, "json")
READERS: dict[str, Callable[..., Any]] = {
    ".parquet": partial(datasets.load_dataset, "parquet"),
    ".jsonl": _JSON,
    ".csv": _CSV,
    ".tsv": partial(_CSV, sep="\t"),
    ".json": _JSON,
}
"""What reads a table, by its file's suffix in lower case. Where a split has several the first is used."""

PlaceReader = Callable[[Path, Notes], dict[str, Dataset]]


def official_splits(name: str, settings: DataSettings, read: PlaceReader, notes: Notes) -> dict[str, Dataset]:
    """The official splits of a data set with all their columns, by their usual names, `train` among them.

    Args:
        name: a local folder or file, or a name on the hub.
        settings: its `config` says which configuration on the hub.
        read: gives the splits of a local folder or file.
        notes: gets what is worth telling of them.

    Raises:
        UserError: no such data set, or one without a train split.
    """
    place = place_of(name, settings.config)
    splits = read(place, notes) if place else _from_hub(name, settings.config, notes)
    if "train" not in splits:
        there = ", ".join(splits) or (f"nothing that is understood: {what_is_there(place)}" if place else "nothing")
        raise UserError(f"dataset {name}: no train split; it has {there}")
    return splits


def read_tables(
    place: Path,
    notes: Notes,
    suffixes: Sequence[str] = tuple(READERS),
    beside: Collection[str] = (),
    prepare: Callable[[Path, Dataset], Dataset] = lambda _, rows: rows,
) -> dict[str, Dataset]:
    """The splits that a table holds, or those in a folder and below it; none where there is no table.

    Args:
        place: the file or folder.
        notes: gets where the splits come from and what is left out.
        suffixes: of the tables that are looked for.
        beside: suffixes of files that the rows of tables name.
        prepare: what is done to each file's rows before they are joined with others.

    Raises:
        UserError: a file that cannot be read, or files of a split that do not fit each other.
    """
    found = _tables(place, suffixes, notes)
    splits = {split: _joined(place, files, prepare) for split, files in found.items()}
    if splits and place.is_dir():
        for file in visible_files(place, Notes()):
            if not has_suffix(file, [*suffixes, *beside]):
                notes.leave_out("not a table", file.suffix.lower() or file.name)
    return splits


def places(name: str, settings: DataSettings, split: str, count: int) -> list[str]:
    """Where each of the `count` rows of an official split is, for messages: its table, if it has one, and its number.

    Rows are counted from 1.
    """
    place = place_of(name, settings.config)
    files = _tables(place, tuple(READERS), Notes()).get(split, []) if place else []
    in_files = [f"{file}, row {n}" for file in files for n in range(1, len(_read(file)) + 1)]
    return (
        in_files if len(in_files) == count else [f"dataset {name}: split {split}, row {n}" for n in range(1, count + 1)]
    )


def _tables(place: Path, suffixes: Sequence[str], notes: Notes) -> dict[str, list[Path]]:
    """The files of each split, in order."""
    if place.is_dir():
        return find_tables(place, suffixes, notes)
    if not has_suffix(place, suffixes):
        raise UserError(f"dataset {place}: not a table that can be read; allowed are {', '.join(suffixes)}")
    notes.sources["train"] = place.name
    return {"train": [place]}


def _joined(place: Path, files: Sequence[Path], prepare: Callable[[Path, Dataset], Dataset]) -> Dataset:
    try:
        return datasets.concatenate_datasets([prepare(file, _read(file)) for file in files])
    except ValueError as error:
        raise UserError(f"dataset {place}: its files cannot be read as one table: {first_line(error)}") from error


def _read(file: Path) -> Dataset:
    suffix = file.suffix.lower()
    if not file.stat().st_size:
        raise UserError(f"{file}: the file is empty")
    if READERS[suffix] is _JSON:
        _check_json(file)
    refuse_unusable_cache()
    try:
        rows: Dataset = READERS[suffix](data_files=str(file), split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = first_line(error.__cause__ or error)
        raise UserError(f"{file}: cannot be read as {suffix.removeprefix('.')}: {cause}") from error
    return rows


def _check_json(file: Path) -> None:
    """Refuses what is not a row; the reader of tables would not say which line it is, or only stumble over it later."""
    for where, row in read_json_rows(file):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected keys and values, got {row!r:.40}")


def refuse_unusable_cache() -> None:
    """Tables and what comes from the hub are kept in a cache: where that cannot be, the data are not to blame.

    Raises:
        UserError: names the folder, and why nothing can be kept there.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}; HF_HOME says where it is to be") from error


def place_of(name: str, config: str | None) -> Path | None:
    """The folder or file of the data set on this machine; None if it has to come from the hub."""
    if is_local(name):
        if not Path(name).exists():
            raise UserError(f"dataset {name}: no such folder or file")
        return Path(name)
    return copy_of(name, config)


def copy_of(name: str, config: str | None) -> Path | None:
    """The local copy of a data set: `ROOT/owner/name` or `ROOT/name`, or its configuration's folder in that."""
    root = os.environ.get(DATA_ROOT)
    for copy in (Path(root) / name, Path(root) / Path(name).name) if root else ():
        if copy.is_dir():
            return copy / config if config and (copy / config).is_dir() else copy
    return None


def _from_hub(name: str, config: str | None, notes: Notes) -> dict[str, Dataset]:
    refuse_unusable_cache()
    try:
        builder = _builder(name, config)
        if files := builder.config.data_files:  # none where the cache answers for the hub
            for split in set(files) - hub_splits(files).keys():
                notes.leave_out("a split that is not used", split)
                del files[split]  # never fetched: SVHN's extra images are most of it
            if not files:
                return {}
        builder.download_and_prepare(verification_mode="no_checks")  # which would miss the other splits
        found = builder.as_dataset()
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise not_found(name, error) from error
    used = hub_splits(found)
    for split in found.keys() - used.keys():
        notes.leave_out("a split that is not used", split)
    notes.sources |= {split: f"split {own} on the hub" for own, split in used.items()}
    return {split: found[own] for own, split in used.items()}


def hub_splits(names: Collection[str]) -> dict[str, str]:
    """The splits on the hub that are used, by their names there; of several for one the most usual name."""
    used: dict[str, str] = {}
    for usual, split in SPLIT_NAMES.items():
        for name in names:
            if name.lower() == usual and split not in used.values():
                used[name] = split
    return {name: used[name] for name in names if name in used}


def not_found(name: str, error: Exception) -> UserError:
    """What to say of a data set that is neither here nor to be had."""
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) and not datasets.config.HF_HUB_OFFLINE:
        return UserError(f"dataset {name}: no such folder, and no such name on the hub")
    if isinstance(error, ConnectionError | FileNotFoundError) and not str(error).startswith("[Errno"):
        why = (
            "the hub is switched off (HF_HUB_OFFLINE)"
            if datasets.config.HF_HUB_OFFLINE
            else "the hub cannot be reached"
        )
        return UserError(f"dataset {name}: no such folder, and no such name in the cache; {why}")
    return UserError(f"dataset {name}: neither a local folder nor to be had from the hub: {first_line(error)}")


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
    name: str,
    splits: Mapping[str, Dataset],
    settings: DataSettings,
    inputs: Mapping[str, tuple[str, Sequence[str]]],
    notes: Notes,
) -> dict[str, Dataset]:
    """The splits with their `label`, their `group` if the recipe asks for groups, their inputs, and no other column.

    Args:
        name: the data set's, for messages.
        splits: the official splits.
        settings: says which columns are the label and the group.
        inputs: what a further column is to be called, mapped to the recipe's key that says which it is, and to the
            names that it may have, of which the first found is taken.
        notes: gets the columns that are not used.

    Raises:
        UserError: an empty split, one without a column, or a column that is to be two things.
    """
    return {split: _own_columns(name, split, rows, settings, inputs, notes) for split, rows in splits.items()}


def _own_columns(
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
            raise UserError(
                f"dataset {name}: no {what} column in split {split}; set {key} to one of {', '.join(rows.column_names)}"
            )
        if found in columns:
            raise UserError(f"dataset {name}: {key}: {found} is the {columns[found]} column already")
        columns[found] = what
    for unused in set(rows.column_names) - columns.keys():
        notes.leave_out("a column that is not used", unused, len(rows))
    return rows.select_columns(list(columns)).rename_columns(columns)


def without_hidden(splits: Mapping[str, Dataset], settings: DataSettings, notes: Notes) -> dict[str, Dataset]:
    """The splits but those of which no label is known: some benchmarks keep the labels of their test split."""
    names = _certain(splits, settings)
    hidden = {s for s, rows in splits.items() if s != "train" and all(missing(label, names) for label in rows["label"])}
    for split in hidden:
        notes.leave_out("no label is known", f"split {split}", len(splits[split]))
    return {split: rows for split, rows in splits.items() if split not in hidden}


def _certain(splits: Mapping[str, Dataset], settings: DataSettings) -> set[str]:
    """Labels that are names whatever they look like: the recipe's classes, and -1 beside +1."""
    names = {value_key(name) for name in settings.classes or []}
    labels = splits["train"]["label"] if not class_names(splits["train"]) else []
    occurring = {value_key(label) for label in labels if isinstance(label, str | int | float)}
    return names | (occurring if occurring == {"-1", "1"} else set())


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


def refuse_blank_texts(name: str, splits: Mapping[str, Dataset], settings: DataSettings, column: str) -> None:
    """Raises `UserError` if a value of a column is not a text or has nothing in it: see `refuse_values`."""

    def wrong(value: Any) -> str | None:
        return None if isinstance(value, str) and value.strip() else f"{column} is {value!r}; expected some text"

    refuse_values(name, splits, settings, column, wrong)


def with_classes(
    name: str, splits: Mapping[str, Dataset], settings: DataSettings, for_numbers: str = ""
) -> dict[str, Dataset]:
    """The splits with one set of classes: the recipe's, or those that train declares, or those that occur in train.

    Labels are compared as values: 1, 1.0 and "1" are the same, and blanks around a name do not count. A split may lack
    a class. Groups, if the recipe asks for them, are numbered, too.

    Args:
        name: the data set's.
        splits: the official splits.
        settings: with which it was opened.
        for_numbers: the recipe's setting for labels that are numbers, if the task has one, for messages.

    Raises:
        UserError: a row without a label or group, or with a label outside the set; labels that are measured and not
            chosen; one class only; a class that a split declares and the set lacks.
    """
    certain = _certain(splits, settings)
    refuse_values(name, splits, settings, "label", partial(_no_name, "label", certain))
    if settings.group_column is not None:
        refuse_values(name, splits, settings, "group", partial(_no_name, "group", ()))
    if not settings.classes:
        _refuse_continuous(name, splits["train"], for_numbers)
    allowed = settings.classes or names_in(splits["train"], "label")
    if len(allowed) < 2:
        raise UserError(f"dataset {name}: split train has one class only: {allowed[0]}")
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
        refuse_values(name, {split: rows}, settings, "label", partial(_unknown, known, allowed))
    splits = {split: as_classes(rows, "label", allowed) for split, rows in splits.items()}
    return splits if settings.group_column is None else with_groups(name, splits)


def _no_name(column: str, certain: Container[str], value: Any) -> str | None:
    if missing(value, certain):
        if value is None or value == "":
            return f"no {column}"
        return f"no {column}: {value!r} says that there is none" + (
            "; data.classes can name it as a class" if column == "label" else ""
        )
    return None if isinstance(value, str | int | float) else f"{column} is {value!r:.40}; expected a name or a number"


def _refuse_continuous(name: str, train: Dataset, for_numbers: str) -> None:
    """Measured numbers are no classes: fractions, and so many of them that few occur twice."""
    labels = [label for label in train["label"] if isinstance(label, float)]
    fractions = [label for label in labels if not label.is_integer()]
    if fractions and 2 * len(set(labels)) > len(labels):
        hint = f"; {for_numbers} is for numbers" if for_numbers else ", and this task tells classes apart"
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
