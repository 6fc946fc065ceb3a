"""The loss table, of transformers' Trainer where it computes the loss itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Trainer,
)

from by_hand import (
    Batch,
    adapted,
    assert_same,
    collated,
    elbo_by_hand,
    gradients,
    rows_for,
    trainer_gradients,
)
from fvae_lora import ElboTrainerMixin, FVAELoraTrainer
from loss_table import DOUBLE, WAYS_OUT, without_labels
from tiny import tiny_vit

pytestmark = pytest.mark.usefixtures("without_noise")


def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, label_smoothing=0.2, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.2}, {"compute_loss_func": smoothed}])
def test_a_loss_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    model, rows = adapted("vit"), rows_for("vit", range(8))
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        trainer_gradients(Trainer, model, rows, 4, 2, tmp_path, **settings)

    def by_hand() -> Tensor:
        batch = collated(rows)
        elbo, (output,) = elbo_by_hand(model, [without_labels(batch)])
        return F.cross_entropy(output.logits, batch["labels"], label_smoothing=0.2) + elbo

    expected = gradients(model, by_hand)
    for batch_size, accumulation in [(8, 1), (2, 4)]:
        (found,) = trainer_gradients(FVAELoraTrainer, model, rows, batch_size, accumulation, tmp_path, **settings)
        # transformers' label smoother sums in fp32
        assert_same(found, expected, 1e-6 if "label_smoothing_factor" in settings else 1e-10)


class _WeightsClasses(Trainer):
    """The example of transformers' documentation: labels go in, and the loss that comes out is not used."""

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], weight, reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class _WeightsClassesAndElbo(ElboTrainerMixin, _WeightsClasses):
    pass


def test_a_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    model, rows = adapted("vit"), rows_for("vit", range(8))
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        trainer_gradients(_WeightsClasses, model, rows, 4, 2, tmp_path)

    def by_hand() -> Tensor:
        batch = collated(rows)
        elbo, (output,) = elbo_by_hand(model, [batch])
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
        return F.cross_entropy(output.logits, batch["labels"], weight, reduction="sum") / 8 + elbo

    (found,) = trainer_gradients(_WeightsClassesAndElbo, model, rows, 2, 4, tmp_path)
    assert_same(found, gradients(model, by_hand))


class _RunsTwice(Trainer):
    """Two forwards for one loss, of texts of unequal lengths, without labels."""

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = [model(**{name: inputs[name][i::2] for name in ("input_ids", "attention_mask")}) for i in range(2)]
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=inputs["input_ids"])
        loss = 100 * sum(output.logits.square().sum() for output in outputs)
        return (loss, outputs[0]) if return_outputs else loss


class _RunsTwiceWithElbo(ElboTrainerMixin, _RunsTwice):
    pass


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_trainer_that_runs_the_model_twice(tmp_path: Path, use_reentrant: bool | None) -> None:
    """All forwards of a micro-batch have one mean over their tokens, whatever ran without adapters in between."""
    model, rows = adapted("bert", modules_to_save=["classifier"]), rows_for("bert", [3, 8, 4, 5, 7, 2])
    batch = collated(rows)

    def by_hand() -> Tensor:
        halves = [{name: batch[name][i::2] for name in ("input_ids", "attention_mask")} for i in range(2)]
        elbo, outputs = elbo_by_hand(model, halves)
        return 100 * sum(output.logits.square().sum() for output in outputs) + elbo

    expected = gradients(model, by_hand)
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        trainer_gradients(_RunsTwice, model, rows, 6, 1, tmp_path)
    arguments: dict[str, Any] = {}
    if use_reentrant is not None:
        arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    (found,) = trainer_gradients(_RunsTwiceWithElbo, model, rows, 6, 1, tmp_path, **arguments)
    assert_same(found, expected)


def test_the_trainer_without_adapters_of_ours(tmp_path: Path) -> None:
    rows, model = rows_for("vit", range(4)), tiny_vit(DOUBLE)
    (stock,) = trainer_gradients(Trainer, model, rows, 2, 2, tmp_path)
    (ours,) = trainer_gradients(FVAELoraTrainer, model, rows, 2, 2, tmp_path)
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
