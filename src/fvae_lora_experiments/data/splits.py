"""Protocols: which rows a run trains on, which select the epoch, and which are the test."""

from dataclasses import dataclass, replace

import numpy as np
from datasets import ClassLabel, Dataset

from fvae_lora_experiments.data.classes import class_names
from fvae_lora_experiments.data.groups import refuse_empty_groups, weighted_as
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.schema import DataSettings


@dataclass(frozen=True)
class Splits:
    """The three splits of a run, and where validation and test come from."""

    train: Dataset
    validation: Dataset
    test: Dataset
    validation_from: str
    test_from: str

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers; empty without classes."""
        return class_names(self.train)

    @property
    def by_name(self) -> dict[str, Dataset]:
        """The splits by their names."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def sizes(self) -> dict[str, int]:
        """Rows per split."""
        return {name: len(rows) for name, rows in self.by_name.items()}


def split(official: dict[str, Dataset], settings: DataSettings, seed: int) -> Splits:
    """The splits of a run by `settings.protocol`, of which only `reference` depends on the run's `seed`.

    Raises:
        UserError: if a split cannot be taken from another because a class has too few rows; if a group is empty.
    """
    protocols = {
        "clean": _clean,
        "reported-on-validation": _reported_on_validation,
        "reference": _reference,
        "reference-on-test": _reference_on_test,
    }
    parts = protocols[settings.protocol](dict(official), settings, seed)
    for name, wanted in (("train", settings.train_rows), ("validation", settings.validation_rows)):
        rows = getattr(parts, name)
        if wanted is not None and wanted < len(rows):
            refusal = f"data.{name}_rows: {wanted} rows cannot be drawn by class"
            used, _ = _stratified(rows, len(rows) - wanted, settings.split_seed, refusal)
            parts = replace(parts, **{name: used})
    if settings.group_column is not None:
        for name, rows in parts.by_name.items():
            refuse_empty_groups(rows, name)
    if settings.average == "train-weighted":
        weighted = {name: weighted_as(parts.train, getattr(parts, name)) for name in ("validation", "test")}
        parts = replace(parts, **weighted)
    return parts


def _clean(parts: dict[str, Dataset], settings: DataSettings, _: int) -> Splits:
    origin = {name: f"the official {name} split" for name in ("validation", "test")}
    if "test" not in parts and "validation" in parts:
        parts["test"], origin["test"] = parts.pop("validation"), origin["validation"]
    how = "stratified, " if class_names(parts["train"]) else ""
    for name, share in (("test", settings.test_share), ("validation", settings.validation_share)):
        if name not in parts:
            refusal = f"no {name} split, and none can be taken from train"
            parts["train"], parts[name] = _stratified(parts["train"], share, settings.split_seed, refusal)
            origin[name] = f"{share:g} of train, {how}split seed {settings.split_seed}"
    return Splits(**parts, validation_from=origin["validation"], test_from=origin["test"])


def _stratified(rows: Dataset, share: float, seed: int, refusal: str) -> tuple[Dataset, Dataset]:
    """The remaining `rows`, and the `share` of them (a fraction, or a number of rows) that is taken out."""
    from sklearn.model_selection import train_test_split  # who only opens data does not wait for it

    strata = _strata(rows)
    if strata is not None:
        _refuse_single_rows(rows, strata, refusal)
    try:
        kept, taken = train_test_split(range(len(rows)), test_size=share, random_state=seed, stratify=strata)
    except ValueError as error:
        reason = str(error)
        if strata is not None:
            kinds = "classes" if "group" not in rows.column_names else "classes with their groups"
            reason = f"each part needs a row of each of {len(np.unique(strata))} {kinds}"
        raise UserError(f"dataset: {refusal}: {share:g} of {len(rows)} rows; {reason}") from error
    return rows.select(sorted(kept)), rows.select(sorted(taken))


def _refuse_single_rows(rows: Dataset, strata: np.ndarray, refusal: str) -> None:
    """A class with one row cannot be in both parts."""
    _, first, counts = np.unique(strata, return_index=True, return_counts=True)
    single = [rows[index] for index in first[counts < 2].tolist()]
    if single:
        columns = {"class": "label", "group": "group"}
        names = [f"{what} {class_names(rows, c)[single[0][c]]}" for what, c in columns.items() if c in single[0]]
        others = f", as do {len(single) - 1} more" if len(single) > 1 else ""
        needed = "each needs 2, or 3 where validation and test are both drawn"
        raise UserError(f"dataset: {refusal}: {', '.join(names)} has 1 row{others}; {needed}")


def _strata(rows: Dataset) -> np.ndarray | None:
    """The stratum of each row, (rows,): its class, or its class and group; None if the rows have neither."""
    strata = None
    for column in ("label", "group"):
        if isinstance(feature := rows.features.get(column), ClassLabel):  # and not lists of them
            numbers = np.array(rows[column][:])
            strata = numbers if strata is None else strata * feature.num_classes + numbers
    return strata


def _reference(parts: dict[str, Dataset], _: DataSettings, seed: int) -> Splits:
    origin = {name: f"the official {name} split" for name in ("validation", "test")}
    present = [name for name in ("validation", "test") if name in parts]
    if len(present) == 1:
        halves = parts[present[0]].train_test_split(test_size=0.5, seed=seed)
        parts |= {"validation": halves["train"], "test": halves["test"]}
        origin = dict.fromkeys(origin, f"half of the official {present[0]} split, seed {seed}")
    elif not present:
        rest = parts["train"].train_test_split(test_size=0.2, seed=seed)
        halves = rest["test"].train_test_split(test_size=0.5, seed=seed)
        parts = {"train": rest["train"], "validation": halves["train"], "test": halves["test"]}
        origin = dict.fromkeys(origin, f"0.1 of train, seed {seed}")
    return Splits(**parts, validation_from=origin["validation"], test_from=origin["test"])


def _reference_on_test(parts: dict[str, Dataset], _: DataSettings, __: int) -> Splits:
    if "test" not in parts:
        raise UserError("dataset: no test split, and data.protocol reference-on-test selects on it")
    origin = "the official test split"
    return Splits(parts["train"], parts["test"], parts["test"], validation_from=origin, test_from=origin)


def _reported_on_validation(parts: dict[str, Dataset], _: DataSettings, __: int) -> Splits:
    if "validation" not in parts:
        raise UserError("dataset: no validation split, and data.protocol reported-on-validation selects on it")
    origin = "the official validation split"
    return Splits(parts["train"], parts["validation"], parts["validation"], validation_from=origin, test_from=origin)
