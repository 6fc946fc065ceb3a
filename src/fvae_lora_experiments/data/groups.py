"""Groups: rows that share a class and, say, a spurious attribute; and how well each group is predicted."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from fvae_lora_experiments.data.classes import as_classes, class_names, names_in
from fvae_lora_experiments.errors import UserError

NAMEABLE = ("int", "uint", "string", "large_string", "bool")
"""Types of values that can name groups, by how they begin."""


def group_scores(
    correct: np.ndarray, groups: np.ndarray, names: Sequence[str], weights: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy on average, in the worst group, the gap between the two, and in each group; all are fractions.

    Args:
        correct: whether each row was predicted right, (rows,).
        groups: the number of each row's group, (rows,); every group has a row.
        names: the groups' names, in the order of their numbers.
        weights: how much each row counts in the average, (rows,), the same within a group; None weights all alike.
    """
    by_group = [float(correct[groups == number].mean()) for number in range(len(names))]
    average, worst = float(np.average(correct, weights=weights)), min(by_group)
    scores = {"accuracy": average, "worst_group_accuracy": worst, "gap": average - worst}
    return scores | {f"accuracy_group_{name}": accuracy for name, accuracy in zip(names, by_group, strict=True)}


def accuracies(correct: np.ndarray, rows: Dataset) -> dict[str, float]:
    """`accuracy` of a split; with all of `group_scores` where it has a column `group`.

    Args:
        correct: whether each row was predicted right, (rows,).
        rows: the split; its column `weight`, if it has one, weights the average.
    """
    names = class_names(rows, "group")
    if not names:
        return {"accuracy": float(np.mean(correct))}
    weights = np.array(rows["weight"]) if "weight" in rows.column_names else None
    return group_scores(correct, np.array(rows["group"]), names, weights)


def group_counts(rows: Dataset) -> dict[str, int]:
    """Rows of each group by its name; nothing where there are no groups."""
    names = class_names(rows, "group")
    counts = np.bincount(rows["group"][:], minlength=len(names)).tolist() if names else []
    return dict(zip(names, counts, strict=True))


def number_groups(dataset: str, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """The splits with numbered groups, the same in all of them.

    Args:
        dataset: its name, for messages.
        splits: with a column `group` of integers, strings or classes, without missing values. An integer is named by
            its digits.

    Raises:
        UserError: a column of another type.
    """
    for split, rows in splits.items():
        feature = rows.features["group"]
        if not class_names(rows, "group") and not str(getattr(feature, "dtype", "")).startswith(NAMEABLE):
            raise UserError(f"dataset {dataset}: the groups in split {split} are neither integers, strings nor classes")
    names = dict.fromkeys(name for rows in splits.values() for name in names_in(rows, "group"))
    return {split: as_classes(rows, "group", list(names)) for split, rows in splits.items()}


def refuse_empty_groups(rows: Dataset, split: str) -> None:
    """Raises `UserError` if a group has no row in this split, or if there are no groups at all."""
    if not class_names(rows, "group"):
        raise UserError("data.group_column: this task's data have no groups")
    empty = [name for name, count in group_counts(rows).items() if not count]
    if empty:
        raise UserError(f"dataset: no row of group {', '.join(empty)} in split {split}; each split needs some of each")


def weighted_as(train: Dataset, rows: Dataset) -> Dataset:
    """`rows` with a column `weight`, by which each group counts as much as in `train`."""
    here, there = group_counts(rows), group_counts(train)
    weights = np.array([there[name] / here[name] for name in here])
    return rows.add_column("weight", weights[rows["group"][:]].tolist())
