"""Derivatives beyond a plain backward, where the plain path replaces the custom autograd functions."""

from __future__ import annotations

import torch


def is_transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active.

    Neither can differentiate a `torch.autograd.Function` that only defines a backward, so the plain path runs then.
    """
    if torch.compiler.is_compiling():
        return False
    # torch.autograd.Function.apply and torch.autograd.forward_ad do the same; there is no public function for it.
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
