"""The cost of a step in floating-point operations."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def training_flops(
    model: nn.Module, batch: Mapping[str, Any], loss: Callable[[Any], torch.Tensor] = lambda output: output.loss
) -> int:
    """Floating-point operations of one training step, forward and backward, on `batch`.

    It leaves gradients behind: use a model that is no longer needed.

    Args:
        model: in whatever mode.
        batch: its arguments.
        loss: the loss, from the model's output.
    """
    model.train()
    with FlopCounterMode(display=False) as counter:
        loss(model(**_on_device_of(model, batch))).backward()
    return counter.get_total_flops()


@torch.no_grad()
def inference_flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Floating-point operations of a forward in eval mode on `batch`."""
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(**_on_device_of(model, batch))
    return counter.get_total_flops()


def _on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
