"""SpuCo Animals as its package lays it out: birds and dogs, each by split, class and background."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from fvae_lora_experiments.data.published.spurious import SPLITS, SPUCO_ANIMALS

HALVES = ("spuco_birds", "spuco_dogs")


def read_spuco_animals(folder: Path) -> dict[str, Dataset] | None:
    """The splits of SpuCo Animals with `image`, `label` and `group`; None if `folder` is not laid out so.

    An image lies in, for example, `spuco_birds/train/landbirds/water`.
    """
    if not all((folder / half).is_dir() for half in HALVES):
        return None
    return SPUCO_ANIMALS.splits(_rows(folder))


def _rows(folder: Path) -> Iterator[tuple[str, Path, int, int]]:
    for split in SPLITS:
        for group, name in enumerate(SPUCO_ANIMALS.groups):
            label = SPUCO_ANIMALS.classes.index(name.partition("/")[0])
            for half in HALVES:
                for image in sorted((folder / half / ("val" if split == "validation" else split) / name).glob("[!.]*")):
                    yield split, image, label, group
