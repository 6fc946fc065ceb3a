"""Where predictions go: CSV or JSON lines, to a file that can be gone on with, or to standard output."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.predict.rows import Row, in_one_line

PLACE = ("input", "row")
"""The columns that say what a prediction is of."""


class Output:
    """Predictions as lines, each written as a whole: what a file holds after a stop is what was done.

    Args:
        file: ends in `.csv` or `.jsonl`; None is CSV on standard output.
        resume: whether a file that is there is gone on with.

    Raises:
        UserError: another kind of file; one that exists already.
    """

    def __init__(self, file: Path | None, resume: bool = False):
        self.file, self.resume = file, resume
        if file is None:
            if resume:
                raise UserError("--resume: goes on with a file; give --out FILE")
        elif file.suffix.lower() not in (".csv", ".jsonl"):
            raise UserError(f"--out {file}: expected a name that ends in .csv or .jsonl")
        elif file.exists() and not resume:
            raise UserError(f"--out {file}: exists already; --resume goes on where it ends")
        self.is_csv = file is None or file.suffix.lower() == ".csv"
        self.columns: Sequence[str] = ()
        self.stream: TextIO = sys.stdout

    def not_done(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows that come after the last one in the file; all where there is none.

        Raises:
            UserError: a file of something else; its last row is none of `rows`.
        """
        last = self._last_key() if self.resume and self.file is not None and self.file.exists() else None
        if last is None:
            yield from rows
            return
        for row in rows:
            if row.key == last:
                break
        else:
            raise UserError(f"--out {self.file}: its last row, {' '.join(last).strip()}, is none of these inputs'")
        yield from rows

    def _last_key(self) -> tuple[str, str] | None:
        """What the last whole line is of; the rest of one that was cut off is taken away."""
        assert self.file is not None
        with self.file.open("rb+") as lines:
            first = last = b""
            whole = 0
            for line in lines:
                if line.endswith(b"\n"):
                    first, last, whole = first or line, line, whole + len(line)
            lines.truncate(whole)
        if not first or (self.is_csv and first == last):
            return None
        try:
            text = last.decode()
            if self.is_csv:
                header = next(csv.reader([first.decode()]))
                values: Mapping[str, Any] = dict(zip(header, next(csv.reader([text])), strict=True))
            else:
                values = json.loads(text)
            number = values["row"]
            return str(values["input"]), "" if number is None else str(number)
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"--out {self.file}: not a file of predictions, so nothing to go on with") from error

    def open(self, columns: Sequence[str]) -> None:
        """Begins to write, or goes on.

        Args:
            columns: what a row of a table holds beside its place.

        Raises:
            UserError: the file that is gone on with has other columns.
        """
        self.columns = (*PLACE, *columns)
        header = _line(self.columns)
        begun = False
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            begun = self.file.exists() and self.file.stat().st_size > 0
            if begun and self.is_csv:
                with self.file.open(encoding="utf-8", newline="") as there:
                    if there.readline() != header:
                        raise UserError(f"--out {self.file}: has other columns than {header.strip()}")
            self.stream = self.file.open("a", encoding="utf-8", newline="")
        if self.is_csv and not begun:
            self.stream.write(header)
            self.stream.flush()

    def write(self, row: Row, prediction: Mapping[str, Any]) -> None:
        """Writes a line."""
        name, _ = row.key
        if self.is_csv:
            flat = {"input": name, "row": row.number} | flattened(prediction)
            self.stream.write(_line([flat.get(column, "") for column in self.columns]))
        else:
            self.stream.write(json.dumps({"input": name, "row": row.number} | dict(prediction)) + "\n")

    def flush(self) -> None:
        """Makes what was written so far stay, whatever happens next."""
        self.stream.flush()

    def close(self) -> None:
        """Ends the file."""
        if self.file is not None and self.stream is not sys.stdout:
            self.stream.close()


def flattened(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Each class's probability as a column of its own: `probability_cat`."""
    flat = {key: value for key, value in prediction.items() if key != "probabilities"}
    return flat | {f"probability_{name}": value for name, value in prediction.get("probabilities", {}).items()}


def _line(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([in_one_line(c) if isinstance(c, str) else c for c in cells])
    return line.getvalue()
