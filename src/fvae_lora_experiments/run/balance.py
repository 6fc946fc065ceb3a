"""Imbalanced classes: how often their rows are sampled, and their weights in the training loss."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.schema import TrainSettings


class BalancedSampler(Sampler[int]):
    """Samples as many rows per epoch as there are, with replacement, every class equally often.

    An epoch's rows depend only on the seed and the epoch's number: they are the same in every process and after a
    restart.

    Args:
        labels: the class of each row, (rows,).
        seed: the run's.
    """

    def __init__(self, labels: np.ndarray, seed: int):
        counts = np.bincount(labels)
        self.shares = 1 / counts[labels] / np.count_nonzero(counts)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        yield from generator.choice(len(self.shares), len(self.shares), p=self.shares).tolist()


def weights_of(asked: str | Sequence[float], labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The weight of a row of each class in the loss, (classes,); its mean over the rows is 1.

    Args:
        asked: `balanced`, or a number for each class.
        labels: the class of each row, (rows,).
        classes: their names.

    Raises:
        UserError: not one number for each class, or no row with a positive weight.
    """
    counts = np.bincount(labels, minlength=len(classes))
    weights = 1 / np.maximum(counts, 1) if isinstance(asked, str) else np.array(asked, dtype=np.float64)
    if len(weights) != len(classes):
        raise UserError(
            f"train.class_weights: expected a number for each of the {len(classes)} classes, got {len(weights)}"
        )
    total = float(counts @ weights)
    if not total:
        raise UserError("train.class_weights: expected a number above 0 for a class that has rows in train")
    return weights * len(labels) / total


def weighted_loss(weights: np.ndarray) -> Callable[..., Tensor]:
    """A Trainer's `compute_loss_func`: cross-entropy weighted by class, divided by the number of rows of a step."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        by_class = torch.as_tensor(weights, dtype=torch.float32, device=labels.device)
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch
        return cross_entropy(outputs["logits"].float(), labels, weight=by_class, reduction="sum") / rows

    return loss


def balancing(train: TrainSettings, labels: np.ndarray, classes: Sequence[str], seed: int) -> dict[str, Any]:
    """Options of `RunTrainer` for a recipe's balanced sampling and class weights; none if it has neither.

    Raises:
        UserError: as `weights_of`.
    """
    options: dict[str, Any] = {}
    if train.sampling == "balanced":
        options["sampler"] = BalancedSampler(labels, seed)
    if train.class_weights is not None:
        options["compute_loss_func"] = weighted_loss(weights_of(train.class_weights, labels, classes))
    return options
