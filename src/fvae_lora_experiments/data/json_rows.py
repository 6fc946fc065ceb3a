"""Rows of JSON: a list of them in a file, or one on each line; either may be packed by gzip."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvae_lora_experiments.errors import UserError, first_line


def read_json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, whatever each of them is, with the words that say where it stands: `FILE, line 3`.

    Lines without a row are passed over. A list may be spread over lines; its rows are called by their numbers, from 1.

    Raises:
        UserError: a file that cannot be read, or that is not JSON; names the line.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}") from error
    if content.lstrip().startswith(b"["):
        for number, row in enumerate(_parsed(file, content, 1), 1):
            yield f"{file}, row {number}", row
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{file}, line {number}", _parsed(file, line, number)


def _parsed(file: Path, content: bytes, first: int) -> Any:
    """What `content` says, which begins on the line `first` of the file."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {first + error.lineno - 1}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = first + content.count(b"\n", 0, error.start)
        raise UserError(f"{file}, line {line}: not JSON: {error}") from error
