"""Records of a study that are not runs of the package: JSON lines, packed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fvae_lora_experiments.run.folder import write_atomically

Line = dict[str, Any]


def read_lines(file: Path) -> list[Line]:
    """The lines of a file; none if it does not exist yet."""
    if not file.exists():
        return []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_lines(file: Path, lines: Iterable[Line]) -> None:
    """Replaces the file; the same lines give the same bytes."""
    text = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines)
    write_atomically(file, gzip.compress(text.encode(), mtime=0))
