r"""How a layer's ELBO reaches the loss.

Layers that run inside a forward of the adapted model (in training mode) record their ELBO with the model's
`Recorder`. A hook on that model then adds the sum to the model's loss, so that any loop which uses this loss is right;
a loop that computes its own loss calls `fvae_lora.add_elbo`. A gradient that reaches the model's outputs without the
ELBO having been added by either is an error: the ELBO never vanishes silently.

Reentrant gradient checkpointing runs the forward without a graph and again, with one, inside the backward. There the
layer itself hands its ELBO's gradient on, scaled by the gradient that reached the loss (`_HandOver`).
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import FVAELoraConfig
from .masks import IGNORED_LABEL, TokenMasks, is_encoder_decoder, sequence_of
from .objective import LayerElbo, TokenWeights

ATTRIBUTE = "_fvae_lora_recorder"
ADVICE = "add it with fvae_lora.add_elbo(loss, model), or train with fvae_lora.FVAELoraTrainer"


@dataclass
class Call:
    """One run of one layer: the negative weighted ELBO, with graph where there is one, and its terms without."""

    negative_elbo: Tensor
    terms: LayerElbo


@dataclass
class Forward:
    """What the layers recorded in one forward pass of the model."""

    masks: TokenMasks | None = None
    labels: Tensor | None = None
    num_items: Tensor | None = None
    probe: Tensor | None = None
    shares: Mapping[str, Tensor | float] | None = None
    calls: dict[tuple[str, str], list[Call]] = field(default_factory=lambda: defaultdict(list))
    is_open: bool = True
    used: bool = False
    in_loss: bool = False
    scale: Tensor | None = None  # of the gradient that reached the loss

    def needs_grad(self) -> bool:
        """Whether an ELBO with a graph was recorded."""
        return any(call.negative_elbo.requires_grad for calls in self.calls.values() for call in calls)

    def total(self, shares: Mapping[str, Tensor | float]) -> Tensor:
        """The weighted negative ELBO over layers, the tokens of each sequence times that sequence's share."""
        values: list[Tensor] = []
        for (layer, adapter), calls in self.calls.items():
            weight = self._weight(adapter, calls[0].terms.config) * shares.get(self._sequence(layer), 1.0)
            values += [call.negative_elbo * (weight * _share_of_run(call.terms.weights, calls)) for call in calls]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def coefficient(self, layer: str, adapter: str, weights: TokenWeights) -> Tensor | float:
        """Derivative of the loss by the ELBO of one run of a layer that is being run again inside the backward."""
        calls = self.calls[layer, adapter]
        share = (self.shares or {}).get(self._sequence(layer), 1.0)
        return self._weight(adapter, calls[0].terms.config) * share * _share_of_run(weights, calls)

    def _sequence(self, layer: str) -> str:
        return sequence_of(layer, self.masks is not None and is_encoder_decoder(self.masks.model))

    def _weight(self, adapter: str, config: FVAELoraConfig) -> float:
        if config.layer_reduction == "sum":
            return config.elbo_weight
        return config.elbo_weight / sum(1 for _, other in self.calls if other == adapter)


def _share_of_run(weights: TokenWeights, calls: Sequence[Call]) -> Tensor | float:
    """A layer that runs several times in one forward has one mean, over the tokens of all its runs."""
    if len(calls) == 1:
        return 1.0
    counts = torch.stack([torch.as_tensor(call.terms.weights.count) for call in calls])
    return torch.as_tensor(weights.count) / counts.sum().clamp(min=1)


