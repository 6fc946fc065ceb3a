"""Tasks: what the data, the model and the scores are. The runner knows no task by name."""

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
"""The tasks by name: the module of this package, and the class in it."""


@dataclass(frozen=True)
class Metric:
    """A score by its name, and which way is better."""

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

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        if recipe.data.select_by == "worst_group_accuracy":
            self.metric = Metric("worst_group_accuracy")

    @abstractmethod
    def open_source(self, notes: Notes | None = None) -> dict[str, Dataset]:
        """The official splits of the recipe's data set, `train` among them.

        Args:
            notes: gets where they come from and what is left out.

        Raises:
            UserError: no such data set, or one that cannot be used.
        """

    @abstractmethod
    def content(self, row: dict[str, Any], where: str) -> bytes:
        """What a row is, for the data set's fingerprint; `where` it is helps to name one that cannot be read."""

    def identify(self, official: dict[str, Dataset]) -> Identity:
        """The identity of the official splits: their fingerprint, and what tells their rows apart."""
        return identify(official, self.content)

    def split(self, official: dict[str, Dataset]) -> Splits:
        """The splits of this run, under the recipe's protocol."""
        return split(official, self.recipe.data, self.recipe.seed)

    @abstractmethod
    def load_model(self, classes: list[str]) -> tuple[PreTrainedModel, Any]:
        """The pretrained model with a head for `classes` (none for a model that generates), and its processor.

        Raises:
            UserError: no such model, or not one for this task.
        """

    @abstractmethod
    def datasets(self, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """`train`, `validation` and `test` as `collate` takes them: each a torch data set of items.

        Raises:
            UserError: a row that cannot be used; found before any training.
        """

    def look_at_images(self, official: dict[str, Dataset], fingerprint: str, quiet: bool) -> ImageFacts | None:
        """What a look at every image of the official splits finds; None where there are none.

        Raises:
            UserError: an image that cannot be used.
        """
        return None

    def truncated(self, splits: Splits) -> dict[str, int]:
        """How many rows of each split are cut, where that can be told without the model; none here."""
        return {}

    def facts(self, rows: dict[str, Any]) -> dict[str, Any]:
        """What else a record says of the data; `rows` are those of `datasets`."""
        return {}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch, as the model takes it."""
        batch: dict[str, Any] = default_data_collator(list(items))
        return batch

    def outputs(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """All that `scores` needs of a batch's logits; here the predicted class of each row."""
        first: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
        return first.argmax(dim=-1)

    @abstractmethod
    def scores(self, outputs: np.ndarray, labels: np.ndarray, rows: Any) -> dict[str, float]:
        """Scores of a whole split; `metric` is among them, unless `generated_scores` gives it.

        Args:
            outputs: what `outputs` made of each batch, in the order of the rows.
            labels: the labels of the batches.
            rows: the split, one of `datasets`.
        """

    def generated_scores(self, model: PreTrainedModel, rows: Any, items: Any, progress: bool) -> dict[str, float]:
        """Further scores of a split that need more than one forward of each batch; none here.

        Args:
            model: the trained model.
            rows: the split, one of `datasets`.
            items: the same, with what `frozen` has cached of each item.
            progress: whether to show how far it is.
        """
        return {}

    def autocast(self, device: torch.device) -> torch.autocast:
        """The run's precision, to generate in: a Trainer's is that of the model which it wraps, not of one inside."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.recipe.train.precision)
        return torch.autocast(device.type, dtype, enabled=dtype is not None)


def load_task(recipe: Recipe) -> Task:
    """The recipe's task."""
    module, _, name = TASKS[recipe.task].partition(":")
    task: Task = getattr(importlib.import_module(f"{__package__}.{module}"), name)(recipe)
    return task
