"""Reading the rows to predict from files, folders, tables and standard input, one after the other.

Tables are read as streams, except for JSON that is one list. A row that cannot be used has an `error`; an error that
concerns a whole file is raised.
"""

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from fvae_lora_experiments.data.files import DESCRIPTIONS, Notes, describe_contents, has_suffix, visible_files
from fvae_lora_experiments.errors import UserError, first_line

STANDARD_INPUT = "-"
BATCH = 64
"""Rows of a parquet file that are in memory at once."""

csv.field_size_limit(2**31 - 1)

Numbered = Iterator[tuple[int, dict[str, Any] | str]]
"""A table's rows with their numbers, from 1; in the place of a row that cannot be read, the reason."""


@dataclass(frozen=True)
class Wanted:
    """What a task reads from a row."""

    columns: dict[str, Sequence[str]]
    """For each input the names that its column may have; the first that exists is used. Empty: the whole row."""
    files: Sequence[str] = ()
    """Suffixes, in lower case, of files that are one row each."""


@dataclass(frozen=True)
class Row:
    """A row: a whole file, or row `number` of one."""

    input: str
    number: int | None
    values: dict[str, Any]
    error: str = ""

    @property
    def where(self) -> str:
        """Where the row is, for messages."""
        name = "standard input" if self.input == STANDARD_INPUT else self.input
        return name if self.number is None else f"{name}, row {self.number}"

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the row in an output."""
        return in_one_line(self.input), "" if self.number is None else str(self.number)


def in_one_line(text: str) -> str:
    """`text` without line breaks: a line of the output is a row."""
    return " ".join(text.splitlines())


def read_rows(inputs: Sequence[str], wanted: Wanted) -> Iterator[Row]:
    """The rows of every input, in order.

    Args:
        inputs: files that are a row each, folders of these, tables, or `-`, of which each line is a row: the path of a
            file, or a text, or keys and values in JSON.
        wanted: what to read from them.

    Raises:
        UserError: no such file; a file of another kind; a table that cannot be read, lacks a column or has no row.
    """
    for name in inputs:
        if not name:  # a variable of a shell that is not set; Path would take it for the current folder
            raise UserError("INPUT: an empty name; expected a file, a folder or -")
        if name != STANDARD_INPUT and not Path(name).exists():
            raise UserError(f"{name}: no such file or folder")
    return itertools.chain.from_iterable(_not_empty(name, _of_input(name, wanted)) for name in inputs)


def begun(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows after the first has been read, so that an error in their file is raised at once."""
    return itertools.chain(list(itertools.islice(rows, 1)), rows)