class Recorder:
    """Collects the ELBO of one model's layers, forward by forward; shared by the model and its layers."""

    def __init__(self) -> None:
        self.forward = Forward(is_open=False)
        self.backward: Forward | None = None  # the forward whose backward is running
        self.next_shares: Mapping[str, Tensor | float] | None = None
        self.loss_uses_num_items: bool | None = None
        self.warned = False

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()  # a copy starts empty: what is recorded belongs to one forward of one model

    def masks(self) -> TokenMasks | None:
        """The masks of the forward that is running, or running again inside its backward."""
        if (rerun := self._rerun()) is not None:
            return rerun.masks
        return self.forward.masks if self.forward.is_open else None

    def _rerun(self) -> Forward | None:
        """The forward of which checkpointing runs a part again, if it does."""
        return self.backward if not self.forward.is_open and _inside_backward() else None

    def begin(self, forward: Forward) -> None:
        """Start a forward pass; what the last one left is dropped, with a warning if it was never used."""
        last = self.forward
        if not last.used and not self.warned and last.needs_grad():
            self.warned = True
            warnings.warn(f"the ELBO of a training forward was never used; {ADVICE}", stacklevel=2)
        forward.shares, self.next_shares = self.next_shares, None
        self.forward = forward

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
        negative_elbo = -terms.total()
        if (rerun := self._rerun()) is not None and (layer, adapter) in rerun.calls:
            return _HandOver.apply(
                output, negative_elbo * rerun.coefficient(layer, adapter, terms.weights), rerun.scale
            )
        forward = self.forward
        if not forward.is_open and (forward.used or forward.masks is not None or (layer, adapter) in forward.calls):
            # The layer runs outside a forward of the adapted model, as when somebody calls a part of it.
            self.begin(Forward(is_open=False))
            forward = self.forward
        forward.calls[layer, adapter].append(Call(negative_elbo, terms.detached()))
        if not forward.is_open:
            refuse_unused([output], forward)
        return output


