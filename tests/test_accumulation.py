"""How large the ELBO of an optimizer's step is, however the step's rows are split into micro-batches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, Trainer

from by_hand import (
    Batch,
    adapted,
    assert_same,
    collated,
    elbo_by_hand,
    gradients,
    labels_in,
    layers_by_hand,
    loss_by_hand,
    rows_for,
    trainer_gradients,
)
from fvae_lora import FVAELoraTrainer
from tiny import tiny_bert

pytestmark = pytest.mark.usefixtures("without_noise")
LENGTHS = [3, 9, 4, 6, 8, 2, 5, 7]
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
TOLERANCE = {"llama": 1e-6}  # rounds to fp32 inside, whatever its dtype


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are not shuffled: which of them meet in a micro-batch decides how much padding there is."""
    sampler = torch.utils.data.SequentialSampler
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda trainer, *_: sampler(trainer.train_dataset))


@pytest.mark.parametrize("trainer", [Trainer, FVAELoraTrainer])
@pytest.mark.parametrize(("batch_size", "accumulation"), SPLITS)
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_rows_of_one_size(
    kind: str, batch_size: int, accumulation: int, trainer: type[Trainer], tmp_path: Path
) -> None:
    """Here the share of labels that the stock Trainer goes by is the share of tokens."""
    model, rows = adapted(kind), rows_for(kind, [6] * 8)
    expected = gradients(model, lambda: loss_by_hand(model, [collated(rows)]))
    (found,) = trainer_gradients(trainer, model, rows, batch_size, accumulation, tmp_path)
    assert_same(found, expected, TOLERANCE.get(kind, 1e-10))


@pytest.mark.parametrize(("kind", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left")])
@pytest.mark.parametrize(("batch_size", "accumulation"), SPLITS)
def test_texts_of_unequal_lengths(kind: str, batch_size: int, accumulation: int, side: str, tmp_path: Path) -> None:
    """Our Trainer counts tokens: the ELBO is the mean over all of the step, whatever padding a micro-batch got.

    Among the models is one whose own loss does not divide by the number of labels of the step (BERT): the task loss
    keeps its proportion to the ELBO too.
    """
    model, rows = adapted(kind, modules_to_save=["classifier"] if kind == "bert" else None), rows_for(kind, LENGTHS)
    collator = functools.partial(collated, side=side, length=10 if batch_size == 4 else 0)
    expected = gradients(model, lambda: loss_by_hand(model, [collated(rows, side)]))
    (found,) = trainer_gradients(FVAELoraTrainer, model, rows, batch_size, accumulation, tmp_path, collator)
    assert_same(found, expected, TOLERANCE.get(kind, 1e-10))


def by_share_of_labels(model: Any, batches: list[Batch]) -> Tensor:
    """What the stock Trainer can know: each micro-batch's mean, weighted by its share of the labels."""
    shifted = model.get_base_model().loss_type == "ForCausalLM"
    counts = [labels_in(batch, shifted) for batch in batches]
    losses = []
    for batch in batches:
        elbo, (output,) = elbo_by_hand(model, [batch])
        losses.append(output.loss + elbo)
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


@pytest.mark.parametrize(("batch_size", "accumulation"), SPLITS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_texts_of_unequal_lengths_in_the_stock_trainer(
    kind: str, batch_size: int, accumulation: int, tmp_path: Path
) -> None:
    model, rows = adapted(kind), rows_for(kind, LENGTHS)
    batches = [collated(rows[i : i + batch_size]) for i in range(0, 8, batch_size)]
    expected = gradients(model, lambda: by_share_of_labels(model, batches))
    (found,) = trainer_gradients(Trainer, model, rows, batch_size, accumulation, tmp_path)
    assert_same(found, expected, TOLERANCE.get(kind, 1e-10))


@pytest.mark.parametrize("trainer", [Trainer, FVAELoraTrainer])
@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_the_last_group_of_an_epoch_may_be_smaller(kind: str, trainer: type[Trainer], tmp_path: Path) -> None:
    model, rows = adapted(kind), rows_for(kind, [6] * 7)
    found = trainer_gradients(trainer, model, rows, 1, 4, tmp_path)
    assert len(found) == 2
    for step, group in zip(found, (rows[:4], rows[4:]), strict=True):
        expected = gradients(model, lambda group=group: loss_by_hand(model, [collated(group)]))
        assert_same(step, expected, TOLERANCE.get(kind, 1e-10))


@pytest.mark.parametrize("trainer", [Trainer, FVAELoraTrainer])
@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", lambda i: torch.tensor(i % 3)),
        ("multi_label_classification", lambda i: torch.tensor([1.0, 0.0, float(i % 2)], dtype=torch.float64)),
        ("regression", lambda i: torch.tensor([0.5 * i, 1.0, 2.0], dtype=torch.float64)),
    ],
)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_losses_that_are_means_over_their_micro_batch(
    kind: str, problem_type: str, labels: Any, trainer: type[Trainer], tmp_path: Path
) -> None:
    model = adapted(kind)
    model.get_base_model().config.problem_type = problem_type
    rows = [row | {"labels": labels(i)} for i, row in enumerate(rows_for(kind, [5] * 8))]
    expected = gradients(model, lambda: loss_by_hand(model, [collated(rows)]))
    for batch_size, accumulation in [(8, 1), (2, 4)]:
        (found,) = trainer_gradients(trainer, model, rows, batch_size, accumulation, tmp_path, as_numbers)
        assert_same(found, expected)


def as_numbers(rows: list[Batch]) -> Batch:
    """Labels that are numbers per class are no sequence to be padded."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class _TakesNoCount(BertForSequenceClassification):
    """The Trainer passes no number of labels, and divides by the number of micro-batches instead."""

    accepts_loss_kwargs = False


@pytest.mark.parametrize("trainer", [Trainer, FVAELoraTrainer])
def test_a_model_that_is_told_no_count(trainer: type[Trainer], tmp_path: Path) -> None:
    model, rows = adapted(_TakesNoCount(tiny_bert().config).double()), rows_for("bert", [5] * 8)
    expected = gradients(model, lambda: loss_by_hand(model, [collated(rows)]))
    for batch_size, accumulation in [(8, 1), (2, 4)]:
        (found,) = trainer_gradients(trainer, model, rows, batch_size, accumulation, tmp_path)
        assert_same(found, expected)


def test_tokens_are_counted_whatever_the_model_is_told(tmp_path: Path) -> None:
    model, rows = adapted(_TakesNoCount(tiny_bert().config).double()), rows_for("bert", LENGTHS)
    expected = gradients(model, lambda: loss_by_hand(model, [collated(rows)]))
    (found,) = trainer_gradients(FVAELoraTrainer, model, rows, 2, 4, tmp_path)
    assert_same(found, expected)


def test_the_trainer_evaluates_without_elbo(tmp_path: Path) -> None:
    """An evaluation in the middle of training has the task's loss alone, and leaves the training as it was."""
    model, rows = adapted("vit"), rows_for("vit", range(8))
    losses: list[float] = []

    class Evaluating(FVAELoraTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses.append(self.evaluate(rows[:4])["eval_loss"])
            return super().training_step(*args, **kwargs)

    expected = gradients(model, lambda: loss_by_hand(model, [collated(rows)]))
    with layers_by_hand(), torch.no_grad():
        task = model(**collated(rows[:4])).loss.item()
    (found,) = trainer_gradients(Evaluating, model, rows, 2, 4, tmp_path)
    assert_same(found, expected)
    assert losses == pytest.approx([task] * 4, rel=1e-6)
