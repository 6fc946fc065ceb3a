r"""How a layer's ELBO reaches the loss.

1. A layer that runs in training mode hands its negative ELBO, a mean over tokens, to its model's `Recorder`
   (`Recorder.record`), which keeps it with the `Forward` that is running.
2. `add` sums over layers, with the weights of the configuration, and adds the sum to a loss: a hook on the model does
   that to the model's own loss (`fvae_lora.hooks`), `fvae_lora.add_elbo` and `fvae_lora.FVAELoraTrainer` to others.
3. In the backward, the loss is reached first (`_Add`) and the layers after it (`_Attach`). A gradient that reaches a
   layer but not the sum comes from a loss without the ELBO, and is an error: the ELBO never vanishes silently.

Reentrant gradient checkpointing runs layers without a graph, and again, with one, inside the backward. Such a layer
hands its ELBO's gradient on by itself then, scaled by the gradient that reached the loss.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .masks import TokenMasks
from .objective import LayerElbo, TokenWeights

ADVICE = "add it with fvae_lora.add_elbo(loss, model), or train with fvae_lora.FVAELoraTrainer"

Key = tuple[str, str]  # a layer's name and an adapter's
Shares = Mapping[str, float]  # of the optimizer step's tokens that a forward has, for each sequence


@dataclass
class Run:
    """One run of one layer."""

    negative_elbo: Tensor  # weighted by the objective, a mean over the tokens that count
    names: tuple[str, ...]  # of the objective's terms
    weighted: Tensor  # these terms with their weights, of which the sum is the ELBO; without graph
    terms: LayerElbo  # without graph
    grad_enabled: bool
    attached: bool  # to the layer's output

    @property
    def tokens(self) -> Tensor | int:
        """How many tokens count."""
        return self.terms.weights.count


@dataclass(eq=False)
class Forward:
    """A forward pass of the model: what its layers recorded, and what became of that."""

    masks: TokenMasks | None = None  # None where layers run outside a forward of the adapted model
    is_open: bool = True
    runs: dict[Key, list[Run]] = field(default_factory=lambda: defaultdict(list))
    added: bool = False
    in_loss: bool = False  # added to the loss that the model itself returned
    shares: Shares = field(default_factory=dict)
    per_token: dict[Key, Tensor | float] = field(default_factory=dict)
    scale: Tensor | None = None  # the gradient that reached the sum
    missed: bool = False  # a gradient reached a layer and not the sum, so far
    handed_over: set[Key] = field(default_factory=set)

    def all_runs(self) -> list[Run]:
        """Every run of every layer."""
        return [run for runs in self.runs.values() for run in runs]

    def release(self) -> None:
        """Let go of the graph."""
        for run in self.all_runs():
            run.negative_elbo = run.negative_elbo.detach()

    def check(self) -> None:
        """A gradient has reached a layer: is the ELBO in the loss that it comes from?"""
        if self.scale is None and self.added and not self.in_loss:
            self.missed = True  # the sum may still get its gradient, in a backward of its own
        elif self.scale is None:
            raise _not_in_loss(self)


def _not_in_loss(forward: Forward | None) -> RuntimeError:
    unlabelled = "call the model without labels and " if forward is not None and forward.in_loss else ""
    return RuntimeError(f"the ELBO of FVAE-LoRA is not in the loss that runs backward; {unlabelled}{ADVICE}")


@dataclass
class MicroBatch:
    """A micro-batch of a Trainer that adds the ELBO of all its forwards to the loss by itself."""

    labels: Any
    forwards: list[Forward] = field(default_factory=list)


class Recorder:
    """Collects the ELBO of one model's layers, forward by forward; shared by the model and its layers."""

    def __init__(self) -> None:
        self.forward = Forward(is_open=False)
        self.backward: Forward | None = None  # whose backward is running
        self.micro_batch: MicroBatch | None = None
        self.loss_uses_num_items: bool | None = None
        self.warned = False
        self.warned_of_padding = False
        self.ran: set[str] = set()  # names of layers that have run in training
        self.training_forwards = 0

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()  # a copy starts empty: what is recorded belongs to one forward of one model

    def masks(self) -> TokenMasks | None:
        """The masks of the forward that is running, or running again inside its backward."""
        if (rerun := self._rerun()) is not None:
            return rerun.masks
        return self.forward.masks if self.forward.is_open else None

    def _rerun(self) -> Forward | None:
        """The forward of which gradient checkpointing runs a part again, if it does."""
        return (self.backward or self.forward) if not self.forward.is_open and _inside_backward() else None

    def begin(self, forward: Forward) -> None:
        """Start a forward pass; what the last one left is dropped, which must not go unseen."""
        last = self.forward
        if last.missed and last.scale is None:
            last.missed = False
            raise RuntimeError(f"the ELBO of the last forward was not in the loss that ran backward; {ADVICE}")
        if self.micro_batch is None or last not in self.micro_batch.forwards:
            if not last.added and not self.warned and any(run.negative_elbo.requires_grad for run in last.all_runs()):
                self.warned = True
                warnings.warn(f"the ELBO of a training forward was never used; {ADVICE}", stacklevel=2)
            last.release()
        self.forward, self.backward = forward, None

    def record(self, layer: str, adapter: str, output: Tensor, terms: LayerElbo) -> Tensor:
        """Record the ELBO of a layer's run.

        Args:
            layer: Name of the adapted module inside the model.
            adapter: The adapter's name.
            output: The layer's output, (..., out).
            terms: Its ELBO.

        Returns:
            The output to go on with.
        """
        key, named = (layer, adapter), terms.weighted()
        weighted = torch.stack(list(named.values()))
        negative_elbo = -weighted.sum()
        if (rerun := self._rerun()) is not None:
            return _hand_over(rerun, key, output, negative_elbo, terms.weights)
        last = self.forward
        if not last.is_open and (last.added or last.masks is not None or key in last.runs):
            # The layer runs outside a forward of the adapted model, as when somebody calls a part of it.
            self.begin(Forward(is_open=False))
        attached = not torch.compiler.is_compiling()
        run = Run(negative_elbo, tuple(named), weighted.detach(), terms.detached(), torch.is_grad_enabled(), attached)
        self.forward.runs[key].append(run)
        return _Attach.apply(output, negative_elbo, weakref.ref(self.forward), None) if attached else output


