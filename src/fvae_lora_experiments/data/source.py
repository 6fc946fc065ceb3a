"""Where a data set is: on this machine, by its path or as a local copy, or on the hub."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from fvae_lora_experiments.data.files import Notes, describe_contents
from fvae_lora_experiments.data.hub import fetch, usual_splits
from fvae_lora_experiments.data.tables import table_row_locations
from fvae_lora_experiments.errors import NoSuchDataError, UserError
from fvae_lora_experiments.places import is_local, local_copy
from fvae_lora_experiments.schema import DataSettings

LocalReader = Callable[[Path, Notes], dict[str, Dataset]]


def official_splits(name: str, settings: DataSettings, read: LocalReader, notes: Notes) -> dict[str, Dataset]:
    """The official splits of a data set with all of their columns: `train`, and `validation` and `test` if it has them.

    Args:
        name: a local folder or file, or a name on the hub.
        settings: its `config` chooses the configuration on the hub.
        read: reads the splits of a local folder or file.
        notes: gets where the splits come from, and what is left out.

    Raises:
        UserError: no such data set, or one without a train split.
    """
    place = local_path(name, settings.config)
    splits = read(place, notes) if place else _from_hub(name, settings.config, notes)
    if "train" not in splits:
        there = ", ".join(splits) or (describe_contents(place) if place else "nothing")
        raise UserError(f"dataset {name}: no train split; it has {there}")
    return splits


def _from_hub(name: str, config: str | None, notes: Notes) -> dict[str, Dataset]:
    fetched = fetch(name, config, usual_splits, notes)
    used = usual_splits(fetched)
    notes.sources |= {split: f"split {own} on the hub" for own, split in used.items()}
    return {split: fetched[own] for own, split in used.items()}


def row_locations(name: str, settings: DataSettings, split: str, count: int) -> list[str]:
    """Where each of the `count` rows of an official split is, for messages: its table, if there is one, and its number.

    Rows are counted from 1.
    """
    place = local_path(name, settings.config)
    in_files = table_row_locations(place, split) if place else []
    if len(in_files) == count:
        return in_files
    return [f"dataset {name}: split {split}, row {n}" for n in range(1, count + 1)]


def local_path(name: str, config: str | None) -> Path | None:
    """The folder or file of the data set on this machine; None if it must come from the hub."""
    if is_local(name):
        if not Path(name).exists():
            raise NoSuchDataError(f"dataset {name}: no such file or folder")
        return Path(name)
    return local_copy(name, config)
