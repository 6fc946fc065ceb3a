"""The loss that a model returns: where it is in the output, and what it is averaged over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .masks import IGNORED_LABEL, is_encoder_decoder, share
from .recorder import Recorder


def share_of_items(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | float | None:
    """This micro-batch's share of the labels in the optimizer's step, counted as transformers' Trainer does."""
    labels, num_items = inputs.get("labels"), inputs.get("num_items_in_batch")
    if num_items is None or not isinstance(labels, Tensor):
        return None
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not is_encoder_decoder(model)
    if isinstance(inputs.get("shift_labels"), Tensor):
        labels = inputs["shift_labels"]
    elif shifts:
        labels = labels[..., 1:]
    return share((labels != IGNORED_LABEL).sum(), num_items.detach() if isinstance(num_items, Tensor) else num_items)


def is_normalised(model: nn.Module, recorder: Recorder, loss: Tensor, num_items: Any) -> bool:
    """Whether the losses of a step's micro-batches can be summed as the model returns them."""
    if recorder.loss_uses_num_items is None and isinstance(num_items, Tensor) and num_items.requires_grad:
        if not loss.requires_grad:
            return True
        (gradient,) = torch.autograd.grad(loss, num_items, retain_graph=True, allow_unused=True)
        recorder.loss_uses_num_items = gradient is not None
    # Audio models have this field with other heads as well; not every version has loss_type "ForCTC".
    config: Any = model.config if type(model).__name__.endswith("ForCTC") else None
    summed = config is not None and config.ctc_loss_reduction == "sum"
    return summed or recorder.loss_uses_num_items is not False


def loss_key(output: Any, inputs: Mapping[str, Any]) -> Any:
    """Where the loss is in a model's output: a key, an index, `...` for the output itself, ``None`` for nowhere."""
    if isinstance(output, Mapping):
        return "loss" if _is_scalar(output.get("loss")) else None
    names = {name for name, value in inputs.items() if value is not None and value is not False}
    if not any("label" in name or name in ("start_positions", "return_loss") for name in names):
        return None
    if isinstance(output, tuple) and output and _is_scalar(output[0]):
        return 0
    return ... if _is_scalar(output) else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()


def with_loss(output: Any, key: Any, loss: Tensor) -> Any:
    """A model's output with the loss at `key` replaced."""
    if key is Ellipsis:
        return loss
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]
        return output
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: loss})
    return (loss, *output[1:])
