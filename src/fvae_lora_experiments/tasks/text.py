"""Classification of or regression on sentences and pairs of them, with any `AutoModelForSequenceClassification`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fvae_lora_experiments.data import Splits, accuracies
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.texts import Texts, open_texts, text_content
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.models.heads import head_modules
from fvae_lora_experiments.models.pretrained import check_tokens, load, load_classifier, load_tokenizer, loading
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import Metric, Task

ROLE = "for text classification"


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The harmonic mean of precision and recall of class 1, of (rows,) of classes 0 and 1; 0 where both are 0."""
    return float(f1_score(labels, predicted, zero_division=0))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of (rows,) of classes; 0 where all predictions are the same."""
    return float(matthews_corrcoef(labels, predicted))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of (rows,) of numbers; 0 where it is undefined because all predictions are the same."""
    return float(stats.pearsonr(predicted, labels).statistic) if np.ptp(predicted) else 0.0


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of the ranks of (rows,) of numbers; 0 where all predictions are the same."""
    return float(stats.spearmanr(predicted, labels).statistic) if np.ptp(predicted) else 0.0


METRICS = {"f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


class TextTask(Task):
    """Texts and their classes, or a number for each; judged by the recipe's metrics, the first of which selects."""

    predicts_rows = True

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        if recipe.data.select_by == "accuracy":
            self.metric = Metric(recipe.text.metrics[0])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; pads with its end token if it has no padding token.

        It pads on the right, except for XLNet, which summarises a text at its last position: some decoders' tokenizers
        pad on the left, for generation, which would make the positions of a text depend on its batch.
        """
        name = self.recipe.model
        tokenizer = load_tokenizer(name, ROLE)
        with loading(name, ROLE):
            tokenizer.padding_side = "left" if load(AutoConfig, name).model_type == "xlnet" else "right"
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise UserError(f"model {name}: its tokenizer has no token to pad a batch with, and none to end a text")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def open_source(self, notes: Notes | None = None) -> dict[str, Dataset]:
        """As `data.texts.open_texts`.

        Raises:
            UserError: also if F1 is requested and there are more than two classes.
        """
        recipe = self.recipe
        splits = open_texts(recipe.dataset, recipe.data, recipe.text, notes)
        label = splits["train"].features["label"]
        if "f1" in recipe.text.metrics and len(label.names) > 2:
            raise UserError(f"text.metrics: f1 is for two classes; dataset {recipe.dataset} has {len(label.names)}")
        return splits

    def content(self, row: dict[str, Any], where: str) -> bytes:
        """The text, or both texts of a pair."""
        return text_content(row, where)

    def load_model(self, classes: list[str]) -> tuple[PreTrainedModel, Any]:
        """The model in float32 with a head for `classes`, or for one number if there are none, and its tokenizer.

        Raises:
            UserError: the model does not exist, does not classify texts, lacks weights, or cannot read so many tokens.
        """
        name, text = self.recipe.model, self.recipe.text
        with loading(name, ROLE):
            model, missing = load_classifier(name, AutoModelForSequenceClassification, classes)
        heads = tuple(f"{head}." for head in head_modules(model))
        if lacking := sorted(key for key in missing if not key.startswith(heads)):
            raise UserError(f"model {name}: lacks {', '.join(lacking[:3])}, and only the head may be new")
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = self.tokenizer.pad_token_id  # a decoder finds the end of a text by it
        limit = min(self.tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", text.max_length))
        if text.max_length > limit:
            raise UserError(f"text.max_length: model {name} reads {limit} tokens at most, got {text.max_length}")
        return model, self.tokenizer

    def datasets(self, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """The three splits as tokens, not padded.

        Raises:
            UserError: the tokenizer does not know the words of the training split.
        """
        rows = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        parts = {name: Texts(part, name, processor, self.recipe.text.max_length) for name, part in rows.items()}
        check_tokens(self.recipe.model, processor, parts["train"].encoded["input_ids"])
        return parts

    def truncated(self, splits: Splits) -> dict[str, int]:
        """As counted by the model's tokenizer."""
        length = self.recipe.text.max_length
        return {name: Texts(rows, name, self.tokenizer, length).truncated for name, rows in splits.by_name.items()}

    def facts(self, rows: dict[str, Texts]) -> dict[str, Any]:
        """How many rows of each split were truncated to `text.max_length`; the padding token if it is the end token."""
        facts: dict[str, Any] = {"truncated": {name: part.truncated for name, part in rows.items()}}
        if self.tokenizer.pad_token == self.tokenizer.eos_token:
            facts["padding"] = f"the end token {self.tokenizer.eos_token}"
        return facts

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch, padded to its longest row."""
        return dict(DataCollatorWithPadding(self.tokenizer)(list(items)))

    def outputs(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """The predicted class of each row, or its number."""
        if not self.recipe.text.is_regression:
            return super().outputs(logits, labels)
        first: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
        return first.squeeze(-1)

    def scores(self, outputs: np.ndarray, labels: np.ndarray, rows: Any) -> dict[str, float]:
        """The recipe's metrics; for classes always the accuracy, and that of each group, if any."""
        scores = {} if self.recipe.text.is_regression else accuracies(outputs == labels, rows.rows)
        return scores | {name: METRICS[name](outputs, labels) for name in self.recipe.text.metrics if name in METRICS}
