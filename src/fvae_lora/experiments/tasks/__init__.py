"""Tasks. Each module here is one: what its data, its model and its score are; the runner knows no task by name."""

import importlib
from typing import Any, Protocol, cast

from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel

from fvae_lora.experiments.data import Splits
from fvae_lora.experiments.recipe import DataSettings, Recipe


class Task(Protocol):
    """What a module of this package offers."""

    METRIC: str
    """The score by which the best epoch is selected; larger is better."""

    def open_source(self, name: str, settings: DataSettings) -> dict[str, Dataset]:
        """The official splits of the data set of that name."""

    def content(self, row: dict[str, Any], where: str) -> bytes:
        """What a row is, for the data set's fingerprint; `where` it is helps to name one that cannot be read."""

    def load_model(self, name: str, classes: list[str]) -> tuple[PreTrainedModel, Any]:
        """The pretrained model with a head for `classes`, and what prepares its inputs."""

    def datasets(self, recipe: Recipe, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """`train`, `validation` and `test` as the model takes them, in items that stack into a batch."""

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores of a whole split, `METRIC` among them, given the indices of the largest logits."""


def load_task(name: str) -> Task:
    """The task of that name."""
    return cast(Task, importlib.import_module(f"{__package__}.{name}"))
