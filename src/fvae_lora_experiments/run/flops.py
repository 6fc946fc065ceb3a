"""The cost of a step in floating-point operations, and in memory for what it keeps."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
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


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the bytes that forwards in the block keep for their backward, parameters and buffers apart.

    Maps of attention (tokens x tokens) are left out: a device's own kernels do not keep them. Yields a function that
    gives the most bytes that were kept at a time, shared storages once.
    """
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    holders: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    most = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        is_map = tensor.dim() > 2 and tensor.shape[-1] == tensor.shape[-2]
        if not is_map and (key := _storage(tensor)) not in own:
            sizes[key] = tensor.untyped_storage().nbytes()
            holders[key] += 1
            weakref.finalize(tensor, release, key)
            most = max(most, sum(sizes.values()))
        return tensor

    def release(key: int) -> None:
        holders[key] -= 1
        if not holders[key]:
            del sizes[key]

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: most


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


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