def _hand_over(forward: Forward, key: Key, output: Tensor, negative_elbo: Tensor, weights: TokenWeights) -> Tensor:
    """What a layer returns that checkpointing runs again inside the backward."""
    if key in forward.runs and forward.runs[key][0].grad_enabled:
        return output  # it has a graph, which only wants its tensors back
    if forward.scale is None or key not in forward.runs:
        raise _not_in_loss(forward)
    forward.handed_over.add(key)
    coefficient = forward.scale.to(negative_elbo) * (forward.per_token[key] * weights.count)
    return _Attach.apply(output, negative_elbo, None, coefficient)


def _inside_backward() -> bool:
    # torch.utils.checkpoint asks the same way; torch has no public name for it.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Attach(torch.autograd.Function):
    """Identity on a layer's output, with the layer's ELBO as its companion.

    The companion makes the ELBO's parameters part of the output's graph, as DistributedDataParallel wants to see
    them. It gets its gradient from the sum, or, in a layer that runs again, from here.
    """

    @staticmethod
    def forward(ctx, output, negative_elbo, forward_pass, coefficient):  # type: ignore[no-untyped-def]
        # A weak reference: the forward holds the graph, and the graph must not hold itself.
        ctx.forward_pass, ctx.coefficient = forward_pass, coefficient
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        if ctx.coefficient is not None:
            return grad, ctx.coefficient, None, None
        check_reached(ctx.forward_pass)
        return grad, None, None, None


