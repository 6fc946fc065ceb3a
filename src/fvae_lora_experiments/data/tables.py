"""Tables: which files in a folder they are, which split each belongs to, and the rows in them.

- The tables are those of the topmost folder in which any belongs to a split; tables elsewhere are left out.
- Only parts of one table, whose names differ in their numbers, and the files in a split's folder are joined.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from fvae_lora_experiments.data.files import (
    DESCRIPTIONS,
    Notes,
    enumerate_names,
    has_suffix,
    refuse_duplicate_folders,
    refuse_duplicate_split,
    split_of_folder,
    splits_of_file,
    stem,
    visible_files,
)
from fvae_lora_experiments.data.hub import require_cache
from fvae_lora_experiments.data.json_rows import read_json_rows
from fvae_lora_experiments.errors import UserError, first_line

_CSV = partial(datasets.load_dataset, "csv", keep_default_na=False)  # "NA" and "None" are texts
_JSON = partial(datasets.load_dataset, "json")
READERS: dict[str, Callable[..., Any]] = {
    ".parquet": partial(datasets.load_dataset, "parquet"),
    ".jsonl": _JSON,
    ".csv": _CSV,
    ".tsv": partial(_CSV, sep="\t"),
    ".json": _JSON,
}
"""How a table is read, by its suffix in lower case. Where a split has several formats, the first of these is used."""


def read_tables(
    place: Path,
    notes: Notes,
    suffixes: Sequence[str] = tuple(READERS),
    beside: Collection[str] = (),
    prepare: Callable[[Path, Dataset], Dataset] = lambda _, rows: rows,
) -> dict[str, Dataset]:
    """The splits in a table, or in a folder and below it; none where there is no table.

    Args:
        place: the file or folder.
        notes: gets where the splits come from, and what is left out.
        suffixes: of the tables to look for.
        beside: suffixes of files that rows may name, which are not left out.
        prepare: changes the rows of each file before they are joined.

    Raises:
        UserError: a file that cannot be read, or files of one split with different columns.
    """
    found = _table_files(place, suffixes, notes)
    splits = {split: _joined(place, files, prepare) for split, files in found.items()}
    if splits and place.is_dir():
        for file in visible_files(place, Notes()):
            if not has_suffix(file, [*suffixes, *beside]):
                notes.leave_out("not a table", file.suffix.lower() or file.name)
    return splits


def table_row_locations(place: Path, split: str) -> list[str]:
    """The file and number of each row in the tables of a split, for messages: `train.csv, row 3`, counted from 1."""
    files = _table_files(place, tuple(READERS), Notes()).get(split, [])
    return [f"{file}, row {n}" for file in files for n in range(1, len(_read(file)) + 1)]


def _table_files(place: Path, suffixes: Sequence[str], notes: Notes) -> dict[str, list[Path]]:
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
        _check_json_rows(file)
    require_cache()
    try:
        rows: Dataset = READERS[suffix](data_files=str(file), split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = first_line(error.__cause__ or error)
        raise UserError(f"{file}: cannot be read as {suffix.removeprefix('.')}: {cause}") from error
    return rows


def _check_json_rows(file: Path) -> None:
    """Refuses what is not a row; the library would not say on which line it is, or fail over it much later."""
    for where, row in read_json_rows(file):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected keys and values, got {row!r:.40}")


@dataclass(frozen=True)
class _Table:
    file: Path
    home: Path
    """The folder that holds it, or that holds its split's folder."""
    split: str | None
    entry: str
    """Its name in there: the file's, or that of its split's folder."""


