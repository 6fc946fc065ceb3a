"""What the files of the loss table share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from by_hand import (
    Batch,
    Gradients,
    adapted,
    gradients,
    loss_by_hand,
)
from tiny import batch_for

WAYS_OUT = r"add_elbo.*FVAELoraTrainer"
DOUBLE = torch.float64
TOLERANCE = {"llama": 1e-6, "t5": 1e-6}  # these round to fp32 inside, whatever their dtype


def vit() -> tuple[PeftModel, Batch]:
    model = adapted("vit")
    return model, batch_for(model.get_base_model())


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def expected_of(model: nn.Module, batch: Batch) -> Gradients:
    return gradients(model, lambda: loss_by_hand(model, [batch]))


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(**without_labels(batch)).logits, batch["labels"])
