"""Data sets of recordings and what is said in them: columns `audio` and `text`, in tables or on the hub."""

from functools import partial
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, Features, Value

from fvae_lora_experiments.data.audio_decoding import SOUND, sound_content
from fvae_lora_experiments.data.columns import check_texts
from fvae_lora_experiments.data.encoded import cell_of
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.source import local_path, official_splits, row_locations
from fvae_lora_experiments.data.tables import read_tables
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.schema import DataSettings

COLUMNS = ["audio", "text"]
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".sph")
"""Suffixes of the sound files that tables may name."""


def open_recordings(name: str, settings: DataSettings, notes: Notes | None = None) -> dict[str, Dataset]:
    """The official splits of a data set: `audio`, `text`, and for messages `where` each row is.

    Args:
        name: a folder of tables, a table, or a name on the hub. Paths in a folder's tables are relative to it. Sounds
            are not decoded: each is a path or bytes.
        settings: of the recipe.
        notes: gets where the splits come from, and what is left out.

    Raises:
        UserError: no such data set, one without these columns, or a row without text.
    """
    read = partial(read_tables, beside=SOUNDS)
    splits = official_splits(name, settings, read, Notes() if notes is None else notes)
    place = local_path(name, settings.config) or Path()
    folder = place.parent if place.is_file() else place
    splits = {split: _columns(name, folder, split, rows) for split, rows in splits.items()}
    check_texts(name, splits, settings, "text")
    return {
        split: rows.add_column("where", _where(rows, row_locations(name, settings, split, len(rows))))
        for split, rows in splits.items()
    }


def _where(rows: Dataset, places: list[str]) -> list[str]:
    paths = (audio and audio["path"] for audio in rows["audio"])
    return [f"{place}, {path}" if path else place for place, path in zip(places, paths, strict=True)]


def _columns(name: str, folder: Path, split: str, rows: Dataset) -> Dataset:
    for column in COLUMNS:
        if column not in rows.column_names:
            raise UserError(
                f"dataset {name}: no {column} column in split {split}; it has {', '.join(rows.column_names)}"
            )
    if not len(rows):
        raise UserError(f"dataset {name}: split {split} is empty")
    rows = rows.select_columns(COLUMNS)
    if isinstance(rows.features["audio"], Value):
        features = Features({"audio": SOUND, "text": rows.features["text"]})
        return rows.map(lambda row: {"audio": _sound(folder, row["audio"])}, features=features)
    try:
        return rows.cast_column("audio", Audio(decode=False))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"dataset {name}: split {split}: its audio column holds neither sounds nor paths") from error


def _sound(folder: Path, path: Any) -> dict[str, Any]:
    return cell_of(None if path is None else folder / str(path))


def recording_content(row: dict[str, Any]) -> bytes:
    """A row's sound, encoded, and its text.

    Raises:
        UserError: a sound that cannot be read.
    """
    return sound_content(row) + b"\0" + str(row["text"]).encode()
