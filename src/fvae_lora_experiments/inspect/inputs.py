"""The inputs on which an adapter is looked at: batches, and what is known of each row."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from tqdm.auto import tqdm

from fvae_lora_experiments.data import Splits, fingerprint
from fvae_lora_experiments.data.classes import class_names
from fvae_lora_experiments.errors import NoClassesError
from fvae_lora_experiments.inspect.source import Source
from fvae_lora_experiments.places import short_name
from fvae_lora_experiments.predict.predictors import PREDICTORS, Classifier
from fvae_lora_experiments.predict.rows import Row, read_rows
from fvae_lora_experiments.predict.trained import Trained
from fvae_lora_experiments.predict.wanted import wanted_by
from fvae_lora_experiments.run.runner import open_data
from fvae_lora_experiments.run.timing import is_terminal
from fvae_lora_experiments.tasks import Task

SplitName = Literal["train", "validation", "test"]
HEAD = 100
"""Rows that stand for a split that is not looked at, where a task wants to see all three."""


@dataclass(frozen=True)
class Known:
    """What is known of each row: its class, (rows,), by number; or, without `classes`, a number, (rows,)."""

    values: np.ndarray
    classes: Sequence[str]


@dataclass(frozen=True)
class Inputs:
    """Rows in batches, as the model takes them.

    `label` and `group` are None where there are none; `without_label` then says why there is no label.
    """

    name: str
    rows: str
    """Which rows, in words."""
    batches: Iterator[dict[str, Any]]
    count: int | None
    """How many rows; None where that is not known before they are read."""
    own: bool
    """Whether the data are the run's."""
    label: Known | None = None
    group: Known | None = None
    without_label: str = ""


def open_inputs(source: Source, trained: Trained, split: SplitName, limit: int) -> Inputs:
    """The rows that are looked at: of the run's own data a split; of other data the split of this name, or all rows.

    Images are not augmented. Of more than `limit` rows as many are drawn with the recipe's seed; data without classes
    are read from the first row on.

    Raises:
        UserError: the data cannot be read, or are not those of the run although nobody named others.
    """
    task = trained.task
    try:
        rows, which, own = _split(source, task, split)
    except NoClassesError as error:
        if not (task.predicts_rows and Path(source.recipe.dataset).exists()):
            raise
        return _without_classes(source, trained, limit, str(error))
    chosen = _drawn(len(rows), limit, source.recipe.seed)
    head = rows.select(range(min(HEAD, len(rows))))
    parts = Splits(train=head, validation=rows, test=head, validation_from=which, test_from=which)
    logging.disable(logging.WARNING)  # rows that are cut were told of in training
    try:
        items = task.datasets(parts, trained.model, trained.processor)["validation"]
    finally:
        logging.disable(logging.NOTSET)
    label = _known(rows, "label", chosen)
    return Inputs(
        short_name(source.recipe.dataset),
        which if len(chosen) == len(rows) else f"{len(chosen)} rows of {which}, drawn from {len(rows)}",
        _batches(task, items, chosen, source.recipe.train.batch_size),
        len(chosen),
        own,
        label,
        _known(rows, "group", chosen),
        "" if label else f"the task {source.recipe.task} has no classes",
    )


def _split(source: Source, task: Task, split: SplitName) -> tuple[Dataset, str, bool]:
    """The rows of a split, its name in words, and whether it is the run's."""
    named = f"the run's {split} split"
    if source.record is not None and source.own_data:
        return open_data(source.recipe, source.record).by_name[split], named, True
    official = task.open_source()
    if source.record is not None and fingerprint(official, task.content) == source.record.dataset.test_fingerprint:
        return task.split(official).by_name[split], named, True
    if split in official:
        return official[split], f"the official {split} split", False
    return official["train"], "the official train split" if len(official) > 1 else "all rows", False


def _drawn(count: int, limit: int, seed: int) -> list[int]:
    if count <= limit:
        return list(range(count))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def _known(rows: Dataset, column: str, chosen: Sequence[int]) -> Known | None:
    feature = rows.features.get(column)
    if feature is None or not (isinstance(feature, ClassLabel) or getattr(feature, "dtype", "") == "float32"):
        return None
    return Known(np.array(rows[column][:])[list(chosen)], class_names(rows, column))


def _batches(task: Task, items: Any, chosen: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(chosen), size):
        batch = task.collate([items[number] for number in chosen[start : start + size]])
        if task.predicts_rows:  # other data may have other classes than the model; elsewhere a decoder reads them
            batch.pop("labels", None)
        yield batch


def _without_classes(source: Source, trained: Trained, limit: int, reason: str) -> Inputs:
    rows = read_rows([source.recipe.dataset], wanted_by(source.recipe))
    return Inputs(
        short_name(source.recipe.dataset),
        f"its first {limit} rows, or all where there are fewer",
        _prepared(trained, itertools.islice(rows, limit)),
        None,
        own=False,
        without_label=reason,
    )


def _prepared(trained: Trained, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
    predictor = PREDICTORS[trained.recipe.task](trained)
    assert isinstance(predictor, Classifier)
    while batch := list(itertools.islice(rows, trained.recipe.train.batch_size)):
        yield predictor.batch([predictor.usable(row) for row in batch])


def progressing(trained: Trained, inputs: Inputs, what: str) -> Iterator[dict[str, Any]]:
    """The batches where the model is, with a progress bar on a terminal."""
    with tqdm(total=inputs.count, unit="row", desc=what, disable=not is_terminal(), leave=False) as bar:
        for batch in inputs.batches:
            yield {key: value.to(trained.device) for key, value in batch.items()}
            bar.update(len(next(iter(batch.values()))))
