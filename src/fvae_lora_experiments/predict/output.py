"""Writing predictions: CSV or JSON lines, to a file that can be continued, or CSV to standard output."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.predict.rows import Row, in_one_line

PLACE = ("input", "row")
"""The columns that identify the row of a prediction."""


class Output:
    """Predictions as lines, each written as a whole, so that a file that was stopped holds what was done.

    Args:
        file: ends in `.csv` or `.jsonl`; None is CSV on standard output.
        resume: whether to continue a file that exists.

    Raises:
        UserError: another kind of file; a file that exists already.
    """

    def __init__(self, file: Path | None, resume: bool = False):
        self.file, self.resume = file, resume
        if file is None:
            if resume:
                raise UserError("--resume: goes on with a file; give --out FILE")
        elif file.suffix.lower() not in (".csv", ".jsonl"):
            raise UserError(f"--out {file}: expected a name that ends in .csv or .jsonl")
        elif file.is_dir():
            raise UserError(f"--out {file}: a folder; expected a file")
        elif file.exists() and not resume:
            raise UserError(f"--out {file}: exists already; --resume goes on where it ends")
        self.is_csv = file is None or file.suffix.lower() == ".csv"
        self.columns: Sequence[str] = ()
        self.stream: TextIO = sys.stdout
        self.last: tuple[str, str] | None = None

    def open(self, columns: Sequence[str]) -> None:
        """Starts the output, or continues a file after removing a last line that was cut off.

        Args:
            columns: the columns of a table after those of `PLACE`.

        Raises:
            UserError: the file to continue holds no predictions, or has other columns.
        """
        self.columns = (*PLACE, *columns)
        header = _line(self.columns) if self.is_csv else ""
        if self.file is not None:
            if self.resume and self.file.exists():
                self._find_end(header)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.stream = self.file.open("a", encoding="utf-8", newline="")
        if self.is_csv and (self.file is None or not self.file.stat().st_size):
            self._put(header)
            self.flush()

    def _find_end(self, header: str) -> None:
        """Finds the last row of the file, and cuts off what follows its last whole line."""
        assert self.file is not None
        first = last = b""
        whole = 0
        with self.file.open("rb") as lines:
            for line in lines:
                first, last = first or line, line if line.endswith(b"\n") else last
                whole += len(line) if line.endswith(b"\n") else 0
        begins = header or '{"input": '
        if self.is_csv and whole and first != header.encode():
            raise UserError(f"--out {self.file}: has other columns than {header.strip()}")
        if not (first.startswith(begins.encode()) or begins.encode().startswith(first)):
            raise UserError(f"--out {self.file}: not a file of predictions, so nothing to go on with")
        if whole and not (self.is_csv and last == first):
            self.last = self._key(last.decode())
        os.truncate(self.file, whole)

    def _key(self, line: str) -> tuple[str, str]:
        """The input and the row that a line is about."""
        try:
            if self.is_csv:
                name, number, *_ = next(csv.reader([line]))
                return name, number
            values = json.loads(line)
            return values["input"], "" if values["row"] is None else str(values["row"])
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"--out {self.file}: not a file of predictions, so nothing to go on with") from error

    def not_done(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows that come after the last one in the file; all where there is none.

        Raises:
            UserError: that one is not among `rows`.
        """
        if self.last is not None:
            for row in rows:
                if row.key == self.last:
                    break
            else:
                name = " row ".join(filter(None, self.last))
                raise UserError(f"--out {self.file}: its last row, {name}, is not among these inputs")
        yield from rows

    def write(self, row: Row, prediction: Mapping[str, Any]) -> None:
        """Writes a line."""
        name, _ = row.key
        if self.is_csv:
            flat = {"input": name, "row": row.number} | flattened(prediction)
            self._put(_line([flat.get(column, "") for column in self.columns]))
        else:
            self._put(json.dumps({"input": name, "row": row.number} | dict(prediction)) + "\n")

    def flush(self) -> None:
        """Makes what was written so far stay, whatever happens next."""
        with self._named():
            self.stream.flush()

    def close(self) -> None:
        """Ends the file."""
        if self.file is not None and self.stream is not sys.stdout:
            with self._named():
                self.stream.close()

    def _put(self, text: str) -> None:
        with self._named():
            self.stream.write(text)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error says which file it is about: a stream's own, such as that of a full disk, does not."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file or "standard output")) from error


def flattened(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Each class's probability as a column of its own: `probability_cat`."""
    flat = {key: value for key, value in prediction.items() if key != "probabilities"}
    return flat | {f"probability_{name}": value for name, value in prediction.get("probabilities", {}).items()}


def _line(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([in_one_line(c) if isinstance(c, str) else c for c in cells])
    return line.getvalue()
