"""Data sets from the hub, or from the cache of what was fetched before."""

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import datasets
from datasets import Dataset

from fvae_lora_experiments.data.files import SPLIT_NAMES, Notes
from fvae_lora_experiments.errors import NoSuchDataError, UserError, first_line


def fetch(
    name: str, config: str | None, select: Callable[[Collection[str]], Collection[str]], notes: Notes
) -> dict[str, Dataset]:
    """The selected splits of a data set, by their names on the hub.

    Args:
        name: the data set's name on the hub.
        config: its configuration; None for the default.
        select: chooses from the names of the splits; the others are not downloaded.
        notes: gets the splits that are not used.

    Raises:
        UserError: no such data set, no connection, or a cache that cannot be written.
    """
    require_cache()
    try:
        builder = _builder(name, config)
        if files := builder.config.data_files:  # none where the cache answers for the hub
            for split in _unused(files, select, notes):
                del files[split]  # never fetched: SVHN's extra images are most of it
            if not files:
                return {}
        builder.download_and_prepare(verification_mode="no_checks")  # which would miss the other splits
        found = builder.as_dataset()
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise _not_fetched(name, error) from error
    for split in _unused(found, select, notes):
        del found[split]
    return dict(found)


def usual_splits(names: Collection[str]) -> dict[str, str]:
    """Which splits on the hub are `train`, `validation` and `test`, by their names there.

    Where several could be one of these, the most usual name wins.
    """
    names = [str(name) for name in names]  # datasets has a type of its own for some
    used: dict[str, str] = {}
    for usual, split in SPLIT_NAMES.items():
        for name in names:
            if name.lower() == usual and split not in used.values():
                used[name] = split
    return {name: used[name] for name in names if name in used}


def require_cache() -> None:
    """Tables and data sets from the hub go through a cache: where it cannot be written, the data are not to blame.

    Raises:
        UserError: names the folder, and why it cannot be written.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cache folder {folder}: {error.strerror}; HF_HOME sets where it is") from error


def _unused(splits: Collection[str], select: Callable[[Collection[str]], Collection[str]], notes: Notes) -> list[str]:
    selected = select(splits)
    unused = [split for split in splits if str(split) not in selected]
    for split in unused:
        notes.leave_out("unused split", str(split))
    return unused


def _builder(name: str, config: str | None) -> datasets.DatasetBuilder:
    """Prepares in a cache of its own: other programs should find complete data sets in the shared one."""
    shared = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        return datasets.load_dataset_builder(name, config, cache_dir=str(shared / "fvae-lora"))
    except (OSError, ValueError):
        if not datasets.config.HF_HUB_OFFLINE:
            raise
        return datasets.load_dataset_builder(name, config)  # what another program fetched will do, too


def _not_fetched(name: str, error: Exception) -> UserError:
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) and not datasets.config.HF_HUB_OFFLINE:
        return NoSuchDataError(f"dataset {name}: no such folder, and no such name on the hub")
    if isinstance(error, ConnectionError | FileNotFoundError) and not str(error).startswith("[Errno"):
        why = (
            "the hub is switched off (HF_HUB_OFFLINE)"
            if datasets.config.HF_HUB_OFFLINE
            else "the hub cannot be reached"
        )
        return NoSuchDataError(f"dataset {name}: no such folder, and no such name in the cache; {why}")
    return UserError(f"dataset {name}: not a local folder, and it cannot be fetched from the hub: {first_line(error)}")
