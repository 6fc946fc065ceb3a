"""The ELBO for loops that compute their own loss, and its terms for inspection."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layer import FVAELoraLayer
from .recorder import Forward, LayerRun, Recorder, Shares, State, add_to_loss, group_by_layer, task_weight


def elbo_loss(model: nn.Module) -> Tensor:
    """The weighted negative ELBO of the model's last forward pass, to be added to the task loss.

    Several forwards without labels, such as two towers or a pair, share one mean: over all forwards since an ELBO was
    last added to a loss. Under the paper's profile it is ``- lambda * sum over layers of L_FVAE``, each a mean over the
    tokens that are not padding; active adapters are summed. Source: arXiv 2510.19640.

    Args:
        model: An adapted model, or one that contains it; wrappers such as DDP or `torch.compile` are fine.

    Returns:
        A scalar in at least fp32. Zero without a graph when nothing was recorded: in eval mode, without gradients, with
        adapters disabled, with ``elbo_weight=0``.
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    groups = last_forwards(model)
    if not groups:
        return total
    if torch.is_grad_enabled() and any(forward.state is State.RETURNED for group in groups for forward in group):
        warnings.warn("this forward's own loss contains the ELBO already; do not add it a second time", stacklevel=2)
    total.requires_grad_(torch.is_grad_enabled())
    for group in groups:
        total = add_to_loss(total, group, group[0].shares)
    return total


def add_elbo(task_loss: Tensor, model: nn.Module) -> Tensor:
    """``task_weight * task_loss + elbo_loss(model)``, for loops that compute their own loss.

    It covers all forwards of the model since an ELBO was last added to a loss, regardless of what ran in between
    without gradients, in eval mode or without adapters. Forwards whose outputs were dropped do not count.

    Args:
        task_loss: The loss that the loop computed from the model's outputs, a scalar.
        model: The adapted model, after the forward passes that produced those outputs.

    Returns:
        The loss to call ``backward`` on, a scalar; `task_loss` itself when nothing was recorded.

    Raises:
        RuntimeError: If one of the forwards returned a loss of its own, which contains the ELBO already.
        ValueError: If `task_loss` is not a scalar, or the active adapters disagree on ``task_weight``.
    """
    groups = last_forwards(model)
    if any(forward.state is State.RETURNED for group in groups for forward in group):
        raise RuntimeError(
            "the loss that this forward returned contains the ELBO already; use it, or call the model without labels"
        )
    return with_elbo(task_loss, [(group, group[0].shares) for group in groups])


def with_elbo(task_loss: Tensor, groups: Sequence[tuple[Sequence[Forward], Shares]]) -> Tensor:
    """``task_weight * task_loss`` plus the ELBO of the forwards of one or more models.

    Args:
        task_loss: A scalar.
        groups: For each model its forwards, which share one mean, and their share of the optimizer's step.

    Returns:
        A scalar; `task_loss` itself when the forwards recorded nothing.

    Raises:
        ValueError: If `task_loss` is not a scalar, or the active adapters disagree on ``task_weight``.
    """
    recorded = [(forwards, shares) for forwards, shares in groups if forwards]
    if not recorded:
        return task_loss
    if task_loss.numel() != 1:
        raise ValueError(f"the ELBO is added to a scalar loss, not to one of shape {tuple(task_loss.shape)}")
    loss = task_weight([forward for forwards, _ in recorded for forward in forwards]) * task_loss
    for forwards, shares in recorded:
        loss = add_to_loss(loss, forwards, shares)
    return loss


@torch.no_grad()
def elbo_terms(model: nn.Module) -> dict[str, dict[str, float]]:
    """The unweighted terms of the ELBO of the model's last forward pass in training mode, layer by layer.

    They are means over tokens, as in ``L_FVAE = alpha reconstruction - beta kl_z1 + delta gamma``, of the same forwards
    as `elbo_loss`.

    Args:
        model: An adapted model, or one that contains it.

    Returns:
        For each adapted module (followed by the adapter's name where several were active) the terms
        ``"reconstruction"`` (nats), ``"kl_z1"`` (nats), ``"gamma"`` (nats), ``"w2"`` where z1 and z2 have equal
        dimensions, ``"kl_z2"`` (nats) under ``objective="vae2lat"``, ``"z1_l2"`` and ``"z2_l2"`` under
        ``objective="reference"``.
        Empty when nothing was recorded.
    """
    terms = {}
    for group in last_forwards(model):
        by_layer = group_by_layer(group)
        single = len({adapter for _, adapter in by_layer}) == 1
        for (layer, adapter), runs in by_layer.items():
            terms[layer if single else f"{layer}.{adapter}"] = _mean_terms(runs)
    return terms


def _mean_terms(runs: Sequence[LayerRun]) -> dict[str, float]:
    counts = torch.stack([torch.as_tensor(run.tokens, dtype=torch.float64).cpu() for run in runs])
    values = torch.stack([run.elbo.terms.double().cpu() for run in runs])
    means = (values * counts[:, None]).sum(0) / counts.sum().clamp(min=1)
    return dict(zip(runs[0].elbo.names, means.tolist(), strict=True))


def recorders(model: nn.Module) -> list[Recorder]:
    """The recorders of the adapted models inside a model, without repetition."""
    return list(dict.fromkeys(module.recorder for module in model.modules() if isinstance(module, FVAELoraLayer)))


def last_forwards(model: nn.Module) -> list[list[Forward]]:
    """For each adapted model inside a model, the forwards whose ELBO is to be added next or was added last."""
    groups = ([forward for forward in recorder.forwards if forward.runs] for recorder in recorders(model))
    return [group for group in groups if group]
