"""The decoder's last layer and the Gaussian likelihood in one step.

The plain path makes some ten passes over tensors of (tokens, d), the size of the layer's input; the fused one makes
four and keeps one, because the gradient is known as soon as the residual is.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transforms import is_transforming
from ..vae import raised

LOG_2PI = math.log(2 * math.pi)


def log_likelihood(x: Tensor, reconstruction: Tensor, log_tau: Tensor) -> Tensor:
    """Log N(x; reconstruction, diag tau^2), summed over features: the plain path.

    Args:
        x: (..., d).
        reconstruction: Mean g([z1; z2]), (..., d).
        log_tau: log tau, (d,).

    Returns:
        One number per token, (...,).
    """
    scaled = (x - reconstruction) * torch.exp(-log_tau)
    return -0.5 * scaled.square().sum(-1) - log_tau.sum() - 0.5 * x.shape[-1] * LOG_2PI


def summed_log_likelihood(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, log_tau: Tensor, mask: Tensor | None
) -> Tensor:
    """Sum over tokens of ``mask * log N(x; weight hidden + bias, diag tau^2)``.

    Args:
        x: Target, (..., d).
        hidden: Last hidden layer of the decoder, (..., h).
        weight: (d, h).
        bias: (d,).
        log_tau: log tau, (d,).
        mask: Weight of each token, (...,), or ``None`` for 1.

    Returns:
        A scalar in at least fp32, differentiable in all of x, hidden, weight, bias and log_tau: fused once, and by the
        plain path where a graph of the gradient or a transform of `torch.func` is asked for.
    """
    path = _plain if is_transforming() else _SummedLogLikelihood.apply
    value: Tensor = path(x, hidden, weight, bias, log_tau, mask)
    return value


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Nothing inside runs in half precision; the meta device has no autocast that could be off."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _plain(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, log_tau: Tensor, mask: Tensor | None) -> Tensor:
    reconstruction = F.linear(hidden, weight, bias)
    with full_precision(x.device.type):
        per_token = log_likelihood(raised(x), raised(reconstruction), raised(log_tau))
        return per_token.sum() if mask is None else (per_token * mask).sum()


class _SummedLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, weight, bias, log_tau, mask):  # type: ignore[no-untyped-def]
        given, x, d = x, raised(x), x.shape[-1]
        flat_hidden = hidden.reshape(-1, hidden.shape[-1])
        reconstruction = F.linear(flat_hidden, weight, bias)
        with full_precision(x.device.type):  # from here on nothing may run in half precision
            residual = x.reshape(-1, d) - reconstruction
            scaled = residual * torch.exp(-2 * log_tau.to(x.dtype))
            if mask is not None:
                scaled *= mask.reshape(-1, 1)
            weighted_squares = torch.linalg.vecdot(residual, scaled, dim=0)
            count = residual.shape[0] if mask is None else mask.sum()
            value = -0.5 * weighted_squares.sum() - count * (log_tau.to(x.dtype).sum() + 0.5 * d * LOG_2PI)
        ctx.save_for_backward(scaled, weighted_squares, given, hidden, weight, bias, log_tau, mask)
        ctx.count = count
        return value

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        scaled, weighted_squares, x, hidden, weight, bias, log_tau, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(grad, mask, x, hidden, weight, bias, log_tau)
        flat_hidden = hidden.reshape(-1, hidden.shape[-1])
        grad_x = scaled * -grad  # the only pass over (tokens, d); the signs of the others are mended on small tensors
        narrow = grad_x.to(weight.dtype)
        return (
            grad_x.reshape(x.shape).to(x.dtype),
            -(narrow @ weight).reshape(hidden.shape).to(hidden.dtype),
            -(narrow.t() @ flat_hidden.to(weight.dtype)),
            -grad_x.sum(0).to(weight.dtype),
            ((weighted_squares - ctx.count) * grad).to(log_tau.dtype),
            None,
        )


def _differentiable(grad: Tensor, mask: Tensor | None, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients with a graph of their own, which the fused backward has not."""
    # Views, so that the gradients are those of this value alone, where one input depends on another.
    views = [tensor.view_as(tensor) for tensor in inputs]
    x, hidden, weight, bias, log_tau = views
    value = _plain(x, hidden, weight, bias, log_tau, mask)
    needed = [view for view, tensor in zip(views, inputs, strict=True) if tensor.requires_grad]
    found = iter(torch.autograd.grad(value, needed, grad, create_graph=True))
    return (*(next(found) if tensor.requires_grad else None for tensor in inputs), None)
