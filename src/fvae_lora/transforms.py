"""Derivatives beyond a plain backward: where the custom autograd functions give way to the plain path."""

from __future__ import annotations

import torch


def is_transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work.

    Neither can differentiate a `torch.autograd.Function` that has a backward alone, so the plain path runs then.
    """
    if torch.compiler.is_compiling():
        return False
    # torch.autograd.Function.apply and torch.autograd.forward_ad ask the same way; torch has no public names for it.
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