def _not_empty(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise UserError(f"{'standard input' if name == STANDARD_INPUT else name}: empty, so nothing to predict")


def _of_input(name: str, wanted: Wanted) -> Iterator[Row]:
    path = Path(name)
    if name == STANDARD_INPUT:
        return _of_lines(sys.stdin.buffer, wanted)
    if path.is_dir():
        return _of_folder(path, wanted)
    if has_suffix(path, wanted.files):
        return iter([_of_file(path, wanted)])
    for suffix, read in TABLES.items():
        if has_suffix(path, [suffix]):
            return _with_columns(name, path.parent, read(path), wanted)
    raise UserError(f"{name}: not a file that can be predicted from; allowed are {', '.join([*TABLES, *wanted.files])}")


def _of_folder(folder: Path, wanted: Wanted) -> Iterator[Row]:
    """The files in it, at any depth, or its tables if rows are not files."""
    suffixes = wanted.files or tuple(TABLES)
    files = [
        file
        for file in visible_files(folder, Notes())
        if has_suffix(file, suffixes) and (wanted.files or file.name.lower() not in DESCRIPTIONS)
    ]
    if not files:
        raise UserError(f"{folder}: nothing to predict in it; it has {describe_contents(folder)}")
    for file in files:
        yield from [_of_file(file, wanted)] if wanted.files else _of_input(str(file), wanted)


def _of_lines(lines: Iterable[bytes], wanted: Wanted) -> Iterator[Row]:
    """A file's path, a text, or keys and values in JSON on each line; the first line that is not empty decides."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = list(itertools.islice(numbered, 1))
    numbered = itertools.chain(first, numbered)  # type: ignore[assignment]
    if len(wanted.columns) != 1 or (first and first[0][1].lstrip().startswith(b"{")):
        rows = ((number, _json_row(line)) for number, line in numbered)
        yield from _with_columns(STANDARD_INPUT, Path(), rows, wanted)
        return
    (what,) = wanted.columns
    for number, line in numbered:
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            yield Row(STANDARD_INPUT, number, {}, "not UTF-8")
        else:
            yield _of_file(Path(text), wanted) if wanted.files else Row(STANDARD_INPUT, number, {what: text})


def _of_file(file: Path, wanted: Wanted) -> Row:
    (what,) = wanted.columns
    return Row(str(file), None, {what: {"bytes": None, "path": str(file)}})


def _with_columns(name: str, folder: Path, rows: Numbered, wanted: Wanted) -> Iterator[Row]:
    """Rows reduced to the wanted columns; the first that can be read decides which columns these are."""
    columns: dict[str, str] | None = None
    for number, values in rows:
        if isinstance(values, str):
            yield Row(name, number, {}, values)
            continue
        if columns is None:
            columns = _columns(Row(name, None, {}).where, values, wanted)
        lacking = [column for column in columns.values() if column not in values]
        if lacking:
            yield Row(name, number, {}, f"no {lacking[0]}; it has {', '.join(values) or 'nothing'}")
            continue
        found = {what: values[column] for what, column in columns.items()} if wanted.columns else values
        if wanted.files:
            found = {what: _as_file(value, folder) for what, value in found.items()}
        yield Row(name, number, found)


def _columns(where: str, values: dict[str, Any], wanted: Wanted) -> dict[str, str]:
    columns = {}
    for what, candidates in wanted.columns.items():
        found = next((name for name in candidates if name in values), None)
        if found is None:
            raise UserError(
                f"{where}: no column {' or '.join(candidates)}; it has {', '.join(map(str, values)) or 'none'}; "
                "--column says which it is"
            )
        columns[what] = found
    return columns


def _as_file(value: Any, folder: Path) -> Any:
    """A path, relative to its table's folder, or bytes, in the form that datasets gives to files in columns."""
    if isinstance(value, str):
        return {"bytes": None, "path": str(folder / value)}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, dict):
        path = value.get("path")
        here = None if path is None else str(path if value.get("bytes") is not None else folder / str(path))
        return {"bytes": value.get("bytes"), "path": here}
    return value


def _separated(file: Path, delimiter: str) -> Numbered:
    with file.open(encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, delimiter=delimiter)
        number = 0
        try:
            header = next(lines, [])
            for number, cells in enumerate(filter(None, lines), 1):
                if len(cells) == len(header):
                    yield number, dict(zip(header, cells, strict=True))
                else:
                    yield number, f"{len(cells)} cells; the first line has {len(header)}"
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}, after row {number}: cannot be read as a table: {error}") from error
        if header and not number:
            raise UserError(f"{file}: a table without a single row")


def _json_lines(file: Path) -> Numbered:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON: {getattr(error, 'msg', error)}"
    return row if isinstance(row, dict) else f"expected keys and values, got {row!r:.40}"


def _json(file: Path) -> Numbered:
    with file.open("rb") as opened:
        is_list = opened.read(4096).lstrip().startswith(b"[")
    if not is_list:
        yield from _json_lines(file)
        return
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {getattr(error, 'msg', error)}") from error
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, dict) else f"expected keys and values, got {row!r:.40}"


def _parquet(file: Path) -> Numbered:
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as parquet: {first_line(error)}") from error


TABLES: dict[str, Callable[[Path], Numbered]] = {
    ".csv": lambda file: _separated(file, ","),
    ".tsv": lambda file: _separated(file, "\t"),
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
"""How a table is read, by its suffix in lower case."""
