r"""How a layer's ELBO reaches the loss.

1. A layer that runs in training mode hands its negative ELBO, a mean over tokens, to its model's `Recorder`
   (`Recorder.record`), which keeps it with the `Forward` that is running.
2. `add_to_loss` takes the forwards that are waiting for a loss, sums over layers with the configuration's weights, and
   adds the sum to the loss: a hook on the model does so for the model's own loss (`fvae_lora.hooks`),
   `fvae_lora.add_elbo` and `fvae_lora.FVAELoraTrainer` for any other.
3. The backward reaches the loss first (`_Add`), then the layers (`_Attach`). A gradient that reaches a layer but not
   the sum comes from a loss without the ELBO, which is an error: the ELBO never vanishes silently.

Reentrant gradient checkpointing runs layers without a graph first, and again with one inside the backward. Such a
layer passes on its ELBO's gradient itself, scaled by the gradient that reached the loss.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from .masks import TokenMasks
from .objective import LayerElbo
from .transforms import is_transforming

ADVICE = (
    "add it with fvae_lora.add_elbo(loss, model), or train with fvae_lora.FVAELoraTrainer or with "
    "fvae_lora.ElboTrainerMixin in front of another Trainer"
)

LayerKey = tuple[str, str]  # a layer's name and an adapter's
Shares = Mapping[str, Tensor | float]  # of the optimizer step's tokens that a forward has, for each sequence


class State(Enum):
    """What has become of a forward's ELBO."""

    WAITING = auto()  # not yet added to a loss
    ADDED = auto()  # added to a loss that the training loop computed
    RETURNED = auto()  # part of the loss that the model itself returned
    MISSED = auto()  # added, but a gradient has reached a layer and not the sum, which may get a backward of its own
    REACHED = auto()  # a gradient has reached the sum


@dataclass
class LayerRun:
    """What one run of one layer recorded."""

    layer: str
    adapter: str
    elbo: LayerElbo
    grad_enabled: bool
    node: weakref.ref[Any] | None = None  # of the layer's output in the graph; None in a compiled region

    @property
    def key(self) -> LayerKey:
        """The layer's name and the adapter's."""
        return self.layer, self.adapter

    @property
    def tokens(self) -> Tensor | int:
        """How many tokens count."""
        return self.elbo.weights.count

    def release(self) -> None:
        """Release the graph."""
        self.elbo = replace(self.elbo, negative=self.elbo.negative.detach())


@dataclass(eq=False)
class Forward:
    """A forward pass of the model: what its layers recorded, and what has become of it.

    Args:
        masks: Which tokens count; ``None`` where layers run outside a forward of the adapted model.
        trains: Whether gradients were enabled when it began. Without them, as in evaluation or a reference pass, the
            layers take z1's mean and record nothing.
    """

    masks: TokenMasks | None = None
    trains: bool = True
    inside_backward: bool = False
    state: State = State.WAITING
    runs: list[LayerRun] = field(default_factory=list)
    shares: Shares = field(default_factory=dict)
    per_token: dict[LayerKey, Tensor | float] = field(default_factory=dict)
    scale: Tensor | None = None  # the gradient that reached the sum
    outputs: weakref.ref[Any] | None = None  # alive as long as the graph of what the model returned
    handed_over: set[LayerKey] = field(default_factory=set)

    def runs_by_layer(self) -> dict[LayerKey, list[LayerRun]]:
        """The runs of each layer and adapter."""
        return group_by_layer([self])

    def release(self) -> None:
        """Release the graph."""
        for run in self.runs:
            run.release()

    def drop_unused(self) -> bool:
        """Drop the runs whose outputs no longer exist; return whether one of them could have been trained.

        A run's ELBO depends on earlier runs, so the latest are checked first.
        """
        unused = False
        for run in reversed(self.runs.copy()):
            kept = self.outputs if not run.grad_enabled else run.node
            if kept is None or kept() is None:
                unused = unused or run.elbo.negative.requires_grad
                run.release()
                self.runs.remove(run)
        return unused

    def check_in_loss(self) -> None:
        """Called when a gradient reaches a layer: raises if the loss that it comes from lacks the ELBO."""
        if self.state is State.ADDED:
            self.state = State.MISSED
        elif self.state in (State.WAITING, State.RETURNED):
            raise _not_in_loss(self)


