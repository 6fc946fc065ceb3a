"""When a forward of an adapted model begins and ends."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .idle import warn_of_idle_layers
from .masks import SEQUENCE_KINDS, TokenMasks, warn_of_padding
from .model_loss import is_normalised, loss_key, share_of_items, with_loss
from .recorder import Forward, Recorder, State, add_to_loss, check_reached, is_inside_backward, task_weight
from .transforms import is_transforming

ATTRIBUTE = "_fvae_lora_recorder"


def recorder_of(model: nn.Module) -> Recorder:
    """The recorder of an adapted model; created with its hooks on the first call."""
    recorder: Recorder | None = vars(model).get(ATTRIBUTE)
    if recorder is None:
        recorder = Recorder()
        setattr(model, ATTRIBUTE, recorder)
        model.register_forward_pre_hook(_begin_forward, with_kwargs=True)
        model.register_forward_hook(_end_forward, with_kwargs=True, always_call=True)
    return recorder


def run_hooks_on_forward(model: nn.Module) -> None:
    """Make ``model.forward(...)`` a call of the model, which runs its hooks.

    Code that holds a model with an injected adapter may call its forward directly, as sentence-transformers does.

    Args:
        model: The adapted model.
    """
    if not isinstance(vars(model).get("forward"), _HookedForward):
        # As in accelerate: a partial survives copies of the model and keeps the signature.
        model.forward = functools.update_wrapper(_HookedForward(_hooked_forward, model, model.forward), model.forward)


class _HookedForward(functools.partial[Any]):
    """A model's forward that runs the model's hooks."""


def _hooked_forward(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if getattr(model, ATTRIBUTE).running is None and not torch.compiler.is_compiling():
        return model(*args, **kwargs)
    return original(*args, **kwargs)


def remove_hooks(model: nn.Module) -> None:
    """Remove recorder and hooks from a model that no longer has adapted layers."""
    if ATTRIBUTE in vars(model):
        delattr(model, ATTRIBUTE)
    if isinstance(vars(model).get("forward"), _HookedForward):
        del model.forward
    for hooks, hook in ((model._forward_pre_hooks, _begin_forward), (model._forward_hooks, _end_forward)):
        for key in [key for key, registered in hooks.items() if registered is hook]:
            del hooks[key]


def _begin_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if torch.compiler.is_compiling() and not model.training:
        getattr(model, ATTRIBUTE).forwards = []  # keep the model one graph; drop what training recorded
        return None
    return _open_forward(model, args, kwargs)


def _end_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if torch.compiler.is_compiling() and not model.training:
        return None
    return _close_forward(model, args, kwargs, output)


@torch.compiler.disable(reason="the ELBO joins the loss outside the graph; train without fullgraph=True")
def _open_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if getattr(model, "_is_replica", False):
        raise RuntimeError("FVAE-LoRA does not support torch.nn.DataParallel; use torchrun or accelerate launch")
    recorder: Recorder = getattr(model, ATTRIBUTE)
    inputs = _named_arguments(model, args, kwargs)
    masks = TokenMasks.of(model, {**(recorder.micro_batch or {}), **inputs})
    recorder.begin(Forward(masks, trains=torch.is_grad_enabled(), inside_backward=is_inside_backward()))
    num_items = inputs.get("num_items_in_batch")
    if num_items is not None and recorder.loss_uses_num_items is None and torch.is_grad_enabled():
        # No attribute says whether the model's own loss divides by this number: find out once, by its gradient.
        probe = torch.tensor(float(num_items), requires_grad=True)
        return args, kwargs | {"num_items_in_batch": probe}
    return None


@torch.compiler.disable(reason="the ELBO joins the loss outside the graph; train without fullgraph=True")
def _close_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    recorder: Recorder = getattr(model, ATTRIBUTE)
    if recorder.running is None:
        return None
    forward = recorder.end()
    if output is None:  # an error ended it, after which a smaller batch may need the memory
        recorder.drop(forward)
    else:
        warn_of_idle_layers(model, recorder, forward)
    if not forward.runs:
        return None
    if forward.masks is not None and not recorder.warned_of_padding:
        recorder.warned_of_padding = warn_of_padding(forward.masks)
    inputs = _named_arguments(model, args, kwargs)
    if (key := loss_key(output, inputs)) is not None:
        loss = output if key is Ellipsis else output[key]
        share = share_of_items(model, inputs)
        if share is not None and not is_normalised(model, recorder, loss, inputs["num_items_in_batch"]):
            loss = loss * torch.as_tensor(share).to(loss)  # the model returned the mean over this micro-batch only
        if recorder.micro_batch is None:
            shares: dict[str, Tensor | float] = {} if share is None else dict.fromkeys(SEQUENCE_KINDS, share)
            loss = add_to_loss(task_weight([forward]) * loss, [forward], shares, State.RETURNED)
        output = with_loss(output, key, loss)
    if not is_transforming():
        _watch_backward(recorder, forward, output)
    return output


def _named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs if args else kwargs


class _Outputs:
    """A token that lives as long as the graph of a forward's outputs."""


def _watch_backward(recorder: Recorder, forward: Forward, output: Any) -> None:
    """Note which forward a backward belongs to as soon as it reaches one of the outputs."""
    # Weak references: an output's graph is part of what the forward holds, and must not hold itself.
    owner, reference, outputs = weakref.ref(recorder), weakref.ref(forward), _Outputs()
    forward.outputs = weakref.ref(outputs)

    def enter(_: Tensor, outputs: _Outputs = outputs) -> None:
        if (recorder := owner()) is not None:
            recorder.backward = reference()

    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(enter)
    # A compiled region is one node of the graph, layers and ELBO together.
    compiled = [run.elbo.negative.grad_fn for run in forward.runs if run.node is None]
    for node in {id(node): node for node in compiled if node is not None}.values():
        node.register_prehook(lambda _: check_reached(reference))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
