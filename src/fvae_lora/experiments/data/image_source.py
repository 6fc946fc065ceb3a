"""Labelled images by name: a local folder, a data set on the hub, or the digits that ship with scikit-learn.

Whatever the source, a split has two columns: `image` (a file's path or its bytes, not decoded) and `label`; and
`group`, if the recipe asks for groups.
"""

from collections.abc import Callable
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from fvae_lora.experiments.data.celeba import read_celeba
from fvae_lora.experiments.data.source import (
    SPLIT_NAMES,
    official_splits,
    own_columns,
    read_tables,
    with_classes,
    without_hidden,
)
from fvae_lora.experiments.data.spuco_animals import read_spuco_animals
from fvae_lora.experiments.data.waterbirds import read_waterbirds
from fvae_lora.experiments.recipe import DataSettings

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def open_images(name: str, settings: DataSettings) -> dict[str, Dataset]:
    """The official splits of a data set, by their usual names: `train`, and `validation` and `test` where they exist.

    Raises:
        UserError: no such data set; a split that is empty; one class only; labels that differ between splits; rows
            without a label or a group.
    """
    splits = BUILT_IN[name]() if name in BUILT_IN else official_splits(name, settings, _from_folder)
    typed = [column for column, feature in splits["train"].features.items() if isinstance(feature, Image)]
    images = [settings.image_column] if settings.image_column else [*typed, "image", "img"]
    splits = own_columns(name, splits, settings, {"image": ("data.image_column", images)})
    splits = {split: rows.cast_column("image", Image(decode=False)) for split, rows in splits.items()}
    return with_classes(name, without_hidden(splits), settings)


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
    """A published layout, tables with images in them, or a folder of images for each class, also below each split's."""
    for read in PUBLISHED_LAYOUTS:
        if (published := read(folder)) is not None:
            return published
    if tables := read_tables(folder, [".parquet"]):
        return tables
    parts = {SPLIT_NAMES[p.name]: p for p in sorted(folder.iterdir()) if p.is_dir() and p.name in SPLIT_NAMES}
    return {split: _from_class_folders(part) for split, part in (parts or {"train": folder}).items()}


def _from_class_folders(folder: Path) -> Dataset:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files += [str(file) for file in found]
        labels += [label] * len(found)
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({"image": files, "label": labels}, features=features)
