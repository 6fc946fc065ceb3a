"""Data sets of labelled images: a local folder or table, a name on the hub, or the digits that scikit-learn ships.

Whatever the source, a split has two columns: `image` (a file's path or its bytes, not decoded) and `label`; and
`group`, if the recipe asks for groups.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value

from fvae_lora_experiments.data.classes import class_names
from fvae_lora_experiments.data.columns import select_columns
from fvae_lora_experiments.data.encoded import cell_of
from fvae_lora_experiments.data.files import (
    Notes,
    describe_contents,
    enumerate_names,
    has_suffix,
    is_hidden,
    refuse_duplicate_split,
    split_of_folder,
    visible_files,
)
from fvae_lora_experiments.data.image_decoding import readable_suffixes
from fvae_lora_experiments.data.labels import drop_unlabelled, with_classes
from fvae_lora_experiments.data.source import official_splits
from fvae_lora_experiments.data.spurious import read_published
from fvae_lora_experiments.data.tables import READERS, read_tables
from fvae_lora_experiments.errors import NoClassesError, UserError
from fvae_lora_experiments.places import DIGITS
from fvae_lora_experiments.schema import DataSettings

IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "file", "filepath", "path", "image_path")
"""What the column of images, or of their files, may be called; `file_name` is the hub's for `metadata.csv`."""

ENCODED = Image(decode=False)

LAYOUTS = (
    "a folder for each class with its images, also below train/ and test/; "
    "a table of images, or of their paths (image or file_name) and labels, such as metadata.csv"
)


def open_images(name: str, settings: DataSettings, notes: Notes | None = None) -> dict[str, Dataset]:
    """The official splits of a data set, by their usual names: `train`, and `validation` and `test` where they exist.

    Args:
        name: a folder, a table, a name on the hub or one of `BUILT_IN`.
        settings: of the recipe.
        notes: gets where the splits come from, and what is left out.

    Raises:
        UserError: no such data set; an empty split; only one class; labels that differ between splits; rows without
            a label or a group.
    """
    notes = Notes() if notes is None else notes
    read = partial(_read_local, settings)
    splits = BUILT_IN[name]() if name in BUILT_IN else official_splits(name, settings, read, notes)
    typed = [column for column, feature in splits["train"].features.items() if isinstance(feature, Image)]
    images = [settings.image_column] if settings.image_column else [*typed, *IMAGE_COLUMNS]
    splits = select_columns(name, splits, settings, {"image": ("data.image_column", images)}, notes)
    splits = {split: rows.cast_column("image", Image(decode=False)) for split, rows in splits.items()}
    return with_classes(name, drop_unlabelled(splits, settings, notes), settings)


def _digits() -> dict[str, Dataset]:
    from PIL import Image as Pil
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Pil.fromarray((image * 255 / 16).round().astype("uint8")) for image in digits.images]
    labels = ClassLabel(names=[str(digit) for digit in digits.target_names])
    features = Features({"image": Image(), "label": labels})
    return {"train": Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)}


BUILT_IN: dict[str, Callable[[], dict[str, Dataset]]] = {DIGITS: _digits}
"""Data sets that come with an installed library."""


def _read_local(settings: DataSettings, place: Path, notes: Notes) -> dict[str, Dataset]:
    """A published layout, tables with images or paths in them, or a folder of images for each class.

    If all images are of one class, a table that says more is preferred.
    """
    tables = partial(_read_tables, settings, place)
    if place.is_file():
        return tables(notes)
    if (published := read_published(place)) is not None:
        return published
    lone = None
    for layout in (partial(tables, suffixes=[".parquet"]), partial(_read_class_folders, place), tables):
        own = Notes()
        if not (splits := layout(own)):
            continue
        if layout is tables or any(len(class_names(rows)) != 1 for rows in splits.values()):
            notes.add(own)
            return splits
        lone = lone or splits
    if lone is None:
        raise _not_understood(place)
    return lone


def _not_understood(folder: Path) -> UserError:
    images = [file for file in visible_files(folder, Notes()) if has_suffix(file, readable_suffixes())]
    why, kind = f"no images; it has {describe_contents(folder)}", UserError
    if images:
        why, kind = f"{len(images)} images, but neither folders nor a table give their classes", NoClassesError
    return kind(f"dataset {folder}: {why}; readable layouts: {LAYOUTS}")


