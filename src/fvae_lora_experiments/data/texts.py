"""Data sets of labelled texts, or of pairs of them; and their tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from fvae_lora_experiments.data.columns import check_texts, select_columns
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.labels import drop_unlabelled, with_classes, with_numbers
from fvae_lora_experiments.data.source import official_splits
from fvae_lora_experiments.data.tables import read_tables
from fvae_lora_experiments.schema import DataSettings, TextSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("text", "text_pair")
"""The columns of a text and of its other half, whatever the data set calls them."""

FOR_NUMBERS = "text.metrics=[pearson]"
"""The recipe's setting for a regression."""

log = logging.getLogger(__name__)


def open_texts(name: str, data: DataSettings, text: TextSettings, notes: Notes | None = None) -> dict[str, Dataset]:
    """The official splits of a data set: `train`, and `validation` and `test` where they exist with known labels.

    Each has a `text`, a `text_pair` if the recipe names two columns, and a `label`: a class, or a
    number; and a `group`, if the recipe asks for groups. `notes` gets what is left out.

    Raises:
        UserError: no such data set or column; a row without text or with a label that is not allowed.
    """
    notes = Notes() if notes is None else notes
    splits = official_splits(name, data, read_tables, notes)
    names = [[column] for column in text.columns or []] or [["sentence", "text"]]
    inputs = {what: ("text.columns", candidates) for what, candidates in zip(COLUMNS, names, strict=False)}
    splits = drop_unlabelled(select_columns(name, splits, data, inputs, notes), data, notes)
    for column in inputs:
        check_texts(name, splits, data, column)
    return with_numbers(name, splits, data) if text.is_regression else with_classes(name, splits, data, FOR_NUMBERS)


def text_columns(rows: Dataset) -> list[str]:
    """Which of `COLUMNS` there are."""
    return [column for column in COLUMNS if column in rows.column_names]


def text_content(row: dict[str, Any], where: str) -> bytes:
    """A row's texts, one after the other."""
    return "\0".join(row[column] for column in COLUMNS if column in row).encode()


class Texts:
    """A split as tokens: `input_ids` and what else the tokenizer gives, as lists without padding, and `labels`.

    `truncated` is how many rows were cut; if any were, it is logged.

    Args:
        rows: the split.
        split: its name, for the log.
        tokenizer: the model's.
        max_length: how many tokens a row may have; the rest is cut.
    """

    def __init__(self, rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.rows, self.labels = rows, rows["label"][:]
        texts = {column: rows[column][:] for column in text_columns(rows)}
        self.encoded = tokenizer(**texts, verbose=False)
        self.truncated = sum(len(ids) > max_length for ids in self.encoded["input_ids"])
        if self.truncated:
            log.warning("split %s: %d of %d rows are cut at %d tokens", split, self.truncated, len(rows), max_length)
            self.encoded = tokenizer(**texts, truncation=True, max_length=max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: values[index] for key, values in self.encoded.items()} | {"labels": self.labels[index]}