def _not_in_loss(forward: Forward | None) -> RuntimeError:
    if forward is not None and forward.inside_backward:
        return RuntimeError(
            "FVAE-LoRA cannot train with a loss that runs the model again inside its backward, as cached contrastive "
            "losses do: the two runs would draw different z1, and the ELBO would be in neither loss; use the loss "
            "without the cache, and gradient checkpointing to save memory"
        )
    where = ""
    if forward is not None and forward.state is State.RETURNED:
        where = "call the model without labels and "
    elif forward is None or forward.masks is None:
        where = "call the model itself rather than a part of it, keep its outputs until the loss is made, and "
    return RuntimeError(f"the ELBO of FVAE-LoRA is not in the loss that runs backward; {where}{ADVICE}")


def group_by_layer(forwards: Sequence[Forward]) -> dict[LayerKey, list[LayerRun]]:
    """The runs of each layer and adapter in some forwards."""
    groups: dict[LayerKey, list[LayerRun]] = defaultdict(list)
    for forward in forwards:
        for run in forward.runs:
            groups[run.key].append(run)
    return groups


class Recorder:
    """Collects the ELBO of one model's layers, forward by forward; shared by the model and its layers.

    Attributes:
        forwards: Those that recorded something since an ELBO was last added to a loss; they share one mean.
        running: The forward that is running.
        backward: The forward whose backward is running.
        micro_batch: Set by a Trainer that adds the ELBO of all forwards of a micro-batch itself: inputs by name that
            the model may not be given.
        loss_uses_num_items: Whether the model's own loss divides by the number of labels in a step, once known.
    """

    def __init__(self) -> None:
        self.forwards: list[Forward] = []
        self.running: Forward | None = None
        self.backward: Forward | None = None
        self.micro_batch: Mapping[str, Any] | None = None
        self.loss_uses_num_items: bool | None = None
        self.warned = False
        self.warned_of_padding = False
        self.ran: set[str] = set()  # names of layers that have run in training
        self.training_forwards = 0

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()  # a copy starts empty: records belong to one forward of one model

    def trains(self) -> bool:
        """Whether a layer in training mode that runs now draws z1 and records its ELBO."""
        if (forward := self.running or self._rerun()) is not None:
            return forward.trains
        return torch.is_grad_enabled()

    def masks(self) -> TokenMasks | None:
        """The masks of the forward that is running, or being rerun inside its backward."""
        forward = self.running or self._rerun()
        return None if forward is None else forward.masks

    def _rerun(self) -> Forward | None:
        """The forward of which gradient checkpointing is rerunning a part, if any."""
        if self.running is not None or not is_inside_backward():
            return None
        return self.backward or (self.forwards[-1] if self.forwards else None)

    def begin(self, forward: Forward) -> None:
        """Start a forward pass."""
        self._drop_finished()
        self.running, self.backward = forward, None

    def end(self) -> Forward:
        """End the forward pass that is running."""
        forward = self.running
        assert forward is not None
        self.running = None
        return forward

    def drop(self, forward: Forward) -> None:
        """Forget a forward pass."""
        forward.runs.clear()
        self.forwards = [other for other in self.forwards if other is not forward]

    def clear(self) -> None:
        """Forget the forwards that wait for a loss, as at the start of a Trainer's micro-batch."""
        self._drop_finished()
        for forward in self.forwards:
            forward.release()
        self.forwards = []

    def _drop_finished(self) -> None:
        """Drop the forwards that can no longer get a loss, and report any whose ELBO was left out."""
        if any(forward.state is State.MISSED for forward in self.forwards):
            self.forwards = []
            raise RuntimeError(f"the ELBO of the last forward was not in the loss that ran backward; {ADVICE}")
        self.forwards = [forward for forward in self.forwards if forward.state is State.WAITING]
        if self.micro_batch is not None:
            return
        unused = [forward.drop_unused() for forward in self.forwards]
        self.forwards = [forward for forward in self.forwards if forward.runs]
        if any(unused) and not self.warned:
            self.warned = True
            warnings.warn(f"the ELBO of a training forward was never used; {ADVICE}", stacklevel=2)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Be as new for a while: what is recorded then is forgotten, and what was recorded before is kept."""
        kept = vars(self).copy()
        vars(self).update(vars(Recorder()))
        try:
            yield
        finally:
            vars(self).clear()
            vars(self).update(kept)

    def record(self, layer: str, adapter: str, output: Tensor, elbo: LayerElbo) -> Tensor:
        """Record the ELBO of a layer's run.

        Args:
            layer: Name of the adapted module inside the model.
            adapter: The adapter's name.
            output: The layer's output, (..., out).
            elbo: Its ELBO.

        Returns:
            The output, to be used in place of the one given.
        """
        if (rerun := self._rerun()) is not None:
            return _hand_over(rerun, (layer, adapter), output, elbo)
        forward = self.running or self._forward_of_part((layer, adapter))
        if not forward.runs:
            self.forwards.append(forward)
        run = LayerRun(layer, adapter, elbo, torch.is_grad_enabled())
        forward.runs.append(run)
        if torch.compiler.is_compiling() or is_transforming():
            return output
        attached: Tensor = _Attach.apply(output, elbo.negative, weakref.ref(forward), None)
        if attached.grad_fn is not None:
            run.node = weakref.ref(attached.grad_fn)
        return attached

    def _forward_of_part(self, key: LayerKey) -> Forward:
        """The forward to record a layer in that runs outside the model's own, as when a part of the model is called."""
        last = self.forwards[-1] if self.forwards else None
        if last is not None and last.masks is None and last.state is State.WAITING and key not in last.runs_by_layer():
            return last
        self._drop_finished()
        return Forward()


