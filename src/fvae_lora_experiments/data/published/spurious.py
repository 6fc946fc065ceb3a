"""Published data sets with spurious correlations: their classes and groups, and how many rows each group has.

Rows per group and split of Waterbirds and CelebA are those of Sagawa et al., "Distributionally robust neural networks
for group shifts" (2020), of SpuCo Animals those of its package.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from fvae_lora_experiments.data.classes import class_names
from fvae_lora_experiments.data.groups import group_counts

SPLITS = ("train", "validation", "test")
"""In the order of their numbers in metadata files."""


@dataclass(frozen=True)
class Published:
    """A published data set."""

    name: str
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    """Rows of each group, by split."""

    def splits(self, rows: Iterable[tuple[str, Path, int, int]]) -> dict[str, Dataset]:
        """Rows of (split, image file, label, group) as data sets, by split."""
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