def find_tables(folder: Path, suffixes: Sequence[str], notes: Notes) -> dict[str, list[Path]]:
    """The files of each split, in order; none where there is no table.

    Args:
        folder: the data set's folder.
        suffixes: those of tables, in lower case. Where a split has several formats, the first of these is used.
        notes: gets what is left out, and where each split comes from.

    Raises:
        UserError: two files or folders for one split; a path that gives two splits; tables whose split is unknown.
    """
    files = visible_files(folder, notes)
    tables = [
        _table_of(folder, file)
        for file in files
        if has_suffix(file, suffixes) and file.name.lower() not in DESCRIPTIONS
    ]
    if not tables:
        return {}
    named = [table for table in tables if table.split]
    homes = {table.home for table in named or tables}
    top = min(len(home.parts) for home in homes)
    first = sorted(home for home in homes if len(home.parts) == top)
    if len(first) > 1:
        shown = enumerate_names([f"{home.relative_to(folder)}/" for home in first])
        raise UserError(f"dataset {folder}: tables in each of {shown}; name one of these folders as the data set")
    chosen = [table for table in named or tables if table.home == first[0]]
    for table in tables:
        if table.home != first[0] or (named and not table.split):
            where = "not of a split" if table.home == first[0] else "not in a split's folder"
            notes.leave_out(where, str(table.file.relative_to(folder)))
    refuse_duplicate_folders(folder, [table.file for table in chosen])
    by_split: dict[str, list[_Table]] = {}
    for table in chosen:
        _refuse_ambiguous_split(folder, table)
        by_split.setdefault(table.split or "", []).append(table)
    found = {}
    for split, of_split in by_split.items():
        used = _of_preferred_format(folder, split or "train", of_split, suffixes, notes)
        _refuse_separate_tables(folder, split, used)
        found[split or "train"] = [table.file for table in used]
        notes.sources[split or "train"] = enumerate_names(
            list(dict.fromkeys(_source_of(folder, table) for table in used)), of="files"
        )
    return found


def _table_of(folder: Path, file: Path) -> _Table:
    parts = file.relative_to(folder).parts
    for depth, part in enumerate(parts[:-1]):
        if split := split_of_folder(part):
            return _Table(file, folder.joinpath(*parts[:depth]), split, part)
    named_splits = splits_of_file(file.name)
    return _Table(file, file.parent, min(named_splits) if named_splits else None, file.name)


def _source_of(folder: Path, table: _Table) -> str:
    place = (table.home / table.entry).relative_to(folder)
    return str(place) if table.entry == table.file.name else f"{place}/"


def _refuse_ambiguous_split(folder: Path, table: _Table) -> None:
    inside = table.file.relative_to(table.home)
    named_splits = {split for part in inside.parts[:-1] if (split := split_of_folder(part))} | splits_of_file(
        inside.name
    )
    if len(named_splits) > 1:
        several = ", ".join(sorted(named_splits))
        raise UserError(
            f"dataset {folder}: {table.file.relative_to(folder)}: its path gives several splits ({several}); rename it"
        )


def _of_preferred_format(
    folder: Path, split: str, tables: Sequence[_Table], suffixes: Sequence[str], notes: Notes
) -> list[_Table]:
    suffix = next(s for s in suffixes if any(has_suffix(table.file, [s]) for table in tables))
    for table in tables:
        if not has_suffix(table.file, [suffix]):
            notes.leave_out(f"{split} is read from {suffix}", str(table.file.relative_to(folder)))
    return [table for table in tables if has_suffix(table.file, [suffix])]


def _refuse_separate_tables(folder: Path, split: str, tables: Sequence[_Table]) -> None:
    """Several files of a split must be parts of one table, or lie in the folder of the split."""
    kinds: dict[str, str] = {}
    for table in tables:
        is_file = table.entry == table.file.name
        kinds.setdefault(re.sub(r"\d+", "", stem(table.entry)) if is_file else f"{table.entry}/", table.entry)
    if len(kinds) > 1:
        shown = enumerate_names([kind if kind.endswith("/") else entry for kind, entry in kinds.items()])
        if split:
            refuse_duplicate_split(folder, split, shown)
        raise UserError(
            f"dataset {folder}: {shown}: which is train, validation or test? Say so in their names (train.csv, "
            "test.csv), or name one file as the data set"
        )
