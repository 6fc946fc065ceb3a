"""Sequences of different lengths as one tensor."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""The label that torch's cross-entropy and transformers' losses ignore."""


def padded(
    sequences: Sequence[Sequence[int]], filler: int, side: Literal["left", "right"], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The sequences padded to the longest one, and a mask that is 0 at padding: both (rows, length).

    Args:
        sequences: numbers.
        filler: the padding value.
        side: the side to pad on.
        device: of the result.
    """
    length = max(map(len, sequences))
    values = torch.full((len(sequences), length), filler, dtype=torch.long)
    mask = torch.zeros_like(values)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        values[row, place] = torch.as_tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return values.to(device), mask.to(device)


def positions(mask: Tensor) -> Tensor:
    """Each token's position, not counting padding, from a mask (rows, length); of the same shape."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of the sequences in batches of `size`, longest first, so that lengths in a batch differ little."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]
