"""Tasks: data, model and scores of each. The runner does not depend on any one task."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import default_data_collator

from fvae_lora_experiments.data import Splits, split
from fvae_lora_experiments.data.fingerprint import Identity, identify

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedModel

    from fvae_lora_experiments.data.files import Notes
    from fvae_lora_experiments.data.image_decoding import ImageFacts
    from fvae_lora_experiments.schema import Recipe

TASKS = {
    "image": "image:ImageTask",
    "text": "text:TextTask",
    "commonsense": "commonsense.task:CommonsenseTask",
    "phonemes": "phonemes:PhonemeTask",
    "transcription": "transcription:TranscriptionTask",
}
"""The tasks by name: module and class in this package."""


@dataclass(frozen=True)
class Metric:
    """The name of a score, and whether greater is better."""

    name: str
    greater_is_better: bool = True


class Task(ABC):
    """What a run of one recipe trains on and is judged by.

    Args:
        recipe: the run's recipe.
    """

    metric = Metric("accuracy")
    """The score by which the best epoch is selected."""

    predicts_rows = False
    """Whether `outputs` gives one prediction for each row: its class, or a number where the data have no classes."""

    bytes_per_frozen_weight: float = 4
    """How much memory a weight takes that is not trained."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        if recipe.data.select_by == "worst_group_accuracy":
            self.metric = Metric("worst_group_accuracy")

    @abstractmethod
    def open_source(self, notes: Notes | None = None) -> dict[str, Dataset]:
        """The official splits of the recipe's data set, `train` among them.

        Args:
            notes: collects where they come from and what is left out.

        Raises:
            UserError: the data set does not exist, or cannot be used.
        """

    @abstractmethod
    def content(self, row: dict[str, Any], where: str) -> bytes:
        """A row's content, for the data set's fingerprint; `where` names the row in error messages."""

    def identify(self, official: dict[str, Dataset]) -> Identity:
        """The identity of the official splits: their fingerprint, and what identifies their rows."""
        return identify(official, self.content)

    def split(self, official: dict[str, Dataset]) -> Splits:
        """The splits of this run, under the recipe's protocol."""
        return split(official, self.recipe.data, self.recipe.seed)

    @abstractmethod
    def load_model(self, classes: list[str]) -> tuple[PreTrainedModel, Any]:
        """The pretrained model with a head for `classes` (none for a model that generates), and its processor.

        Raises:
            UserError: the model does not exist, or is not for this task.
        """

    @abstractmethod
    def datasets(self, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """`train`, `validation` and `test` as `collate` takes them: each a torch data set of items.

        Raises:
            UserError: a row cannot be used; raised before any training.
        """

    def look_at_images(self, official: dict[str, Dataset], fingerprint: str, quiet: bool) -> ImageFacts | None:
        """Facts from decoding every image of the official splits; None if the task has no images.

        Raises:
            UserError: an image cannot be used.
        """
        return None

    def truncated(self, splits: Splits) -> dict[str, int]:
        """How many rows of each split are truncated, if that is known without the model; none here."""
        return {}

    def facts(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Further facts on the data for the record; `rows` are those of `datasets`."""
        return {}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch, as the model takes it."""
        batch: dict[str, Any] = default_data_collator(list(items))
        return batch

    def outputs(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What `scores` needs from a batch's logits; here the predicted class of each row."""
        first: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
        return first.argmax(dim=-1)

    @abstractmethod
    def scores(self, outputs: np.ndarray, labels: np.ndarray, rows: Any) -> dict[str, float]:
        """Scores of a whole split; `metric` is among them, unless `generated_scores` gives it.

        Args:
            outputs: the results of `outputs` for all batches, in the order of the rows.
            labels: the labels of the batches.
            rows: the split, one of `datasets`.
        """

    def generated_scores(self, model: PreTrainedModel, rows: Any, items: Any, progress: bool) -> dict[str, float]:
        """Further scores of a split that need more than one forward per batch; none here.

        Args:
            model: the trained model.
            rows: the split, one of `datasets`.
            items: the same, with the cached states of each item, if any (`run.state_cache`).
            progress: whether to show progress.
        """
        return {}

    def autocast(self, device: torch.device) -> torch.autocast:
        """The run's precision, for generation: a Trainer's autocast only covers the model that it wraps."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.recipe.train.precision)
        return torch.autocast(device.type, dtype, enabled=dtype is not None)


def load_task(recipe: Recipe) -> Task:
    """The recipe's task."""
    module, _, name = TASKS[recipe.task].partition(":")
    task: Task = getattr(importlib.import_module(f"{__package__}.{module}"), name)(recipe)
    return task
