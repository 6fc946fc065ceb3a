"""What a step costs, in floating-point operations."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode


def training_flops(model: nn.Module, rows: torch.utils.data.Dataset[dict[str, Any]], batch_size: int) -> int:
    """Floating-point operations of one training step, forward and backward, on a batch of `rows`.

    It is a step: do it on a model that is not needed any more.
    """
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**_batch(model, rows, batch_size)).loss.backward()
    return counter.get_total_flops()


@torch.no_grad()
def inference_flops(model: nn.Module, rows: torch.utils.data.Dataset[dict[str, Any]], batch_size: int) -> int:
    """Floating-point operations of a forward in eval mode on a batch of `rows`."""
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(**_batch(model, rows, batch_size))
    return counter.get_total_flops()


def _batch(model: nn.Module, rows: Any, batch_size: int) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    batch = default_collate([rows[i] for i in range(min(batch_size, len(rows)))])
    return {key: value.to(device) for key, value in batch.items()}