def _hand_over(forward: Forward, key: LayerKey, output: Tensor, elbo: LayerElbo) -> Tensor:
    """What a layer returns when checkpointing reruns it inside the backward."""
    runs = forward.runs_by_layer().get(key)
    if runs and runs[0].grad_enabled:
        return output  # it has a graph already, which only needs its tensors again
    if forward.masks is not None and forward.runs and not runs:
        layer, adapter = key
        raise RuntimeError(
            f"gradient checkpointing ran {layer} again with adapter {adapter!r}, which it did not run with in the "
            "forward; call backward before another adapter is set"
        )
    if forward.scale is None or not runs:
        raise _not_in_loss(forward)
    forward.handed_over.add(key)
    coefficient = forward.scale.to(elbo.negative) * (forward.per_token[key] * elbo.weights.count)
    return _Attach.apply(output, elbo.negative, None, coefficient)


def is_inside_backward() -> bool:
    """Whether a backward is running, as when gradient checkpointing reruns a forward."""
    # torch.utils.checkpoint does the same; there is no public function for it.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Attach(torch.autograd.Function):
    """Identity on a layer's output, with the layer's ELBO as its companion.

    The companion makes the ELBO's parameters part of the output's graph, as DistributedDataParallel requires. Its
    gradient comes from the sum or, in a layer that is rerun, from here.
    """

    @staticmethod
    def forward(ctx, output, negative_elbo, forward_pass, coefficient):  # type: ignore[no-untyped-def]
        # A weak reference: the forward holds the graph, and the graph must not hold itself.
        ctx.forward_pass, ctx.coefficient = forward_pass, coefficient
        ctx.set_materialize_grads(False)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None):  # type: ignore[no-untyped-def]
        if ctx.coefficient is not None:
            return grad, ctx.coefficient, None, None
        if grad is not None:
            check_reached(ctx.forward_pass)
        return grad, None, None, None


def check_reached(reference: weakref.ref[Forward]) -> None:
    """A gradient has reached a layer; see `Forward.check_in_loss`."""
    if (forward := reference()) is None:
        raise _not_in_loss(None)  # it was dropped before its ELBO was added
    forward.check_in_loss()


