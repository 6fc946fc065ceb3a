"""Labelled images by name: a local folder, a data set on the hub, or the digits that ship with scikit-learn.

A data set on the hub is taken from the folder that the variable `FVAE_LORA_DATA_ROOT` names, if there is a copy of it.
Whatever the source, a split has two columns: `image` (a file's path or its bytes, not decoded) and `label`; and
`group`, if the recipe asks for groups.
"""

import os
from collections.abc import Callable
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Features, Image

from fvae_lora.experiments.data.celeba import read_celeba
from fvae_lora.experiments.data.columns import as_classes, missing, names_in
from fvae_lora.experiments.data.groups import with_groups
from fvae_lora.experiments.data.spuco_animals import read_spuco_animals
from fvae_lora.experiments.data.waterbirds import read_waterbirds
from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.names import is_local
from fvae_lora.experiments.recipe import DataSettings

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
DATA_ROOT = "FVAE_LORA_DATA_ROOT"
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def open_source(name: str, settings: DataSettings) -> dict[str, Dataset]:
    """The official splits of a data set, by their usual names: `train`, and `validation` and `test` where they exist.

    Raises:
        UserError: no such data set; a split that is empty; one class only; labels that differ between splits; rows
            without a group.
    """
    if name in BUILT_IN:
        splits = BUILT_IN[name]()
    elif is_local(name):
        splits = _from_folder(Path(name))
    elif copy := copy_of(name, settings.config):
        splits = _from_folder(copy)
    else:
        splits = _from_hub(name, settings.config)
    if "train" not in splits:
        raise UserError(f"dataset {name}: no train split; it has {', '.join(splits) or 'nothing'}")
    splits = _with_classes(name, {key: _own_columns(name, key, rows, settings) for key, rows in splits.items()})
    return splits if settings.group_column is None else with_groups(name, splits)


def _digits() -> dict[str, Dataset]:
    from PIL import Image as Pil
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Pil.fromarray((image * 255 / 16).round().astype("uint8")) for image in digits.images]
    labels = ClassLabel(names=[str(digit) for digit in digits.target_names])
    features = Features({"image": Image(), "label": labels})
    return {"train": Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)}


BUILT_IN: dict[str, Callable[[], dict[str, Dataset]]] = {"sklearn-digits": _digits}
"""Data sets that need neither a network nor a folder."""


PUBLISHED_LAYOUTS: tuple[Callable[[Path], dict[str, Dataset] | None], ...] = (
    read_waterbirds,
    read_celeba,
    read_spuco_animals,
)
"""Readers of data sets in the layout that they were published in; each gives None for other folders."""


def _from_folder(folder: Path) -> dict[str, Dataset]:
    if not folder.is_dir():
        raise UserError(f"dataset {folder}: no such folder")
    for read in PUBLISHED_LAYOUTS:
        if (published := read(folder)) is not None:
            return published
    files = [(file, _split_of(file.relative_to(folder))) for file in sorted(folder.rglob("*.parquet"))]
    if files:
        named = any(split for _, split in files)
        by_split: dict[str, list[str]] = {}
        for file, split in files:
            if split or not named:
                by_split.setdefault(split or "train", []).append(str(file))
        try:
            return dict(datasets.load_dataset("parquet", data_files=by_split))
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            cause = str(error.__cause__ or error).strip().partition("\n")[0]
            raise UserError(f"dataset {folder}: its parquet files cannot be read as one table: {cause}") from error
    parts = {SPLIT_NAMES[p.name]: p for p in sorted(folder.iterdir()) if p.is_dir() and p.name in SPLIT_NAMES}
    return {split: _from_class_folders(part) for split, part in (parts or {"train": folder}).items()}


def _split_of(file: Path) -> str | None:
    """`train-00000-of-00002.parquet` and `train/0.parquet` belong to train, `extra.parquet` to no split."""
    for part in (file.name.split(".")[0].split("-")[0], *(parent.name for parent in file.parents)):
        if part in SPLIT_NAMES:
            return SPLIT_NAMES[part]
    return None


def _from_class_folders(folder: Path) -> Dataset:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files += [str(file) for file in found]
        labels += [label] * len(found)
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({"image": files, "label": labels}, features=features)


def copy_of(name: str, config: str | None) -> Path | None:
    """The local copy of a data set: `ROOT/owner/name` or `ROOT/name`, or its configuration's folder in that."""
    root = os.environ.get(DATA_ROOT)
    for copy in (Path(root) / name, Path(root) / Path(name).name) if root else ():
        if copy.is_dir():
            return copy / config if config and (copy / config).is_dir() else copy
    return None


def _from_hub(name: str, config: str | None) -> dict[str, Dataset]:
    try:
        builder = _builder(name, config)
        if files := builder.config.data_files:  # none where the cache answers for the hub
            for split in files.keys() - SPLIT_NAMES.keys():
                del files[split]  # never fetched: SVHN's extra images are most of it
            if not files:
                return {}
        builder.download_and_prepare(verification_mode="no_checks")  # which would miss the other splits
        found = builder.as_dataset()
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"dataset {name}: neither a local folder nor to be had from the hub: {line}") from error
    return {SPLIT_NAMES[split]: rows for split, rows in found.items() if split in SPLIT_NAMES}


def _builder(name: str, config: str | None) -> datasets.DatasetBuilder:
    """A data set on the hub, prepared in a folder of its own: other programs are to find whole data sets in theirs."""
    shared = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        return datasets.load_dataset_builder(name, config, cache_dir=str(shared / "fvae-lora"))
    except (OSError, ValueError):
        if not datasets.config.HF_HUB_OFFLINE:
            raise
        return datasets.load_dataset_builder(name, config)  # what another program fetched serves, too


def _own_columns(name: str, split: str, rows: Dataset, settings: DataSettings) -> Dataset:
    if not len(rows):
        raise UserError(f"dataset {name}: split {split} is empty")
    typed = {kind: [c for c, f in rows.features.items() if isinstance(f, kind)] for kind in (Image, ClassLabel)}
    columns = {}
    wanted_columns = [
        ("image", settings.image_column, [*typed[Image], "image", "img"]),
        ("label", settings.label_column, [*typed[ClassLabel], "label", "labels"]),
    ]
    if settings.group_column is not None:
        wanted_columns.append(("group", settings.group_column, []))
    for what, wanted, candidates in wanted_columns:
        found = next((c for c in ([wanted] if wanted else candidates) if c in rows.column_names), None)
        if found is None:
            raise UserError(
                f"dataset {name}: no {what} column in split {split}; set data.{what}_column to one of "
                f"{', '.join(rows.column_names)}"
            )
        columns[found] = what
    rows = rows.select_columns(list(columns)).rename_columns(columns)
    return rows.cast_column("image", Image(decode=False))


def _with_classes(name: str, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    for split, rows in splits.items():
        if any(map(missing, rows["label"])):
            raise UserError(f"dataset {name}: split {split} has rows without a label")
    classes = {split: names_in(rows, "label") for split, rows in splits.items()}
    for split, found in classes.items():
        if different := sorted(set(found) ^ set(classes["train"])):
            raise UserError(
                f"dataset {name}: split {split} and split train differ in their labels: {', '.join(different[:5])}"
            )
    if len(classes["train"]) < 2:
        raise UserError(f"dataset {name}: split train has one class only: {classes['train'][0]}")
    return {split: as_classes(rows, "label", classes["train"]) for split, rows in splits.items()}