def check_reached(reference: weakref.ref[Forward]) -> None:
    """A gradient has reached a layer; see `Forward.check`."""
    if (forward := reference()) is None:
        raise _not_in_loss(None)  # the next one came before its ELBO was added
    forward.check()


class _Add(torch.autograd.Function):
    """loss + ELBO; the backward notes the gradient that reached the sum, for layers that run inside it."""

    @staticmethod
    def forward(ctx, loss, negative_elbo, forwards):  # type: ignore[no-untyped-def]
        ctx.forwards = forwards
        return loss + negative_elbo.to(loss.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        for forward in ctx.forwards:
            forward.scale = grad.detach()
            forward.release()
        if any(not run.grad_enabled for forward in ctx.forwards for run in forward.all_runs()):
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _require_hand_over(ctx.forwards))
        return grad, grad, None


def _require_hand_over(forwards: Sequence[Forward]) -> None:
    """After a backward: a layer without graph should have run again, unless there is nothing in it to train."""
    for forward in forwards:
        for key, runs in forward.runs.items():
            if not runs[0].grad_enabled and key not in forward.handed_over and _trainable(forward, key[0]):
                raise RuntimeError(
                    f"the ELBO of {key[0]} has no graph, so it cannot be trained: nothing before the checkpointed "
                    "layers requires a gradient; call model.enable_input_require_grads(), or use_reentrant=False"
                )


def _trainable(forward: Forward, layer: str) -> bool:
    return forward.masks is None or any(p.requires_grad for p in forward.masks.model.get_submodule(layer).parameters())


def add(loss: Tensor, forwards: Sequence[Forward], shares: Shares) -> Tensor:
    """Add the ELBO of a model's forward passes to a scalar.

    Each layer's is the mean over the tokens of all its runs, times the share of these tokens in the optimizer's step;
    layers and adapters add up, weighted as `fvae_lora.FVAELoraConfig` says.

    Args:
        loss: The scalar.
        forwards: The forwards, whose ELBO counts as used from now on; several have one mean.
        shares: The share for each sequence; 1 for those that are missing.

    Returns:
        ``loss + negative ELBO``.
    """
    per_token = _per_token(forwards, shares)
    values = [
        run.negative_elbo * (run.tokens * per_token[key])
        for forward in forwards
        for key, runs in forward.runs.items()
        for run in runs
    ]
    for forward in forwards:
        forward.added = forward.added or torch.is_grad_enabled()
        forward.shares, forward.per_token = shares, per_token
    return _Add.apply(loss, torch.stack([value.to(loss.device) for value in values]).sum(), forwards)


def _per_token(forwards: Sequence[Forward], shares: Shares) -> dict[Key, Tensor | float]:
    """The weight in the loss of one token's ELBO, for each layer and adapter."""
    groups: dict[Key, list[tuple[Forward, Run]]] = defaultdict(list)
    for forward in forwards:
        for key, runs in forward.runs.items():
            groups[key] += [(forward, run) for run in runs]
    layers = Counter(adapter for _, adapter in groups)
    weights: dict[Key, Tensor | float] = {}
    for (layer, adapter), group in groups.items():
        forward, run = group[0]
        config = run.terms.config
        weight = config.elbo_weight / (layers[adapter] if config.layer_reduction == "mean" else 1)
        share = 1.0 if forward.masks is None else shares.get(forward.masks.sequence(layer), 1.0)
        tokens = sum((run.tokens for _, run in group), start=0)
        weights[layer, adapter] = (
            weight * share / (tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1))
        )
    return weights


def task_weight(forwards: Sequence[Forward]) -> float:
    """The weight of the task loss, which the adapters that ran must agree on.

    Raises:
        ValueError: If they do not.
    """
    weights = {run.terms.config.task_weight for forward in forwards for run in forward.all_runs()}
    if len(weights) > 1:
        raise ValueError(f"task_weight must be the same for all active adapters, not {sorted(weights)}")
    return weights.pop()
