"""Waterbirds as published: a folder of images and a metadata.csv with a line for each."""

import csv
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from fvae_lora_experiments.data.published.metadata import integer, table_lines
from fvae_lora_experiments.data.published.spurious import SPLITS, WATERBIRDS
from fvae_lora_experiments.errors import UserError

COLUMNS = ("img_filename", "y", "split", "place")


def read_waterbirds(folder: Path) -> dict[str, Dataset] | None:
    """The splits of Waterbirds with `image`, `label` and `group` (2 y + place); None if `folder` is not laid out so.

    Raises:
        UserError: a missing image, or a bad value; names the file and its line.
    """
    file = folder / "metadata.csv"
    if not file.is_file() or not set(COLUMNS) <= set(next(csv.reader(table_lines(file)), [])):
        return None
    return WATERBIRDS.splits(_rows(file))


def _rows(file: Path) -> Iterator[tuple[str, Path, int, int]]:
    lines = csv.DictReader(table_lines(file))
    for row in lines:
        where = f"{file}, line {lines.line_num}"
        split = integer(row["split"], range(len(SPLITS)), where, "split")
        y, place = (integer(row[key], range(2), where, key) for key in ("y", "place"))
        image = file.parent / (row["img_filename"] or "")
        if not image.is_file():
            raise UserError(f"{where}: no image {row['img_filename']}")
        yield SPLITS[split], image, y, 2 * y + place