class _AddElbo(torch.autograd.Function):
    """loss + ELBO; the backward notes the gradient that reached the loss, for layers that run inside it."""

    @staticmethod
    def forward(ctx, loss, negative_elbo, recorder):  # type: ignore[no-untyped-def]
        ctx.recorder, ctx.forward_pass = recorder, recorder.forward
        return loss + negative_elbo.to(loss.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        ctx.forward_pass.scale = grad.detach()
        ctx.recorder.backward = ctx.forward_pass
        return grad, grad, None


class _HandOver(torch.autograd.Function):
    """Identity on a layer's output that gives the layer's ELBO its share of the gradient of the loss."""

    @staticmethod
    def forward(ctx, output, negative_elbo, scale):  # type: ignore[no-untyped-def]
        ctx.scale = scale.to(negative_elbo.device, negative_elbo.dtype)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad, ctx.scale, None


def _inside_backward() -> bool:
    # torch.utils.checkpoint asks the same way; torch has no public name for it.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def join(loss: Tensor, recorder: Recorder, shares: Mapping[str, Tensor | float], in_loss: bool = False) -> Tensor:
    """Add the ELBO of the last forward to a scalar.

    Args:
        loss: The scalar.
        recorder: What recorded it; the ELBO is marked as used.
        shares: This forward's share of the tokens of the optimizer's step, for each sequence.
        in_loss: Whether the model's own loss now contains it.

    Returns:
        ``loss + negative ELBO``.
    """
    forward = recorder.forward
    forward.used, forward.in_loss, forward.shares = True, in_loss, shares
    total = forward.total(shares)
    if total.requires_grad and not torch.compiler.is_compiling():
        total.register_hook(partial(_release, forward))
    return _AddElbo.apply(loss, total, recorder)


def task_weight(forward: Forward) -> float:
    """The weight of the task loss, which the adapters that ran must agree on.

    Raises:
        ValueError: If they do not.
    """
    weights = {calls[0].terms.config.task_weight for calls in forward.calls.values()}
    if len(weights) > 1:
        raise ValueError(f"task_weight must be the same for all active adapters, not {sorted(weights)}")
    return weights.pop()


def _release(forward: Forward, _: Tensor) -> None:
    """After the backward nothing may keep the graph alive."""
    for calls in forward.calls.values():
        for call in calls:
            call.negative_elbo = call.negative_elbo.detach()


def refuse_unused(outputs: Sequence[Tensor], forward: Forward) -> None:
    """Let a gradient that reaches one of the outputs fail if the ELBO was not used by then."""
    if torch.compiler.is_compiling():
        return
    for output in outputs:
        if output.requires_grad:
            output.register_hook(partial(_raise_if_unused, forward))


def _raise_if_unused(forward: Forward, _: Tensor) -> None:
    if not forward.used:
        forward.used = True
        raise RuntimeError(f"the ELBO of FVAE-LoRA was not added to this loss; {ADVICE}")


def recorder_of(model: nn.Module) -> Recorder:
    """The recorder of an adapted model; made, with the hooks that it needs, on the first call."""
    recorder: Recorder | None = vars(model).get(ATTRIBUTE)
    if recorder is None:
        recorder = Recorder()
        setattr(model, ATTRIBUTE, recorder)
        model.register_forward_pre_hook(_begin_forward, with_kwargs=True)
        model.register_forward_hook(_end_forward, with_kwargs=True)
    return recorder


def forget(model: nn.Module) -> None:
    """Take recorder and hooks off a model that has no adapted layers any more."""
    if ATTRIBUTE in vars(model):
        delattr(model, ATTRIBUTE)
    for hooks, hook in ((model._forward_pre_hooks, _begin_forward), (model._forward_hooks, _end_forward)):
        for key in [key for key, registered in hooks.items() if registered is hook]:
            del hooks[key]


def _begin_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if getattr(model, "_is_replica", False):
        raise RuntimeError("FVAE-LoRA does not support torch.nn.DataParallel; use torchrun or accelerate launch")
    recorder: Recorder = getattr(model, ATTRIBUTE)
    inputs = kwargs
    if args:
        inputs = dict(inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments) | kwargs
    forward = Forward(TokenMasks(model, inputs), inputs.get("labels"), inputs.get("num_items_in_batch"))
    recorder.begin(forward)
    if forward.num_items is not None and recorder.loss_uses_num_items is None and torch.is_grad_enabled():
        # Whether the model's own loss divides by this number is not written anywhere: follow its gradient, once.
        forward.probe = torch.tensor(float(forward.num_items), requires_grad=True)
        return args, kwargs | {"num_items_in_batch": forward.probe}
    return None


def _end_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    recorder: Recorder = getattr(model, ATTRIBUTE)
    forward = recorder.forward
    forward.is_open = False
    if not forward.calls:
        return None
    key = _loss_key(output, forward)
    if key is None:
        refuse_unused(list(_tensors(output)), forward)
        return None
    loss = output if key is Ellipsis else output[key]
    share = _share_of_items(model, forward)
    if forward.probe is not None and loss.requires_grad:
        (follows,) = torch.autograd.grad(loss, forward.probe, retain_graph=True, allow_unused=True)
        recorder.loss_uses_num_items = follows is not None
    if share is not None and recorder.loss_uses_num_items is False:
        loss = loss * share.to(loss.device)  # the model returned the mean over this micro-batch alone
    shares = forward.shares
    if shares is None:
        shares = {} if share is None else {"input": share, "decoder": share}
    return _replaced(output, key, join(task_weight(forward) * loss, recorder, shares, in_loss=True))


def _share_of_items(model: nn.Module, forward: Forward) -> Tensor | None:
    """This micro-batch's share of the labels of the optimizer's step, counted as transformers' Trainer counts."""
    labels = forward.labels
    if forward.num_items is None or not isinstance(labels, Tensor):
        return None
    if getattr(model, "loss_type", None) == "ForCausalLM" and not is_encoder_decoder(model):
        labels = labels[..., 1:]
    return (labels != IGNORED_LABEL).sum() / torch.as_tensor(forward.num_items, device=labels.device)


def _loss_key(output: Any, forward: Forward) -> Any:
    """Where the loss lies in a model's output: a key, an index, `...` for the output itself, ``None`` for nowhere."""
    if isinstance(output, Mapping):
        return "loss" if isinstance(output.get("loss"), Tensor) else None
    assert forward.masks is not None
    names = {name for name, value in forward.masks.inputs.items() if value is not None and value is not False}
    if not any("label" in name or name in ("start_positions", "return_loss") for name in names):
        return None
    if isinstance(output, tuple) and output and _is_scalar(output[0]):
        return 0
    return ... if _is_scalar(output) else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _replaced(output: Any, key: Any, loss: Tensor) -> Any:
    if key is Ellipsis:
        return loss
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]
        return output
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: loss})
    return (loss, *output[1:])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