class _Add(torch.autograd.Function):
    """loss + ELBO; the backward stores the gradient that reached the sum, for layers that are rerun inside it."""

    @staticmethod
    def forward(ctx, loss, negative_elbo, forwards):  # type: ignore[no-untyped-def]
        ctx.forwards = forwards
        return loss + negative_elbo.to(loss.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        for forward in ctx.forwards:
            forward.state, forward.scale = State.REACHED, grad.detach()
            forward.release()
        if any(not run.grad_enabled for forward in ctx.forwards for run in forward.runs):
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _require_hand_over(ctx.forwards))
        return grad, grad, None


def _require_hand_over(forwards: Sequence[Forward]) -> None:
    """After a backward: a layer without graph must have been rerun, unless it has nothing to train."""
    for forward in forwards:
        for run in forward.runs:
            if not run.grad_enabled and run.key not in forward.handed_over and _trainable(forward, run.layer):
                raise RuntimeError(
                    f"the ELBO of {run.layer} has no graph, so it cannot be trained: nothing before the checkpointed "
                    "layers requires a gradient; call model.enable_input_require_grads(), or use_reentrant=False"
                )


def _trainable(forward: Forward, layer: str) -> bool:
    return forward.masks is None or any(p.requires_grad for p in forward.masks.model.get_submodule(layer).parameters())


def add_to_loss(loss: Tensor, forwards: Sequence[Forward], shares: Shares, state: State = State.ADDED) -> Tensor:
    """Add the ELBO of a model's forward passes to a scalar.

    A layer's ELBO is the mean over the tokens of all its runs, times the share of these tokens in the optimizer's step;
    layers and adapters are summed with the weights of `fvae_lora.FVAELoraConfig`.

    Args:
        loss: The scalar.
        forwards: The forwards, whose ELBO counts as used from now on; several share one mean.
        shares: The share for each sequence; 1 where none is given.
        state: The state that the forwards get.

    Returns:
        ``loss + negative ELBO``.
    """
    per_token = _per_token(forwards, shares)
    values = [run.elbo.negative * (run.tokens * per_token[run.key]) for forward in forwards for run in forward.runs]
    for forward in forwards:
        if torch.is_grad_enabled() and forward.state is State.WAITING:
            forward.state = state
        forward.shares, forward.per_token = shares, per_token
    negative_elbo = torch.stack([value.to(loss.device) for value in values]).sum()
    if is_transforming():
        for forward in forwards:
            forward.runs.clear()  # its tensors do not exist outside the transform
        return loss + negative_elbo
    return _Add.apply(loss, negative_elbo, forwards)


def _per_token(forwards: Sequence[Forward], shares: Shares) -> dict[LayerKey, Tensor | float]:
    """The weight in the loss of one token's ELBO, for each layer and adapter."""
    groups = group_by_layer(forwards)
    layers = Counter(adapter for _, adapter in groups)
    masks = next((forward.masks for forward in forwards if forward.masks is not None), None)
    weights: dict[LayerKey, Tensor | float] = {}
    for (layer, adapter), runs in groups.items():
        config = runs[0].elbo.config
        weight = config.elbo_weight / (layers[adapter] if config.layer_reduction == "mean" else 1)
        share = shares.get("input" if masks is None else masks.sequence(layer), 1.0)
        tokens = sum((run.tokens for run in runs), start=0)
        per_token = weight * share / (tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1))
        of_layer = runs[0].elbo.negative
        weights[layer, adapter] = per_token.to(of_layer) if isinstance(per_token, Tensor) else per_token
    return weights


def task_weight(forwards: Sequence[Forward]) -> float:
    """The weight of the task loss, which the adapters that ran must agree on.

    Raises:
        ValueError: If they do not.
    """
    weights = {run.elbo.config.task_weight for forward in forwards for run in forward.runs}
    if len(weights) > 1:
        raise ValueError(f"task_weight must be the same for all active adapters, not {sorted(weights)}")
    return weights.pop()
