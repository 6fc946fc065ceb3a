"""Cells that hold an image or a sound that is not decoded: the path of its file, or the bytes of one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cell_of(path: str | Path | None) -> dict[str, Any]:
    """The cell of a file; None where there is none."""
    return {"bytes": None, "path": None if path is None else str(path)}


def encoded_bytes(cell: Mapping[str, Any]) -> bytes:
    """The bytes of the file that a cell holds.

    Raises:
        OSError: it cannot be read.
        TypeError: the cell is empty.
    """
    encoded: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    return encoded
