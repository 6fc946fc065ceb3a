"""CelebA as published: aligned faces, a file of attributes and one of partitions; here, blond or not by gender.

The text files of the authors and the CSV files of later copies are read; they lie in the folder or one below it.
"""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from fvae_lora_experiments.data.published.metadata import integer, table_lines
from fvae_lora_experiments.data.published.spurious import CELEBA, SPLITS
from fvae_lora_experiments.errors import UserError

LABEL, ATTRIBUTE = "Blond_Hair", "Male"


def read_celeba(folder: Path) -> dict[str, Dataset] | None:
    """The splits of CelebA with `image`, `label` and `group` (2 blond + male); None if `folder` is not laid out so.

    Raises:
        UserError: files that contradict each other, a missing image, a bad value; names the file and its line.
    """
    attributes, partitions = (_file(folder, stem) for stem in ("list_attr_celeba", "list_eval_partition"))
    if attributes is None or partitions is None:
        return None
    return CELEBA.splits(_rows(folder, attributes, partitions))


def _rows(folder: Path, attributes: Path, partitions: Path) -> Iterator[tuple[str, Path, int, int]]:
    names, described = _attributes(attributes)
    splits = _cells(partitions)[1 if partitions.suffix == ".csv" else 0 :]
    if len(described) != len(splits):
        raise UserError(f"{attributes}: {len(described)} rows, and {partitions.name} has {len(splits)}")
    images = _images(folder)
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
        blond, male = (integer(row[name], (-1, 1), where, name) == 1 for name in (LABEL, ATTRIBUTE))
        part = integer(" ".join(split), range(len(SPLITS)), f"{partitions}, line {split_line}", "partition")
        yield SPLITS[part], images / image, int(blond), 2 * blond + male


def _attributes(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Names of the attributes, and the lines of images."""
    lines = _cells(file)
    if file.suffix == ".csv":
        names, rows = [name for _, line in lines[:1] for name in line[1:]], lines[1:]
    else:  # the number of images stands above the names
        names, rows = [name for _, line in lines[1:2] for name in line], lines[2:]
    for wanted in (LABEL, ATTRIBUTE):
        if wanted not in names:
            raise UserError(f"{file}: no attribute {wanted}")
    return names, rows


def _cells(file: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not empty, each with its number."""
    separator = "," if file.suffix == ".csv" else None
    return [(n, line.split(separator)) for n, line in enumerate(table_lines(file), 1) if line.strip()]


def _file(folder: Path, stem: str) -> Path | None:
    found = [*folder.glob(f"{stem}.*"), *folder.glob(f"*/{stem}.*")]
    return next((file for file in sorted(found) if file.suffix in (".txt", ".csv")), None)


def _images(folder: Path) -> Path:
    """The folder of faces; copies hold it in another of the same name."""
    for pattern in ("img_align_celeba/img_align_celeba", "img_align_celeba", "*/img_align_celeba"):
        for found in folder.glob(pattern):
            return found
    raise UserError(f"{folder}: no folder img_align_celeba")
