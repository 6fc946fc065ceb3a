"""Sequences of different lengths as one tensor."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""What torch's cross-entropy leaves out, and so do transformers' losses."""


def padded(
    sequences: Sequence[Sequence[int]], filler: int, side: Literal["left", "right"], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The sequences as rows of the length of the longest, and which of their places are no padding: two (rows, length).

    Args:
        sequences: numbers.
        filler: what stands where a sequence has none.
        side: where the filler goes.
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
    """Each token's place among those that are no padding, (rows, length), of a mask of that shape."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the sequences in batches of `size`, the longest first: those of one batch differ little in length."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]
