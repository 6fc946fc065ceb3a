"""Published data sets with spurious correlations, in their authors' layouts: classes, groups, how many rows each has.

Rows per group and split of Waterbirds and CelebA are those of Sagawa et al., "Distributionally robust neural networks
for group shifts" (2020), of SpuCo Animals those of its package.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from fvae_lora_experiments.data.classes import class_names
from fvae_lora_experiments.data.groups import group_counts
from fvae_lora_experiments.errors import UserError

SPLITS = ("train", "validation", "test")
"""In the order of their numbers in metadata files."""

Row = tuple[str, Path, int, int]
"""Split, image file, label, group."""


@dataclass(frozen=True)
class Published:
    """A published data set."""

    name: str
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    """Rows of each group, by split."""

    def splits(self, rows: Iterable[Row]) -> dict[str, Dataset]:
        """Rows as data sets, by split."""
        columns: dict[str, tuple[list[str], list[int], list[int]]] = {}
        for split, image, label, group in rows:
            images, labels, groups = columns.setdefault(split, ([], [], []))
            images.append(str(image))
            labels.append(label)
            groups.append(group)
        label, group = ClassLabel(names=list(self.classes)), ClassLabel(names=list(self.groups))
        features = Features({"image": Image(), "label": label, "group": group})
        return {
            split: Dataset.from_dict(dict(zip(features, columns[split], strict=True)), features=features)
            for split in SPLITS
            if split in columns
        }


WATERBIRDS = Published(
    "Waterbirds",
    classes=("landbird", "waterbird"),
    groups=("landbird/land", "landbird/water", "waterbird/land", "waterbird/water"),
    counts={"train": (3498, 184, 56, 1057), "validation": (467, 466, 133, 133), "test": (2255, 2255, 642, 642)},
)
CELEBA = Published(
    "CelebA (blond)",
    classes=("not blond", "blond"),
    groups=("not blond/female", "not blond/male", "blond/female", "blond/male"),
    counts={
        "train": (71629, 66874, 22880, 1387),
        "validation": (8535, 8276, 2874, 182),
        "test": (9767, 7535, 2480, 180),
    },
)
SPUCO_ANIMALS = Published(
    "SpuCo Animals",
    classes=("landbirds", "waterbirds", "small_dogs", "big_dogs"),
    groups=(
        "landbirds/land",
        "landbirds/water",
        "waterbirds/land",
        "waterbirds/water",
        "small_dogs/indoor",
        "small_dogs/outdoor",
        "big_dogs/indoor",
        "big_dogs/outdoor",
    ),
    counts={
        "train": (10000, 500, 500, 10000) * 2,
        "validation": (500, 25, 25, 500) * 2,
        "test": (500,) * 8,
    },
)


def read_published(folder: Path) -> dict[str, Dataset] | None:
    """The splits with `image`, `label` and `group`, if `folder` is laid out as one of these data sets; else None.

    Raises:
        UserError: a missing image, a bad value, files that contradict each other; names the file and its line.
    """
    for read in (_read_waterbirds, _read_celeba, _read_spuco_animals):
        if (splits := read(folder)) is not None:
            return splits
    return None


WATERBIRDS_COLUMNS = ("img_filename", "y", "split", "place")


def _read_waterbirds(folder: Path) -> dict[str, Dataset] | None:
    """A folder of images and a metadata.csv with a line for each; the group is 2 y + place."""
    file = folder / "metadata.csv"
    if not file.is_file() or not set(WATERBIRDS_COLUMNS) <= set(next(csv.reader(_text_lines(file)), [])):
        return None
    return WATERBIRDS.splits(_waterbirds_rows(file))


def _waterbirds_rows(file: Path) -> Iterator[Row]:
    lines = csv.DictReader(_text_lines(file))
    for row in lines:
        where = f"{file}, line {lines.line_num}"
        split = _integer(row["split"], range(len(SPLITS)), where, "split")
        y, place = (_integer(row[key], range(2), where, key) for key in ("y", "place"))
        image = file.parent / (row["img_filename"] or "")
        if not image.is_file():
            raise UserError(f"{where}: no image {row['img_filename']}")
        yield SPLITS[split], image, y, 2 * y + place


CELEBA_LABEL, CELEBA_ATTRIBUTE = "Blond_Hair", "Male"


def _read_celeba(folder: Path) -> dict[str, Dataset] | None:
    """Aligned faces, a file of attributes and one of partitions; the group is 2 blond + male.

    The authors' text files and the CSV files of later copies are read, in the folder or one level below it.
    """
    attributes, partitions = (_celeba_file(folder, stem) for stem in ("list_attr_celeba", "list_eval_partition"))
    if attributes is None or partitions is None:
        return None
    return CELEBA.splits(_celeba_rows(folder, attributes, partitions))


def _celeba_rows(folder: Path, attributes: Path, partitions: Path) -> Iterator[Row]:
    names, described = _celeba_attributes(attributes)
    splits = _celeba_cells(partitions)[1 if partitions.suffix == ".csv" else 0 :]
    if len(described) != len(splits):
        raise UserError(f"{attributes}: {len(described)} rows, and {partitions.name} has {len(splits)}")
    images = _celeba_images(folder)
    present = {path.name for path in images.iterdir()}
    for (line, (image, *values)), (split_line, (split_image, *split)) in zip(described, splits, strict=True):
        where = f"{attributes}, line {line}"
        if image != split_image:
            raise UserError(f"{where}: {image}, and {partitions.name} has {split_image} in its place")
        if image not in present:
            raise UserError(f"{where}: no image {image} in {images}")
        if len(values) != len(names):
            raise UserError(f"{where}: {len(values)} attributes; expected {len(names)}")
        row = dict(zip(names, values, strict=True))
        blond, male = (_integer(row[name], (-1, 1), where, name) == 1 for name in (CELEBA_LABEL, CELEBA_ATTRIBUTE))
        part = _integer(" ".join(split), range(len(SPLITS)), f"{partitions}, line {split_line}", "partition")
        yield SPLITS[part], images / image, int(blond), 2 * blond + male


def _celeba_attributes(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Names of the attributes, and the lines of images."""
    lines = _celeba_cells(file)
    if file.suffix == ".csv":
        names, rows = [name for _, line in lines[:1] for name in line[1:]], lines[1:]
    else:  # the number of images stands above the names
        names, rows = [name for _, line in lines[1:2] for name in line], lines[2:]
    for wanted in (CELEBA_LABEL, CELEBA_ATTRIBUTE):
        if wanted not in names:
            raise UserError(f"{file}: no attribute {wanted}")
    return names, rows


