"""Rows of each task that reads tables, and folders of such tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from fvae_lora_experiments.data import open_images
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.questions import open_questions
from fvae_lora_experiments.data.recordings import open_recordings
from fvae_lora_experiments.data.texts import open_texts
from fvae_lora_experiments.schema import DataSettings, TextSettings

DEFAULT = DataSettings()


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, colour, colour)).save(buffer, "png")
    return buffer.getvalue()


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows in the format that the file's suffix, in any case, says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        Dataset.from_list([dict(row) for row in rows]).to_parquet(file)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        file.write_text(json.dumps(list(rows)))
    else:
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def texts(count: int, labels: Sequence[Any] = ("dull", "fine")) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(count)]


def pictures_in_a_table(count: int) -> list[dict[str, Any]]:
    return [{"image": {"bytes": png(i), "path": None}, "label": "ab"[i % 2]} for i in range(count)]


def questions(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i}?", "choices": ["a", "b"], "answer": 1} for i in range(count)]


def recordings(count: int) -> list[dict[str, Any]]:
    return [{"audio": f"{i}.wav", "text": f"text {i}"} for i in range(count)]


def open_as_text(name: str, settings: DataSettings = DEFAULT, notes: Notes | None = None) -> dict[str, Dataset]:
    return open_texts(name, settings, TextSettings(), notes)


TASKS: dict[str, tuple[str, Callable[[int], list[dict[str, Any]]], Callable[..., dict[str, Dataset]]]] = {
    "image": (".parquet", pictures_in_a_table, lambda name, notes=None: open_images(name, DEFAULT, notes)),
    "text": (".csv", texts, lambda name, notes=None: open_as_text(name, DEFAULT, notes)),
    "commonsense": (".jsonl", questions, lambda name, notes=None: open_questions(name, None, None, notes)),
    "transcription": (".jsonl", recordings, lambda name, notes=None: open_recordings(name, DEFAULT, notes)),
}
"""The tasks that read tables: a format, rows, and what opens them. Phonemes have their own layout, see below."""


def lay_out(folder: Path, task: str, files: Mapping[str, int]) -> Path:
    """Tables of so many rows, by their paths without a suffix."""
    suffix, rows, _ = TASKS[task]
    for name, count in files.items():
        write(folder / f"{name}{suffix}", rows(count))
    return folder