def _read_tables(
    settings: DataSettings, place: Path, notes: Notes, suffixes: Sequence[str] = tuple(READERS)
) -> dict[str, Dataset]:
    """The splits in tables; a single table is split by the folders in its paths, if these are named after splits.

    Raises:
        UserError: some paths lie in folders of several splits, and others do not.
    """
    splits = read_tables(place, notes, suffixes, readable_suffixes(), partial(_with_image_files, settings))
    if list(splits) != ["train"]:
        return splits
    root, rows = place if place.is_dir() else place.parent, splits["train"]
    files = next((column for column, feature in rows.features.items() if feature == ENCODED), None)
    found = [_split_of_path(Path(image["path"]), root) for image in rows[files]] if files else []
    if len(set(found) - {None}) < 2:
        return splits
    if None in found:
        row = found.index(None) + 1
        raise UserError(f"dataset {place}: row {row}: its image is not in a split's folder, but others are")
    notes.sources = {split: f"{notes.sources['train']}, paths below {split}'s folder" for split in found if split}
    return {split: rows.select([i for i, own in enumerate(found) if own == split]) for split in notes.sources}


def _split_of_path(image: Path, root: Path) -> str | None:
    inside = image.relative_to(root).parts[:-1] if image.is_relative_to(root) else ()
    return next(filter(None, map(split_of_folder, inside)), None)


def _with_image_files(settings: DataSettings, table: Path, rows: Dataset) -> Dataset:
    """A table's rows, with images in place of the paths of their files, which are relative to the table's folder.

    Raises:
        UserError: a file that does not exist.
    """
    wanted = [settings.image_column] if settings.image_column else IMAGE_COLUMNS
    column = next((name for name in wanted if name in rows.column_names), None)
    if column is None or rows.features[column] not in (Value("string"), Value("large_string")):
        return rows
    images: list[dict[str, Any]] = []
    for number, path in enumerate(rows[column], 1):
        if path is None or not (table.parent / path).is_file():
            raise UserError(f"{table}, row {number}: no image {path}")
        images.append(cell_of(table.parent / path))
    return rows.remove_columns(column).add_column(column, images).cast_column(column, ENCODED)


def _read_class_folders(folder: Path, notes: Notes) -> dict[str, Dataset]:
    """Folders of classes, inside those of splits if there are any; no splits if images are laid out otherwise."""
    seen = Notes()
    files = visible_files(folder, seen)
    images = [file for file in files if has_suffix(file, readable_suffixes())]
    parts = _split_folders(folder, images)
    if not parts:
        return {}
    splits, used = {}, set()
    for split, part in parts.items():
        mine = [image for image in images if image.is_relative_to(part) and image.parent != part]
        splits[split] = _rows(part, mine)
        used.update(mine)
        notes.sources[split] = f"{part.relative_to(folder)}/" if part != folder else "a folder for each class"
        for name in sorted(set(_subfolders(part)) - set(class_names(splits[split]))):
            notes.warnings.append(f"{name}: no images in this folder, so it is not a class")
    for file in files:
        if file not in used:
            notes.leave_out(*_reason_left_out(file, folder, list(parts.values())))
    notes.add(seen)
    return splits


def _split_folders(folder: Path, images: Sequence[Path]) -> dict[str, Path]:
    """The folder of each split, which holds those of the classes; none if the images are laid out otherwise.

    A folder that holds only one other folder is passed through. One called `train` that holds images and no folders is
    a class if there are others beside it.

    Raises:
        UserError: two folders for one split.
    """
    inside = [image.relative_to(folder).parts for image in images]
    tops, nested = ({parts[0] for parts in inside if len(parts) > depth} for depth in (1, 2))
    of_split = {name: split for name in _subfolders(folder) if (split := split_of_folder(name))}
    if nested & of_split.keys():
        for split in of_split.values():
            if len(same := [f"{name}/" for name, other in of_split.items() if other == split]) > 1:
                refuse_duplicate_split(folder, split, enumerate_names(same))
        return {split: folder / name for name, split in of_split.items()}
    if len(tops & of_split.keys()) > 1 or tops <= of_split.keys():
        return {}
    if len(tops) == 1 and all(len(parts) > 2 for parts in inside):
        return _split_folders(folder / tops.pop(), images)
    return {"train": folder}


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))


def _reason_left_out(file: Path, folder: Path, parts: Sequence[Path]) -> tuple[str, str]:
    """Why a file is left out, and its name in the summary."""
    kind = file.suffix.lower() or file.name
    if not has_suffix(file, readable_suffixes()):
        return "not an image that can be read", kind
    if any(file.is_relative_to(part) for part in parts):
        return "not in a class's folder", kind
    top = file.relative_to(folder).parts[0]
    return "not in a split's folder", kind if top == file.name else f"{top}/"


def _rows(folder: Path, images: Sequence[Path]) -> Dataset:
    """Images labelled by the topmost folder, below `folder`, that they lie in."""
    names = [image.relative_to(folder).parts[0] for image in images]
    features = Features({"image": Image(), "label": ClassLabel(names=sorted(set(names)))})
    return Dataset.from_dict({"image": [str(image) for image in images], "label": names}, features=features)