def _celeba_cells(file: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not empty, each with its number."""
    separator = "," if file.suffix == ".csv" else None
    return [(n, line.split(separator)) for n, line in enumerate(_text_lines(file), 1) if line.strip()]


def _celeba_file(folder: Path, stem: str) -> Path | None:
    found = [*folder.glob(f"{stem}.*"), *folder.glob(f"*/{stem}.*")]
    return next((file for file in sorted(found) if file.suffix in (".txt", ".csv")), None)


def _celeba_images(folder: Path) -> Path:
    """The folder of faces; copies hold it in another of the same name."""
    for pattern in ("img_align_celeba/img_align_celeba", "img_align_celeba", "*/img_align_celeba"):
        for found in folder.glob(pattern):
            return found
    raise UserError(f"{folder}: no folder img_align_celeba")


SPUCO_HALVES = ("spuco_birds", "spuco_dogs")


def _read_spuco_animals(folder: Path) -> dict[str, Dataset] | None:
    """Birds and dogs, each by split, class and background, as in `spuco_birds/train/landbirds/water`."""
    if not all((folder / half).is_dir() for half in SPUCO_HALVES):
        return None
    return SPUCO_ANIMALS.splits(_spuco_rows(folder))


def _spuco_rows(folder: Path) -> Iterator[Row]:
    for split in SPLITS:
        for group, name in enumerate(SPUCO_ANIMALS.groups):
            label = SPUCO_ANIMALS.classes.index(name.partition("/")[0])
            for half in SPUCO_HALVES:
                for image in sorted((folder / half / ("val" if split == "validation" else split) / name).glob("[!.]*")):
                    yield split, image, label, group


def _text_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as text: {error}") from error


def _integer(text: str | None, allowed: Sequence[int], where: str, what: str) -> int:
    """`text` as one of the integers `allowed`."""
    if text is None or text.strip() not in map(str, allowed):
        raise UserError(f"{where}: {what} is {text!r}; allowed are {', '.join(map(str, allowed))}")
    return int(text)


def unlike_published(splits: dict[str, Dataset]) -> str | None:
    """How a copy of a published data set, recognised by its groups, differs in its counts; None if it does not.

    Args:
        splits: the official splits, as they were opened.
    """
    groups = class_names(splits["train"], "group")
    for published in (WATERBIRDS, CELEBA, SPUCO_ANIMALS):
        if groups == list(published.groups):
            found = {split: tuple(group_counts(rows).values()) for split, rows in splits.items()}
            differences = [
                f"{split} {_listed(found.get(split))} (published {_listed(published.counts[split])})"
                for split in SPLITS
                if found.get(split) != published.counts[split]
            ]
            if differences:
                return f"not the published {published.name}: rows per group are {', '.join(differences)}"
    return None


def _listed(counts: tuple[int, ...] | None) -> str:
    return "absent" if counts is None else "/".join(map(str, counts))
